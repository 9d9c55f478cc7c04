"""Small pictures of media files for pages."""

from __future__ import annotations

import base64
import io
import struct
from pathlib import Path

import pytest
from PIL import Image

from omniloom.tools.thumbnails import make_thumbnail
from tests.unit.media_files import add_captions, write_streams


def test_a_thumbnail_is_as_upright_as_the_picture_is_trained_on(tmp_path: Path) -> None:
    photo = Image.new("RGB", (300, 100), "red")
    photo.paste((0, 0, 255), (0, 0, 20, 100))  # blue on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    photo.save(tmp_path / "photo.jpg", exif=exif)
    thumbnail = make_thumbnail(tmp_path / "photo.jpg")
    assert thumbnail is not None
    assert thumbnail.picture is not None
    picture = Image.open(io.BytesIO(base64.b64decode(thumbnail.picture.partition(",")[2])))
    assert picture.height == 3 * picture.width
    red, _, blue = picture.convert("RGB").getpixel((picture.width // 2, 2))
    assert blue > 200 > 60 > red


@pytest.mark.parametrize("seconds", [8, 9])  # shown whole, and by seeking
def test_a_video_whose_captions_begin_within_it_is_shown(tmp_path: Path, seconds: int) -> None:
    path = write_streams(tmp_path / "a.flv", "flv", video_seconds=seconds, sound_seconds=seconds)
    before = make_thumbnail(path)
    add_captions(path)
    assert before is not None
    assert make_thumbnail(path) == before


@pytest.mark.parametrize("tag", [0x0100, 0x011A])  # the width, the resolution
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_picture_whose_exif_cannot_be_written_anew_has_no_thumbnail(tmp_path: Path, name: str, tag: int) -> None:
    """It is a bad row for the same reason, which the report of the run tells."""
    turned, words = struct.pack("<HHII", 0x0112, 3, 1, 6), struct.pack("<HHI4s", tag, 2, 4, b"AAA\0")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + turned + words + bytes(4)
    Image.new("RGB", (60, 40)).save(tmp_path / name, exif=exif)
    assert make_thumbnail(tmp_path / name) is None
