"""Pictures from people: a file, an https address, an upload. One clear error for whatever isn't a picture."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .download import download
from .sentences import one_line

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
    except UnidentifiedImageError as error:
        if content[:4] in (b"II*\0", b"MM\0*"):
            kinds = "colours in floats or with a sign, say"
            raise ValueError(f"{name} is a TIFF of a kind that isn't read ({kinds}): save it with 8 bits") from error
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
            declared = Declared.by(picture)
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


@dataclass(frozen=True)
class Declared:
    """What a file says of its numbers, which Pillow doesn't heed."""

    black: float = 0
    white: float | None = None
    signed_bytes: bool = False
    cut: bool = False  # colours of 16 bits, of which Pillow keeps the upper 8

    @classmethod
    def by(cls, picture: Image.Image) -> Declared:
        """Must be asked before the picture is loaded."""
        tags = getattr(picture, "tag_v2", {})

        def first(*names: str) -> float | None:
            values = [tags[TAGS[name]] for name in names if TAGS[name] in tags]
            return float(np.asarray(values[0]).flat[0]) if values else None

        bits = first("BitsPerSample")
        white = first("SMaxSampleValue", "MaxSampleValue")
        if white is None and bits in (10, 12, 14):
            white = 2**bits - 1
        return cls(
            black=first("SMinSampleValue", "MinSampleValue") or 0,
            white=white,
            signed_bytes=bits == 8 and first("SampleFormat") == 2,
            cut=any(";16" in str(tile.args) for tile in getattr(picture, "tile", [])),
        )


TAGS = {
    "BitsPerSample": 258,
    "MinSampleValue": 280,
    "MaxSampleValue": 281,
    "SampleFormat": 339,
    "SMinSampleValue": 340,
    "SMaxSampleValue": 341,
}


def _rgb(picture: Image.Image, declared: Declared, name: str) -> Image.Image:
    if picture.mode.startswith(("I", "F")) or declared.signed_bytes:  # more than 0 to 255, where Pillow would cut
        values = np.asarray(picture)
        values = (values.view(np.int8) if declared.signed_bytes else values).astype(np.float32)
        black, white = _range(values, picture.mode, declared, name)
        return Image.fromarray(((values - black) * (255 / (white - black))).astype(np.uint8)).convert("RGB")
    if declared.cut and picture.mode in ("LA", "RGB", "RGBA"):
        brightest = int(np.asarray(picture.convert("RGB")).max()) * 256 + 255
        if brightest < 4096:
            raise ValueError(
                f"{name} holds no number above {brightest} of 65535 and would be black: scale its 10 or 12 bits to "
                "0 ... 255 and save it with 8 bits"
            )
    try:
        if not picture.has_transparency_data:
            return picture.convert("RGB")
        opaque = picture.convert("RGBA")
    except ValueError as error:
        raise ValueError(f"{name} has colours of a kind that can't be turned into RGB: {picture.mode}") from error
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), opaque).convert("RGB")


DARKEST = 0.05  # of white; a picture that has nothing brighter was meant in other units


def _range(values: np.ndarray, mode: str, declared: Declared, name: str) -> tuple[float, float]:
    """The numbers that stand for black and white: those that the file declares, else those that there's no doubt about.

    Floats from 0 to 1 and integers of 16 bits are what image libraries write; 0 to 255 is an ordinary picture that was
    stored with more bits. Between those lie 10- and 12-bit scans, measurements and high dynamic range.
    """
    finite = values[np.isfinite(values)]
    darkest, brightest = (finite.min(), finite.max()) if finite.size else (np.nan, np.nan)
    found = f"{name} holds numbers from {darkest:g} to {brightest:g}"
    if finite.size < values.size:
        raise ValueError(
            f"{found}, and {values.size - finite.size} of {values.size} are NaN or infinity, which is no shade: put "
            "numbers in their place"
        )
    black, white = 0.0, None
    if declared.white is not None:
        if declared.black <= darkest and brightest <= declared.white and declared.black < declared.white:
            black, white = declared.black, declared.white
    elif darkest >= 0:
        if mode.startswith("F") and brightest <= 1:
            white = 1.0
        elif brightest <= 255:
            white = 255.0
        elif mode.startswith("I") and 4095 < brightest <= 65535:
            white = 65535.0
    cure = "scale them to 0 ... 255 and save it with 8 bits"
    if white is None:
        said = f", and its file says {declared.black:g} to {declared.white:g}" if declared.white is not None else ""
        raise ValueError(f"{found}{said}, and which of them is white can't be known: {cure}")
    if black < brightest < black + DARKEST * (white - black):
        raise ValueError(f"{found}, of {black:g} to {white:g}, and would be black: {cure}")
    return black, white
