"""Small pictures of media files for pages."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from omniloom.tools.thumbnails import make_thumbnail


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
