"""Files by http: whole or not at all, and asked for again where a server is busy or a connection breaks."""

from __future__ import annotations

import http.client
import io
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

TIMEOUT_SECONDS = 60.0  # without a byte
LIMIT_SECONDS = 600.0  # of a whole file
LIMIT_BYTES = 1 << 30
TRIES = 3
PAUSE_SECONDS = 1.0  # before the second try, twice as much before the next
LONGEST_PAUSE_SECONDS = 30.0  # whatever a server asks for
FAULTS = (OSError, ValueError, http.client.HTTPException)
_BUSY = (408, 429, 500, 502, 503, 504)
_BROKEN = (ConnectionResetError, ConnectionAbortedError, TimeoutError, http.client.IncompleteRead)
_ALLOWED = "/%:@!$&'()*+,;=~?"  # in paths and queries, as they are


def fetch(url: str) -> bytes:
    """A file's content. Raises: one of FAULTS."""
    deadline = time.monotonic() + LIMIT_SECONDS
    for number in range(1, TRIES):
        try:
            return _read_whole(url, deadline)
        except FAULTS as error:
            pause = _pause_after(error, number)
            if pause is None:
                raise
        time.sleep(pause)
    return _read_whole(url, deadline)


def open_url(url: str) -> io.RawIOBase:
    """A file's content as it comes; reading it raises one of FAULTS where it breaks off. Raises: one of FAULTS."""
    parts = urlsplit(url)
    path, query = quote(parts.path, safe=_ALLOWED), quote(parts.query, safe=_ALLOWED)
    address = urlunsplit(parts._replace(path=path, query=query, fragment=""))
    return _Body(urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS))


class _Body(io.RawIOBase):
    """A response that does not take the end of its connection for the end of the file."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._response.readinto(buffer)
        if not count and (missing := self._response.length):
            raise ConnectionResetError(f"the connection ended {missing} bytes before the file did")
        return count

    def close(self) -> None:
        self._response.close()
        super().close()


def _read_whole(url: str, deadline: float) -> bytes:
    data = bytearray()
    with io.BufferedReader(open_url(url), 1 << 20) as body:
        while piece := body.read1():
            data += piece
            if len(data) > LIMIT_BYTES:
                raise ValueError(f"larger than {LIMIT_BYTES} bytes; download it")
            if time.monotonic() > deadline:
                raise ValueError(f"not there after {LIMIT_SECONDS:g} s; download it")
    return bytes(data)


def _pause_after(error: Exception, number: int) -> float | None:
    """Seconds to wait after the try of that number; None where another would fail alike."""
    usual = PAUSE_SECONDS * number
    if isinstance(error, urllib.error.HTTPError):
        asked = error.headers.get("Retry-After") or ""
        pause = float(asked) if asked.isdecimal() else usual
        return min(pause, LONGEST_PAUSE_SECONDS) if error.code in _BUSY else None
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return usual if isinstance(cause, _BROKEN) else None
