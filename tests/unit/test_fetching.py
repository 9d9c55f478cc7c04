"""Files come over http whole or not at all, again where a server is busy, and no server brings a run down."""

import http.server
import socket
import struct
import threading
from collections import Counter
from typing import ClassVar

import pytest

from omniloom.config import DataConfig, DataSource
from omniloom.data import fetching
from omniloom.data.media_files import read_bytes
from omniloom.data.row_streams import open_stream_of
from omniloom.types import SampleError

FILE = bytes(range(256)) * 40
WORKING = ("/file", "/a%20b.jpg", "/%C3%A9.jpg?x=%20y", "/moved", "/busy", "/overloaded", "/reset", "/short once")
BROKEN = ("/missing", "/short", "/chunks", "/chunk", "/garbage", "/long line", "/headers", "/closed", "/always busy")


class OddServer(http.server.BaseHTTPRequestHandler):
    """Answers as servers do on their bad days, by path."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[Counter[str]] = Counter()

    def log_message(self, *arguments):
        pass

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def hang_up(self, *, rudely=False):
        self.wfile.flush()
        if rudely:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def do_GET(self):
        path = self.path.replace("%20", " ")
        self.asked[path] += 1
        again = self.asked[path] > 1
        if path in ("/busy", "/overloaded", "/always busy") and not (again and path != "/always busy"):
            self.answer(429 if path == "/busy" else 503, Retry_After=0)
        elif path == "/moved":
            self.answer(302, Location="/a b.jpg")
        elif path == "/missing":
            self.answer(404)
        elif path == "/reset" and not again:
            self.hang_up(rudely=True)
        elif path.startswith("/short") and not (again and path.endswith("once")):
            self.answer(200, FILE[:3000], Content_Length=len(FILE))
            self.hang_up()
        elif path in ("/chunks", "/chunk"):
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s" % (len(FILE), FILE[:3000]) if path == "/chunks" else b"no number\r\n")
            self.hang_up()
        elif path in ("/garbage", "/long line", "/headers", "/closed"):
            many = b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300
            self.wfile.write({"/garbage": b"no\r\n\r\n", "/headers": many, "/closed": b""}.get(path, b"x" * 100_000))
            self.hang_up()
        else:
            self.answer(200, b"" if path == "/nothing" else FILE)


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr(fetching, "PAUSE_SECONDS", 0.0)
    OddServer.asked.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), OddServer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("path", [*WORKING, "/a b.jpg", "/é.jpg?x= y#part"])
def test_a_file_comes_whole_whatever_its_address_holds_and_once_the_server_can(address, path):
    assert read_bytes(address + path, "image") == FILE


@pytest.mark.parametrize("path", BROKEN)
def test_what_does_not_come_whole_is_a_bad_row(address, path):
    with pytest.raises(SampleError, match=r"cannot fetch [^\n]*$"):
        read_bytes(address + path, "image")
    assert OddServer.asked[path] <= fetching.TRIES
    assert path != "/missing" or OddServer.asked[path] == 1


@pytest.mark.parametrize(
    "url", ["http://host:port/x", "http://user:pa ss@127.0.0.1/x", "http://[::1/", "http://\udc80/"]
)
def test_an_address_that_is_none_is_a_bad_row(url):
    with pytest.raises(SampleError, match="cannot fetch"):
        read_bytes(url, "image")


def test_a_file_that_takes_too_long_or_is_too_large_is_a_bad_row(address, monkeypatch):
    monkeypatch.setattr(fetching, "LIMIT_BYTES", 100)
    with pytest.raises(SampleError, match="larger than 100 bytes; download it"):
        read_bytes(address + "/file", "image")
    monkeypatch.setattr(fetching, "LIMIT_SECONDS", -1.0)
    with pytest.raises(SampleError, match="cannot fetch"):
        read_bytes(address + "/file", "image")
    assert OddServer.asked["/file"] == 2
    with pytest.raises(SampleError, match="/nothing is empty"):
        read_bytes(address + "/nothing", "image")


def test_a_stream_of_rows_that_breaks_off_is_no_end_of_it(address):
    source, options = DataSource(path=address + "/short"), DataConfig(allow_urls=True)
    with pytest.raises(OSError, match="7240 bytes before"):
        list(open_stream_of(source, options, None).read(0, lambda: False))
