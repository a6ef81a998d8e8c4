"""Pictures that hold more than 0 to 255: which numbers are black and white, or a refusal that names the range."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

DARKEST = 1 / 16  # of white; a picture that has nothing brighter was meant in other units
TAGS = {
    "BitsPerSample": 258,
    "PhotometricInterpretation": 262,
    "Orientation": 274,
    "MinSampleValue": 280,
    "MaxSampleValue": 281,
    "SampleFormat": 339,
    "SMinSampleValue": 340,
    "SMaxSampleValue": 341,
}
UNSIGNED, SIGNED = 1, 2  # formats of samples


@dataclass(frozen=True)
class Declared:
    """What a file says of its numbers, which Pillow doesn't heed."""

    black: float = 0
    white: float | None = None
    largest: int = 65535  # of 16 bits: with a sign, 32767
    dtype: str | None = None  # what Pillow takes for another: "int8" for uint8, "uint32" for int32
    inverted: bool = False  # zero is white
    orientation: int = 1
    cut: bool = False  # colours of 16 bits, of which Pillow keeps the upper 8
    bits: tuple[int, ...] = ()  # of each channel that mean something, in a PNG

    @classmethod
    def by(cls, picture: Image.Image, content: bytes = b"") -> Declared:
        """Must be asked before the picture is loaded.

        Args:
            content: of the picture's file; that of a PNG says what Pillow doesn't keep.
        """
        cut = any(";16" in str(tile.args) for tile in getattr(picture, "tile", []))
        bits = significant_bits(content) if picture.format == "PNG" else ()
        return replace(cls.of(getattr(picture, "tag_v2", {})), cut=cut, bits=bits)

    @classmethod
    def of(cls, tags: Mapping[int, Any]) -> Declared:
        """By a TIFF's tags; other pictures have none."""

        def first(*names: str) -> float | None:
            values = [tags[TAGS[name]] for name in names if TAGS[name] in tags]
            return float(np.asarray(values[0]).flat[0]) if values else None

        bits, form = first("BitsPerSample"), first("SampleFormat") or UNSIGNED
        white = first("SMaxSampleValue", "MaxSampleValue")
        if white is None and bits in (10, 12, 14):
            white = 2**bits - 1
        return cls(
            black=first("SMinSampleValue", "MinSampleValue") or 0,
            white=white,
            largest=32767 if form == SIGNED else 65535,
            dtype={(8, SIGNED): "int8", (32, UNSIGNED): "uint32"}.get((int(bits or 0), int(form))),
            inverted=first("PhotometricInterpretation") == 0,
            orientation=int(first("Orientation") or 1),
        )


def significant_bits(content: bytes) -> tuple[int, ...]:
    """What a PNG's sBIT says of each channel, grey or red, green and blue, then alpha; nothing without one."""
    place = 8
    while (kind := content[place + 4 : place + 8]) not in (b"sBIT", b"IDAT", b""):
        place += 12 + int.from_bytes(content[place : place + 4], "big")
    length = int.from_bytes(content[place : place + 4], "big")
    return tuple(content[place + 8 : place + 8 + length]) if kind == b"sBIT" else ()


def stretched(values: np.ndarray, bits: tuple[int, ...]) -> np.ndarray | None:
    """Numbers of few bits scaled to 8, where their writer didn't scale them to the file's depth, as PNG asks for.

    That shows: no number is larger than so many bits allow, and one is smaller than the least one that is scaled; or
    all would be black if they were scaled.

    Args:
        values: (H, W) or (H, W, channels), of 8 or 16 bits.
        bits: of each channel, or none.
    Returns:
        The same shape, 8 bits; None for numbers that are scaled.
    """
    depth, channels = 8 * values.dtype.itemsize, values.shape[2] if values.ndim == 3 else 1
    if len(bits) != channels or not all(0 < number <= depth for number in bits):
        return None
    white = 2 ** np.array(bits) - 1
    least = 2 ** (depth - np.array(bits))
    numbers = values.reshape(*values.shape[:2], channels)
    is_black = (white[: 1 if channels < 3 else 3] < DARKEST * 2**depth).all()
    if (numbers > white).any() or not (is_black or ((numbers > 0) & (numbers < least)).any()):
        return None
    shades = [(np.arange(largest + 1) * 255 / largest).round().astype(np.uint8) for largest in white]
    return np.stack([shades[c][numbers[..., c]] for c in range(channels)], axis=-1).reshape(values.shape)


def numbers_of_tiff(content: bytes) -> tuple[np.ndarray, Declared]:
    """The numbers of a TIFF's first picture as they are, (H, W) or (H, W, 3 or 4), and what it says of them.

    Raises:
        NotImplementedError: they are complex, of other channels, or packed; the message says which. Anything else that
            tifffile raises: the file is damaged.
    """
    import tifffile

    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page = file.pages.first
        unpacked = page.compression == 1 and page.nbytes <= len(content)  # what is packed may be a bomb
        if not unpacked or page.axes not in ("YX", "YXS", "SYX") or page.samplesperpixel not in (1, 3, 4):
            packing = tifffile.COMPRESSION(page.compression).name.lower()
            raise NotImplementedError(f"{page.dtype}, {page.samplesperpixel} a pixel, compression {packing}")
        if page.dtype is None or page.dtype.kind not in "iuf":
            raise NotImplementedError(str(page.dtype))
        values = page.asarray()
        tags = {tag.code: tag.value for tag in page.tags}
    if page.axes == "SYX":
        values = np.moveaxis(values, 0, -1)
    if values.ndim != len(page.axes) or values.shape[2:] not in ((), (3,), (4,)):
        raise ValueError("what it says of its size isn't true")
    return values, Declared.of(tags)


def as_bytes(values: np.ndarray, declared: Declared, name: str) -> Image.Image:
    """Numbers (H, W) or (H, W, 3 or 4) as a picture of 8 bits.

    Raises:
        ValueError: it can't be known which of them is white, or they would all be black; with the range found.
    """
    black, white = _range(values, declared, name)
    shades = (values.astype(np.float32) - black) * (255 / (white - black))
    return Image.fromarray((255 - shades if declared.inverted else shades).astype(np.uint8))


def bright_enough(picture: Image.Image, name: str) -> Image.Image:
    """A picture of 8 bits.

    Raises:
        ValueError: it looks black and isn't: a mask of small numbers, or one that was meant in other units.
    """
    brightest = int(np.max(picture.getextrema()))
    if 0 < brightest < DARKEST * 255:
        raise ValueError(
            f"{name} holds no number above {brightest} of 255 and would be black: scale its numbers to 0 ... 255"
        )
    return picture


def _range(values: np.ndarray, declared: Declared, name: str) -> tuple[float, float]:
    """The numbers that stand for black and white: those that the file declares, else those that there's no doubt about.

    Floats from 0 to 1 and integers of 16 bits are what image libraries write; 0 to 255 is an ordinary picture that was
    stored with more bits. Between those lie 10- and 12-bit scans, measurements and high dynamic range.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError(f"{name} holds nothing but NaN and infinity, which are no shades: put numbers in their place")
    darkest, brightest = float(finite.min()), float(finite.max())
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
        if values.dtype.kind == "f" and brightest <= 1:
            white = 1.0
        elif brightest <= 255 and (values.dtype.kind in "iu" or brightest > 127):  # light in floats may be of any size
            white = 255.0
        elif values.dtype.kind in "iu" and 4095 < brightest <= declared.largest:
            white = float(declared.largest)
    cure = "scale them to 0 ... 255 and save it with 8 bits"
    if white is None:
        said = f", and its file says {declared.black:g} to {declared.white:g}" if declared.white is not None else ""
        raise ValueError(f"{found}{said}, and which of them is white can't be known: {cure}")
    if black < brightest < black + DARKEST * (white - black):
        raise ValueError(f"{found}, of {black:g} to {white:g}, and would be black: {cure}")
    return black, white
