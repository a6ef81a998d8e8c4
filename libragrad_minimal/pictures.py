"""Pictures from people: a file, an https address, an upload. One clear error for whatever isn't a picture."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .download import download
from .sentences import one_line
from .shades import TAGS, Declared, as_bytes, bright_enough, numbers_of_tiff, stretched

# Pillow knows more, and some of those run programs: EPS is drawn by Ghostscript, which executes what the file says.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # that their files have
LARGEST_FILE = 20_000_000  # bytes
LARGEST_PICTURE = 50_000_000  # pixels; a decompression bomb has more, in a file of a few kilobytes
SMALLEST_SIDE = 8  # pixels; with fewer there are no regions to tell apart


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
        return _decoded(download(str(source), LARGEST_FILE), str(source))
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give a path, or an address that begins with https://")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(_too_large(str(path)))
    return _decoded(path.read_bytes(), str(path))


def _too_large(name: str) -> str:
    return f"{name} is larger than {LARGEST_FILE // 1_000_000} MB; make the picture smaller first"


def _decoded(content: bytes, name: str) -> Image.Image:
    try:
        picture = open_file(io.BytesIO(content))
        declared = Declared.by(picture, content)
    except UnidentifiedImageError as error:
        if content[:4] in (b"II*\0", b"MM\0*"):
            return _tiff(content, name)
        raise ValueError(f"{name} is not a picture that can be read ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} claims to be enormous and was not opened: {error}") from error
    except Exception as error:  # Pillow raises nearly anything for a file that is broken
        raise _damaged(name, error) from error
    if declared.cut and declared.white is not None:
        return _tiff(content, name)
    return _checked(picture, name, content)


def open_file(file: io.BytesIO | Path | str) -> Image.Image:
    """As Image.open, but only the formats promised.

    Raises:
        UnidentifiedImageError: it is none of those.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # our own limit is lower than what Pillow warns of, and an error
        return Image.open(file, formats=FORMATS)


def _tiff(content: bytes, name: str) -> Image.Image:
    """A TIFF that Pillow can't read, or not all bits of: colours in floats, with a sign, of 12 bits in 16."""
    try:
        values, declared = numbers_of_tiff(content)
    except NotImplementedError as error:
        raise ValueError(f"{name} is a TIFF of a kind that isn't read ({error}): save it with 8 bits") from error
    except Exception as error:
        raise _damaged(name, error) from error
    _check_size(values.shape[1], values.shape[0], name)
    picture = as_bytes(values, declared, name)
    picture.getexif()[TAGS["Orientation"]] = declared.orientation
    return _opaque(_upright(picture), name)


def _damaged(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name} is a damaged picture: {one_line(error, 200) or type(error).__name__}")


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > LARGEST_PICTURE:
        limit = f"{LARGEST_PICTURE // 1_000_000} million"
        raise ValueError(f"{name} has {width} x {height} pixels, more than {limit}; make it smaller first")
    if min(width, height) < SMALLEST_SIDE:
        raise ValueError(f"{name} has {width} x {height} pixels; it needs at least {SMALLEST_SIDE} on each side")


def _checked(picture: Image.Image, name: str, content: bytes = b"") -> Image.Image:
    _check_size(*picture.size, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            declared = Declared.by(picture, content)
            picture.load()
            picture = _upright(picture)
    except Exception as error:
        raise _damaged(name, error) from error
    return _rgb(picture, declared, name)


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # whatever a damaged note of the camera leads to; the picture itself is whole
        return picture


def _rgb(picture: Image.Image, declared: Declared, name: str) -> Image.Image:
    scaled = stretched(np.asarray(picture), declared.bits) if declared.bits else None
    if scaled is not None:
        return _opaque(Image.fromarray(scaled), name)
    few_bits = declared.white is not None and declared.white < 128 and picture.mode in ("L", "RGB")
    if few_bits and np.max(picture.getextrema()) <= declared.white:
        return as_bytes(np.asarray(picture), declared, name).convert("RGB")
    if picture.mode.startswith(("I", "F")) or declared.dtype:  # more than 0 to 255, where Pillow would cut
        values = np.asarray(picture)
        return as_bytes(values.view(declared.dtype) if declared.dtype else values, declared, name).convert("RGB")
    if declared.cut and picture.mode in ("LA", "RGB", "RGBA"):
        brightest = int(np.asarray(picture.convert("RGB")).max()) * 256 + 255
        if brightest < 4096:
            raise ValueError(
                f"{name} holds no number above {brightest} of 65535 and would be black: scale its 10 or 12 bits to "
                "0 ... 255 and save it with 8 bits"
            )
    return bright_enough(_opaque(picture, name), name)


def _opaque(picture: Image.Image, name: str) -> Image.Image:
    try:
        if not picture.has_transparency_data:
            return picture.convert("RGB")
        opaque = picture.convert("RGBA")
    except ValueError as error:
        raise ValueError(f"{name} has colours of a kind that can't be turned into RGB: {picture.mode}") from error
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), opaque).convert("RGB")
