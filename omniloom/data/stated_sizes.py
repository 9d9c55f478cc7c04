"""How many bytes of a media file are missing by its own account: decoders take what there is for the whole.

Formats state the size of the file (RIFF, AIFF, au, w64, ASF, Matroska, MP3 with a Xing header) or of the block that its
end falls into (mp4, Ogg). Of others, and where a live writer could not fill it in, nothing is known.
"""

from __future__ import annotations

from functools import partial
from typing import BinaryIO

_HEAD_BYTES = 4096
_SLACK_BYTES = 1024  # by which writers miscount
_UNFILLED_BYTES = 0x7FFFF000  # sizes of 32 bits from here on were to be filled in at the end and never were
_W64 = b"riff" + bytes.fromhex("2e91cf11a5d628db04c10000")
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_EBML, _SEGMENT = bytes.fromhex("1a45dfa3"), bytes.fromhex("18538067")
_BOXES_OF_MEDIA = (b"moov", b"moof", b"mdat")
_BOXES = (*_BOXES_OF_MEDIA, b"ftyp", b"styp", b"sidx", b"free", b"skip", b"wide", b"uuid", b"mfra", b"emsg", b"prft")
_LARGEST_PAGE = 65307  # of Ogg
_little, _big = partial(int.from_bytes, byteorder="little"), partial(int.from_bytes, byteorder="big")


def missing_bytes(file: BinaryIO, head: bytes, size: int) -> int:
    """Of a file that has `size` bytes and begins with `head`; 0 where nothing is known to be missing."""
    if head.startswith(b"OggS"):
        return max(0, _end_of_last_page(file, size) - size)
    if head[4:8] in _BOXES:
        return max(0, _end_of_boxes(file, size) - size)
    if head.startswith(_EBML):
        return max(0, _end_of_segment(head.ljust(_HEAD_BYTES, b"\0")) - size)
    missing = _stated_bytes(file, head.ljust(_HEAD_BYTES, b"\0")) - size
    return missing if missing > _SLACK_BYTES else 0


def _stated_bytes(file: BinaryIO, head: bytes) -> int:
    match head[:4]:
        case b"RIFF":
            return _filled(8 + _little(head[4:8]))
        case b"RF64" | b"BW64":
            return 8 + _little(head[20:28])
        case b"FORM":
            return _filled(8 + _big(head[4:8]))
        case b".snd":
            return _filled(_big(head[4:8]) + _big(head[8:12]))
        case _ if head.startswith(_W64):
            return _little(head[16:24])
        case _ if head.startswith(_ASF):
            return _size_of_asf(head)
    return _end_of_mp3(file, head)


def _filled(stated: int) -> int:
    return stated if stated < _UNFILLED_BYTES else 0


def _size_of_asf(head: bytes) -> int:
    at = head.find(_ASF_FILE_PROPERTIES)
    if at < 0 or _little(head[at + 88 : at + 92]) & 1:  # a broadcast
        return 0
    return _little(head[at + 40 : at + 48])


def _end_of_segment(head: bytes) -> int:
    """Where the one large element of a Matroska file ends. Source: RFC 8794, section 6."""
    at = 4
    header, width = _ebml_size(head, at)
    at += width + header
    if head[at : at + 4] != _SEGMENT:
        return 0
    segment, width = _ebml_size(head, at + 4)
    return at + 4 + width + segment if segment else 0


def _ebml_size(head: bytes, at: int) -> tuple[int, int]:
    """A size and its own width in bytes; a size that is not known is 0."""
    width = 9 - _big(head[at : at + 1]).bit_length()
    most = (1 << 7 * width) - 1
    size = _big(head[at : at + width]) & most
    return (0 if size == most else size), width


def _end_of_mp3(file: BinaryIO, head: bytes) -> int:
    """By the Xing header in the first frame, which follows any ID3 tags."""
    start = 0
    while head[:3] == b"ID3":
        start += 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        file.seek(start)
        head = file.read(_HEAD_BYTES).ljust(_HEAD_BYTES, b"\0")
    at = max(head.find(word, 0, 64) for word in (b"Xing", b"Info"))
    if at < 0 or head[0] != 0xFF or not head[at + 7] & 2:
        return 0
    place = at + 8 + 4 * (head[at + 7] & 1)  # behind the number of frames, if that is stated
    return start + _big(head[place : place + 4])


def _end_of_last_page(file: BinaryIO, size: int) -> int:
    """Source: RFC 3533, section 6."""
    start = max(0, size - _LARGEST_PAGE)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"OggS")
    page = tail[at : at + 27].ljust(27, b"\0") if at >= 0 else bytes(27)
    return start + at + 27 + page[26] + sum(tail[at + 27 : at + 27 + page[26]]) if at >= 0 else 0


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    """Where the last box of an mp4 that holds media or tells of them ends."""
    at = end = 0
    while at < size:
        file.seek(at)
        head = file.read(16)
        length = _big(head[8:16]) if head[:4] == b"\0\0\0\1" else _big(head[:4])
        if head[4:8] not in _BOXES or length < 8:  # what was appended; or a box up to the end
            break
        at += length
        end = at if head[4:8] in _BOXES_OF_MEDIA else end
    return end
