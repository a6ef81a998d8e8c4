"""Pictures from people: a file, an https address, an upload. One clear error for whatever isn't a picture."""

import io
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

LARGEST_FILE = 20_000_000  # bytes
LARGEST_PICTURE = 50_000_000  # pixels; a decompression bomb has more, in a file of a few kilobytes
SMALLEST_SIDE = 8  # pixels; with fewer there are no regions to tell apart
PATIENCE = 20  # seconds, for a server to answer


def open_picture(source: str | Path | bytes | Image.Image) -> Image.Image:
    """A picture as RGB, upright as its camera held it, transparent parts on white.

    Args:
        source: the path of a file, an address that begins with https://, the bytes of a file (an upload), or a PIL
            image; greyscale, palette, CMYK and transparent pictures will do.
    Returns:
        The picture at its own size in pixels.
    Raises:
        ValueError: what can't be read or fetched, is too large or too small.
        FileNotFoundError: a missing file.
    """
    if isinstance(source, Image.Image):
        return _checked(source, "the picture")
    if isinstance(source, bytes):
        return _decoded(source, "the upload")
    if "://" in str(source):
        return _decoded(_download(str(source)), str(source))
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give a path, or an address that begins with https://")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(_too_large(str(path)))
    return _decoded(path.read_bytes(), str(path))


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """An https address may not lead anywhere else."""

    def redirect_request(self, request, file, code, message, headers, address):
        _require_https(address)
        return super().redirect_request(request, file, code, message, headers, address)


def _require_https(address: str) -> None:
    if urlsplit(address).scheme != "https":
        raise ValueError(f"{address} is not an https address; only those are opened")


def _download(address: str) -> bytes:
    _require_https(address)
    request = urllib.request.Request(address, headers={"User-Agent": "libragrad-minimal"})  # some servers demand a name
    try:
        with urllib.request.build_opener(_OnlyHttps).open(request, timeout=PATIENCE) as answer:
            content = answer.read(LARGEST_FILE + 1)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{address} can't be fetched: the server answered {error.code} {error.reason}") from error
    except OSError as error:
        raise ValueError(f"{address} can't be fetched: {getattr(error, 'reason', error)}") from error
    if len(content) > LARGEST_FILE:
        raise ValueError(_too_large(address))
    return content


def _too_large(name: str) -> str:
    return f"{name} is larger than {LARGEST_FILE // 1_000_000} MB; make the picture smaller first"


def _decoded(content: bytes, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower, and an error
            picture = Image.open(io.BytesIO(content))
        return _checked(picture, name)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} claims to be enormous and was not opened: {error}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture that can be read (JPEG, PNG, WebP, GIF, BMP, TIFF)") from error
    except (OSError, SyntaxError, EOFError) as error:  # Pillow's ways of saying that a file is broken
        raise ValueError(f"{name} is a damaged picture: {error}") from error


def _checked(picture: Image.Image, name: str) -> Image.Image:
    width, height = picture.size
    if width * height > LARGEST_PICTURE:
        limit = f"{LARGEST_PICTURE // 1_000_000} million"
        raise ValueError(f"{name} has {width} x {height} pixels, more than {limit}; make it smaller first")
    if min(width, height) < SMALLEST_SIDE:
        raise ValueError(f"{name} has {width} x {height} pixels; it needs at least {SMALLEST_SIDE} on each side")
    return _rgb(ImageOps.exif_transpose(picture))


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):  # 16 bits and more, which Pillow would cut at 255
        values = np.asarray(picture, dtype=np.float32)
        brightest = 255 if values.max() <= 255 else max(65535, values.max())
        return Image.fromarray((values.clip(0) * (255 / brightest)).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    opaque = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), opaque).convert("RGB")
