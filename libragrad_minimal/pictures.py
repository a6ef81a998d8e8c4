"""Pictures from people: a file, an https address, an upload. One clear error for whatever isn't a picture."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .download import download
from .sentences import one_line

# Pillow knows more, and some of those run programs: EPS is drawn by Ghostscript, which executes what the file says.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
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
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture that can be read ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} claims to be enormous and was not opened: {error}") from error
    except Exception as error:  # Pillow raises nearly anything for a file that is broken
        raise _damaged(name, error) from error
    return _checked(picture, name)


def open_file(file: io.BytesIO | Path | str) -> Image.Image:
    """As Image.open, but only the formats promised.

    Raises:
        UnidentifiedImageError: it is none of those.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # our own limit is lower than what Pillow warns of, and an error
        return Image.open(file, formats=FORMATS)


def _damaged(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name} is a damaged picture: {one_line(error, 200) or type(error).__name__}")


def _checked(picture: Image.Image, name: str) -> Image.Image:
    width, height = picture.size
    if width * height > LARGEST_PICTURE:
        limit = f"{LARGEST_PICTURE // 1_000_000} million"
        raise ValueError(f"{name} has {width} x {height} pixels, more than {limit}; make it smaller first")
    if min(width, height) < SMALLEST_SIDE:
        raise ValueError(f"{name} has {width} x {height} pixels; it needs at least {SMALLEST_SIDE} on each side")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture.load()
            picture = _upright(picture)
    except Exception as error:
        raise _damaged(name, error) from error
    return _rgb(picture, name)


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # whatever a damaged note of the camera leads to; the picture itself is whole
        return picture


def _rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode.startswith(("I", "F")):  # 16 bits and more, which Pillow would cut at 255
        values = np.asarray(picture, dtype=np.float32)
        return Image.fromarray((values * (255 / _white(values, picture.mode, name))).astype(np.uint8)).convert("RGB")
    try:
        if not picture.has_transparency_data:
            return picture.convert("RGB")
        opaque = picture.convert("RGBA")
    except ValueError as error:
        raise ValueError(f"{name} has colours of a kind that can't be turned into RGB: {picture.mode}") from error
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), opaque).convert("RGB")


def _white(values: np.ndarray, mode: str, name: str) -> float:
    """The number that stands for white: a file of integers or floats doesn't say, and a wrong guess shows other shades.

    Floats from 0 to 1 and integers of 16 bits are what image libraries write; 0 to 255 is an ordinary picture that was
    stored with more bits. Between those lie 10- and 12-bit scans, measurements and high dynamic range.
    """
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinity, which is no shade: put numbers in their place")
    darkest, brightest = values.min(), values.max()
    if darkest >= 0:
        if mode.startswith("F") and brightest <= 1:
            return 1
        if brightest <= 255:
            return 255
        if mode.startswith("I") and 4095 < brightest <= 65535:
            return 65535
    raise ValueError(
        f"{name} holds numbers from {darkest:g} to {brightest:g}, and which of them is white can't be known: "
        "scale them to 0 ... 255 and save it with 8 bits"
    )
