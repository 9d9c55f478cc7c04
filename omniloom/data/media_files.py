"""Opening media safely: limits, known formats only, and one kind of error for whatever a file does.

Owns the border to pillow and av, both imported only when a clip is opened. What is read through it is `media_headers`'
and `media_decode`'s. Nothing that a data set holds is executed, and no file makes a decoder open another one: formats
that run programs (EPS) or name further files (playlists) are not on the lists of what is opened.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omniloom.config import DataConfig
from omniloom.data.fetching import FAULTS, fetch
from omniloom.data.row_media import decode_data_uri
from omniloom.data.stated_sizes import missing_bytes
from omniloom.types import MediaKind, MediaSource, MissingFile, SampleError

if TYPE_CHECKING:
    from av.container import InputContainer
    from PIL.Image import Image

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")
CONTAINER_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,obu,ivf,flv,asf,gif,apng,mxf,dv,nut,"
    "wav,w64,aiff,au,caf,flac,mp3,ogg,aac,ac3,eac3,amr,amrnb,amrwb,wv,tta,ape,voc,nistsphere,dsf"
)
HEAD_BYTES = 4096
LFS_POINTER = b"version https://git-lfs"  # what a clone without Git LFS has in place of a large file


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """What a run refuses before it is decoded (`limit_*` of `data`), and the rate at which sound is counted."""

    data: DataConfig = field(default_factory=DataConfig)
    sampling_rate: int = 16000  # the feature extractor's


def name_of(file: str | bytes) -> str:
    """A file's name for messages."""
    if isinstance(file, bytes):
        return f"<{len(file)} embedded bytes>"
    return file if len(file) < 300 else f"{file[:60]}..."


def clip_file(source: MediaSource, kind: MediaKind) -> str | bytes:
    """The one file of a clip that is not a list of frames."""
    file = source.path if source.path is not None else source.data
    if file is None:
        raise SampleError(kind, "the clip names no file")
    return file


def read_bytes(file: str | bytes, kind: MediaKind) -> bytes | str:
    """Embedded bytes, a data URI or a URL as bytes; a path stays a path. Raises: SampleError."""
    if isinstance(file, bytes):
        return file
    if file.startswith("data:"):
        return decode_data_uri(file, kind)
    if not file.lower().startswith(("http://", "https://")):
        return os.path.abspath(file)  # an absolute path is never taken for a protocol
    try:
        if data := fetch(file):
            return data
    except FAULTS as error:
        raise SampleError(kind, f"cannot fetch {name_of(file)}: {' '.join(str(error).split())}") from None
    raise SampleError(kind, f"{name_of(file)} is empty")


def _lies_here(path: str) -> str:
    """A hint where a file that is missing lies below the working directory, which is where some rows start from."""
    parts = path.split(os.sep)
    tails = (os.sep.join(parts[start:]) for start in range(1, len(parts)))
    found = next((tail for tail in tails if os.path.isfile(tail)), None)
    return "" if found is None else f"; {found} is in the working directory (data.media_dir is where such paths start)"


def size_of(data: bytes | str, kind: MediaKind) -> int:
    """Size in bytes. Raises: SampleError for a file that is missing, empty or no file."""
    if isinstance(data, bytes):
        size = len(data)
    else:
        try:
            if not os.path.isfile(data):
                if os.path.isdir(data):
                    raise SampleError(kind, f"{name_of(data)} is a directory, not a file")
                raise MissingFile(kind, data, _lies_here(data))
            size = os.path.getsize(data)
        except OSError as error:
            raise SampleError(kind, f"cannot read {name_of(data)}: {error.strerror or error}") from None
    if not size:
        raise SampleError(kind, f"{name_of(data)} is empty")
    if size < 1024 and head_of(data, kind).startswith(LFS_POINTER):
        raise SampleError(kind, f"{name_of(data)} is a pointer of Git LFS, not the file itself; run git lfs pull")
    return size


def head_of(data: bytes | str, kind: MediaKind) -> bytes:
    """How a file begins. Raises: SampleError."""
    if isinstance(data, bytes):
        return data[:HEAD_BYTES]
    try:
        with open(data, "rb") as handle:
            return handle.read(HEAD_BYTES)
    except OSError as error:
        raise SampleError(kind, f"cannot read {name_of(data)}: {error.strerror or error}") from None


@contextmanager
def open_container(file: str | bytes, kind: MediaKind) -> Iterator[InputContainer]:
    """An av container over a file, URL, data URI or bytes. Raises: SampleError, also for what its use raises."""
    import av

    data = read_bytes(file, kind)
    size_bytes = size_of(data, kind)
    target: Any = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        with io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb") as opened:
            head = opened.read(HEAD_BYTES)
            missing = missing_bytes(opened, head, size_bytes)
        if missing:
            reason = f"{missing} of its {size_bytes + missing} bytes are missing"
            raise SampleError(kind, f"{name_of(file)} is truncated: {reason}")
        options = {"format_whitelist": CONTAINER_FORMATS}
        if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
            options["probesize"] = "4096"  # by default av reads megabytes of PCM to see whether they are DTS
            options["max_size"] = "16384"  # bytes of a packet, where 4096 is usual
        try:
            container = av.open(target, options=options, metadata_errors="replace")
        except av.error.ArgumentError:  # what is not on the list
            reason = "is of no format of video or sound that is opened here; a picture is no video"
            raise SampleError(kind, f"{name_of(file)} {reason}") from None
        with container:
            yield container
    except SampleError:
        raise
    except av.error.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        raise SampleError(kind, f"cannot decode {name_of(file)}: {reason[0].lower()}{reason[1:]}") from None
    except (OSError, ValueError, EOFError, MemoryError, NotImplementedError) as error:
        raise SampleError(kind, f"cannot decode {name_of(file)}: {error}") from None


def find_stream(container: InputContainer, stream_kind: str, kind: MediaKind, file: str | bytes) -> Any:
    """The first video or audio stream, cover art left aside. Raises: SampleError where there is none."""
    from av.stream import Disposition

    for stream in container.streams:
        if stream.type == stream_kind and not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:
                raise SampleError(kind, f"{name_of(file)} has a {stream_kind} stream of an unknown codec")
            return stream
    raise SampleError(kind, f"{name_of(file)} has no {stream_kind} stream")


def check_pixels(file: str | bytes, kind: MediaKind, width: int, height: int, limits: MediaLimits) -> None:
    """Raises: SampleError for a picture over the limit."""
    limit = limits.data.image.limit_pixels
    if width * height > limit:
        reason = f"has {width}x{height} pixels, more than the limit of {limit} (data.image.limit_pixels)"
        raise SampleError(kind, f"{name_of(file)} {reason}")


@contextmanager
def open_image(file: str | bytes, kind: MediaKind, limits: MediaLimits) -> Iterator[Image]:
    """A pillow image, not yet decoded, within the pixel limit. Raises: SampleError, also for what its use raises."""
    import PIL
    from PIL import Image

    data = read_bytes(file, kind)
    size_of(data, kind)
    target: Any = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit decides
            warnings.simplefilter("ignore", UserWarning)  # corrupt EXIF and the like
            with Image.open(target, formats=IMAGE_FORMATS) as image:
                check_pixels(file, kind, *image.size, limits)
                yield image
    except SampleError:
        raise
    except PIL.UnidentifiedImageError:
        raise SampleError(kind, f"{name_of(file)} is no image that can be read ({', '.join(IMAGE_FORMATS)})") from None
    except Image.DecompressionBombError as error:
        raise SampleError(kind, f"{name_of(file)}: {error}") from None
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, LookupError, ArithmeticError, MemoryError) as error:
        raise SampleError(kind, f"cannot decode {name_of(file)}: {error}") from None
    except (struct.error, zlib.error, RuntimeError) as error:  # the last are AVIF's
        raise SampleError(kind, f"cannot decode {name_of(file)}: {error}") from None
