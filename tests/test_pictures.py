"""Pictures from people: whatever is given, the right pixels or one sentence that says what is wrong."""

import io
import socket
import struct
import urllib.request
import zlib
from email.message import Message
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
from PIL import Image

from libragrad_minimal import pictures
from libragrad_minimal.pictures import open_picture

RED = (220, 30, 40)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims `side` x `side` pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    end = chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + end


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_files_bytes_and_pictures_give_the_same(kind, tmp_path):
    picture = Image.new("RGB", (16, 12), RED)
    path = tmp_path / f"red.{kind.lower()}"
    path.write_bytes(encoded(picture, kind))
    opened = [open_picture(path), open_picture(str(path)), open_picture(path.read_bytes())]
    for one in opened:
        assert one.mode == "RGB" and one.size == (16, 12)
        assert np.abs(np.asarray(one, dtype=int) - RED).max() <= 12  # JPEG and WebP round
    assert np.array_equal(open_picture(picture), picture)


def test_greyscale_palette_and_cmyk():
    assert open_picture(Image.new("L", (8, 8), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert open_picture(Image.new("1", (8, 8), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert open_picture(Image.new("RGB", (8, 8), RED).quantize(2)).getpixel((0, 0)) == RED
    cyan = encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF")
    assert open_picture(cyan).getpixel((0, 0)) == (0, 255, 255)


def test_sixteen_bits_keep_their_shades():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    opened = np.asarray(open_picture(encoded(Image.fromarray(ramp))))[..., 0]
    assert np.abs(opened.astype(float) - ramp / 257).max() <= 1


def test_transparent_parts_are_white():
    half = Image.new("RGBA", (8, 8), (*RED, 0))
    half.paste((*RED, 255), (0, 0, 4, 8))
    opened = open_picture(encoded(half))
    assert opened.getpixel((0, 0)) == RED and opened.getpixel((7, 0)) == (255, 255, 255)


def test_a_picture_is_turned_as_its_camera_was_held():
    picture = Image.new("RGB", (16, 8), "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    assert open_picture(encoded(picture, exif=exif)).size == (8, 16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a picture"),
        (b"<html>no picture</html>", "not a picture"),
        (encoded(Image.effect_noise((64, 64), 50))[:600], "damaged"),
        (encoded(Image.new("RGB", (1, 1))), "1 x 1 pixels"),
        (encoded(Image.new("RGB", (4000, 2))), "4000 x 2 pixels"),
        (bomb(8_000), "8000 x 8000 pixels, more than"),
        (bomb(11_000), "11000 x 11000 pixels, more than"),  # Pillow would warn
        (bomb(60_000), "enormous"),  # Pillow would refuse
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_is_no_picture_gets_one_clear_error(content, message):
    with pytest.raises(ValueError, match=message):
        open_picture(content)


def test_missing_and_large_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        open_picture(tmp_path / "nowhere.png")
    with pytest.raises(FileNotFoundError, match="no file"):
        open_picture(tmp_path)
    large = tmp_path / "large.png"
    with open(large, "wb") as file:
        file.truncate(pictures.LARGEST_FILE + 1)
    with pytest.raises(ValueError, match="larger than 20 MB"):
        open_picture(large)


# --- addresses ---


@pytest.mark.parametrize("address", ["http://example.org/a.png", "file:///etc/passwd", "ftp://example.org/a.png"])
def test_only_https_is_opened(address):
    with pytest.raises(ValueError, match="not an https address"):
        open_picture(address)


def test_https_may_not_lead_elsewhere():
    request = urllib.request.Request("https://example.org/a.png")
    for target in ("http://example.org/a.png", "file:///etc/passwd"):
        with pytest.raises(ValueError, match="not an https address"):
            pictures._OnlyHttps().redirect_request(request, None, 302, "Found", Message(), target)


def answer_with(monkeypatch, answer):
    """Every address answers with these bytes, or raises this error."""

    def opened(self, request, timeout):
        assert timeout == pictures.PATIENCE
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", opened)


def test_an_address_gives_its_picture(monkeypatch):
    answer_with(monkeypatch, encoded(Image.new("RGB", (8, 8), RED)))
    assert open_picture("https://example.org/a.png").getpixel((0, 0)) == RED


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>", "not a picture"),
        (bytes(pictures.LARGEST_FILE + 1), "larger than 20 MB"),
        (HTTPError("https://example.org", 404, "Not Found", Message(), None), "answered 404 Not Found"),
        (URLError(socket.gaierror("no such host")), "no such host"),
        (TimeoutError("timed out"), "timed out"),
    ],
)
def test_a_bad_address_gets_one_clear_error(monkeypatch, answer, message):
    answer_with(monkeypatch, answer)
    with pytest.raises(ValueError, match=message):
        open_picture("https://example.org/a.png")
