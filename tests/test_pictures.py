"""Pictures from people: whatever is given, the right pixels or one sentence that says what is wrong."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, TiffImagePlugin, TiffTags

from libragrad_minimal import pictures, shades
from libragrad_minimal.pictures import open_picture

RED = (220, 30, 40)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png(header: bytes, pixels: bytes, *others: tuple[bytes, bytes]) -> bytes:
    """A PNG by its chunks: the header's content, what is to be packed, and others in between by name and content."""
    chunks = [(b"IHDR", header), *others, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    told = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(told)


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims `side` x `side` pixels."""
    return png(struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), bytes(1000))


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


@pytest.mark.parametrize("bits", [5, 6])
@pytest.mark.parametrize("filled", ["with zeros", "with the upper bits again"])
def test_a_png_that_declares_fewer_bits_goes_from_black_to_white(bits, filled):
    """The PNG specification (sBIT): numbers of few bits are stored scaled to eight, the low bits filled either way."""
    few = np.arange(2**bits, dtype=np.uint8)
    stored = few << (8 - bits) if filled == "with zeros" else few << (8 - bits) | few >> (2 * bits - 8)
    rows = b"".join(b"\0" + stored.tobytes() for _ in range(8))
    header = struct.pack(">IIBBBBB", len(few), 8, 8, 0, 0, 0, 0)
    shades = np.asarray(open_picture(png(header, rows, (b"sBIT", bytes([bits])))))[0, :, 0].astype(int)
    assert np.abs(shades - np.linspace(0, 255, 2**bits)).max() < 2 ** (8 - bits)


def png_of(values: np.ndarray, bits: tuple[int, ...]) -> bytes:
    """Numbers (H, W, channels) of 8 or 16 bits as they are, in a file that declares fewer."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(values.dtype.newbyteorder(">")).tobytes() for row in values)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 8 * values.itemsize, kind, 0, 0, 0)
    return png(header, rows, (b"sBIT", bytes(bits)))


@pytest.mark.parametrize("bits", [(5,), (4,), (5, 6, 5), (5, 5, 5), (3, 8), (6, 6, 6, 8), (10,), (12,)])
def test_a_png_whose_numbers_break_what_it_declares_is_no_darker_for_it(bits):
    """Numbers of few bits that its writer didn't scale; alpha has all its bits."""
    dtype = np.uint16 if max(bits) > 8 else np.uint8
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    values = np.stack([(ramp * (2**number - 1)).round() for number in bits], axis=-1).astype(dtype)
    if len(bits) in (2, 4):
        values[..., -1] = 255
    shades = np.asarray(open_picture(png_of(values, bits))).astype(int)
    assert np.abs(shades - 255 * ramp[..., None]).max() <= max(1, 255 / (2 ** min(bits) - 1))


def test_a_dark_png_that_keeps_to_what_it_declares_stays_dark():
    """Scaled numbers of 5 bits are 0, 8, 16, 24 and so on: these are dark and nothing else."""
    values = np.array([0, 8, 16, 24] * 16, np.uint8).reshape(8, 8, 1)
    assert np.array_equal(np.asarray(open_picture(png_of(values, (5,))))[..., :1], values)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_a_mask_of_small_numbers_is_refused_with_the_range_found(kind, mode, tmp_path):
    small = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 16).convert(mode)
    if mode == "P":
        small.putpalette([shade for number in range(256) for shade in [number // 16] * 3])
        small.putdata(range(0, 256, 4))
    small.save(tmp_path / "mask", kind, **({"lossless": True} if kind == "WEBP" else {}))
    with pytest.raises(ValueError, match="holds no number above 15 of 255 and would be black"):
        open_picture(tmp_path / "mask")
    black = Image.new("RGB", (8, 8))
    assert np.asarray(open_picture(black)).max() == 0, "what is black and nothing else may be"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_tiff_of_8_bits_that_declares_fewer_is_scaled_by_that(channels):
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) // 2
    picture = Image.fromarray(np.stack([ramp] * 3, axis=-1) if channels == 3 else ramp)
    content = io.BytesIO()
    picture.save(content, "TIFF", tiffinfo={281: 31})
    shades = np.asarray(open_picture(content.getvalue()))[..., 0]
    assert np.abs(shades - ramp * 255.0 / 31).max() <= 1


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


def test_an_address_gives_its_picture(monkeypatch):
    monkeypatch.setattr(pictures, "download", lambda address, largest: encoded(Image.new("RGB", (8, 8), RED)))
    assert open_picture("https://example.org/a.png").getpixel((0, 0)) == RED


# --- strangers' files ---


def test_postscript_is_not_run(monkeypatch):
    """Pillow draws EPS by Ghostscript, which runs the program that such a file is."""
    monkeypatch.setattr("subprocess.check_call", lambda *args, **options: pytest.fail("a program was started"))
    file = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(file)).format == "EPS"
    with pytest.raises(ValueError, match="not a picture that can be read"):
        open_picture(file)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_only_promised_formats():
    """Whatever else this Pillow writes and reads is refused."""
    Image.init()
    others = []
    for kind in sorted(Image.SAVE):
        try:
            content = encoded(Image.new("RGB", (16, 16), RED), kind)
            known = Image.open(io.BytesIO(content)).format
        except (OSError, ValueError, KeyError, RuntimeError):
            continue  # not with this Pillow, not from a picture alone, or write-only
        if known in pictures.FORMATS:
            open_picture(content)
        else:
            others.append(kind)
            with pytest.raises(ValueError, match="not a picture that can be read"):
                open_picture(content)
    assert len(others) > 5, others


def test_one_place_opens_pictures():
    package = Path(pictures.__file__).parent
    calls = {path.name: path.read_text().count("Image.open(") for path in package.rglob("*.py")}
    assert {name for name, count in calls.items() if count} == {"pictures.py"}
    assert calls["pictures.py"] == 1


def tiff(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values), "TIFF")


SHADES = np.linspace(0, 250, 64).reshape(8, 8).round().astype(np.float32)


@pytest.mark.parametrize(
    "values",
    [SHADES / 255, SHADES, SHADES.astype(np.uint16), SHADES.astype(np.int32), (SHADES * 257).astype(np.uint16)],
    ids=["floats to 1", "floats to 255", "16 bits to 255", "32 bits to 255", "16 bits"],
)
def test_numbers_that_mean_one_thing(values):
    opened = np.asarray(open_picture(tiff(values)))[..., 0]
    assert np.abs(opened - SHADES).max() <= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (SHADES / 127.5 - 1, "numbers from -1 to"),
        (SHADES * 16, "numbers from 0 to 4000"),
        ((SHADES * 4).astype(np.uint16), "numbers from 0 to 1000"),
        ((SHADES * 8 - 1000).astype(np.int32), "numbers from -1000 to 1000"),
        (np.where(SHADES == 250, np.nan, SHADES).astype(np.float32), "NaN"),
        (np.where(SHADES == 250, np.inf, SHADES).astype(np.float32), "infinity"),
    ],
)
def test_numbers_that_could_mean_anything_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        open_picture(tiff(values))


def test_a_damaged_note_of_the_camera_leaves_the_picture():
    exif = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01\x03\x00"
    assert open_picture(encoded(Image.new("RGB", (16, 8), RED), "JPEG", exif=exif)).size == (16, 8)


def test_colours_that_cannot_be_shown():
    with pytest.raises(ValueError, match="La"):
        open_picture(Image.new("La", (8, 8)))


def samples() -> list[bytes]:
    """A small picture in each format and in the colours that are stored differently."""
    noise = Image.effect_noise((24, 16), 60)
    colourful = Image.merge("RGB", (noise, noise.rotate(180), noise.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded(colourful, kind, exif=exif) for kind in ("PNG", "JPEG", "WEBP", "TIFF")]
    files += [encoded(colourful, kind) for kind in ("BMP", "GIF")]
    files += [encoded(colourful, "TIFF", compression=how) for how in ("tiff_lzw", "tiff_deflate", "packbits")]
    files += [encoded(colourful.convert(mode), "PNG") for mode in ("1", "L", "P", "LA", "RGBA")]
    files += [encoded(colourful.convert("CMYK"), kind) for kind in ("JPEG", "TIFF")]
    files += [
        by_tifffile(COLOURS.astype(np.float32)),
        by_tifffile((COLOURS * 16).astype(np.int16), **declaring(4080.0)),
    ]
    return [*files, tiff(SHADES), encoded(colourful, "GIF", save_all=True, append_images=[noise])]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, a piece cut out, doubled, or the end cut off."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = rng.randrange(min(len(changed), rng.choice((64, 512, len(changed)))))
        what = rng.randrange(5)
        if what < 2:
            changed[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif what == 2:
            changed[place : place + 4] = struct.pack(rng.choice("<>") + "I", rng.choice((0, 2**31 - 1, 2**32 - 1)))
        elif what == 3:
            changed[place:place] = changed[place : place + rng.randrange(40)]
        else:
            del changed[place : place + rng.choice((1, 4, 30, len(changed)))]
        if not changed:
            break
    return bytes(changed)


def check_damaged_pictures(seed: int, count: int) -> int:
    """Each is opened or refused in one short sentence; returns how many were refused. For a night: raise `count`."""
    rng, files, refused = random.Random(seed), samples(), 0
    for number in range(count):
        content = damaged(rng.choice(files), rng)
        try:
            opened = open_picture(content)
        except ValueError as error:
            refused += 1
            assert type(error) is ValueError and str(error).startswith("the upload "), repr(error)
            assert "\n" not in str(error) and len(str(error)) < 300, (number, str(error))
        else:
            assert opened.mode == "RGB" and min(opened.size) >= pictures.SMALLEST_SIDE
    return refused


@pytest.mark.filterwarnings("error")
def test_damaged_pictures_get_one_sentence():
    assert 300 < check_damaged_pictures(seed=0, count=1000) < 950


# --- what a file declares of its numbers, or what would be black ---


def tagged(values: np.ndarray, **tags: float) -> bytes:
    """A TIFF that says what its numbers mean."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for name, value in tags.items():
        info[shades.TAGS[name]] = value
        if isinstance(value, float):
            info.tagtype[shades.TAGS[name]] = TiffTags.FLOAT
    return encoded(Image.fromarray(values), "TIFF", tiffinfo=info)


@pytest.mark.parametrize(
    "content",
    [
        tagged((SHADES * 4).astype(np.uint16), MaxSampleValue=1020),
        tagged((SHADES * 16).astype(np.uint16), MaxSampleValue=4080),
        tagged(SHADES * 3, SMinSampleValue=0.0, SMaxSampleValue=765.0),
        tagged(SHADES / 127.5 - 1, SMinSampleValue=-1.0, SMaxSampleValue=1.0),
    ],
    ids=["10 bits", "12 bits", "floats", "signed floats"],
)
def test_numbers_mean_what_the_file_declares(content):
    opened = np.asarray(open_picture(content))[..., 0]
    assert np.abs(opened - SHADES).max() <= 1


def packed_12_bits(values: np.ndarray) -> bytes:
    """A TIFF whose samples lie at 12 bits each, two in three bytes; written by hand, as no library here writes it."""
    flat = values.reshape(-1, 2).astype(int)
    rows = np.stack([flat[:, 0] >> 4, (flat[:, 0] & 15) << 4 | flat[:, 1] >> 8, flat[:, 1] & 255], axis=1)
    data = rows.astype(np.uint8).tobytes()
    height, width = values.shape
    entries = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4)


def test_twelve_bits_are_scaled_by_their_number():
    opened = np.asarray(open_picture(packed_12_bits(SHADES * 4095 / 255)))[..., 0]
    assert np.abs(opened - SHADES).max() <= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tagged((SHADES * 16).astype(np.uint16), MaxSampleValue=1023), "from 0 to 4000, and its file says 0 to 1023"),
        (tagged((SHADES * 4).astype(np.uint16), MaxSampleValue=65535), "from 0 to 1000, of 0 to 65535, and would be"),
        (tiff((SHADES / 255 / 60).astype(np.float32)), "from 0 to 0.01.* would be black"),
        (tiff((SHADES // 50).astype(np.uint16)), "from 0 to 5, of 0 to 255, and would be black"),
        (tagged((SHADES - 125).astype(np.int8).view(np.uint8), SampleFormat=2), "from -125 to 125"),
        (tiff(np.full((8, 8), np.nan, np.float32)), "nothing but NaN and infinity"),
    ],
)
def test_what_would_be_black_is_refused_with_the_range_found(content, message):
    with pytest.raises(ValueError, match=message):
        open_picture(content)


def png_of_16_bits(colours: np.ndarray) -> bytes:
    """(H, W, 3) uint16 as PNG, which Pillow reads and doesn't write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, _ = colours.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_16_bits_that_hold_fewer_are_refused():
    colours = np.repeat(SHADES[..., None], 3, axis=2)
    opened = np.asarray(open_picture(png_of_16_bits(colours * 257)))
    assert np.abs(opened - colours).max() <= 1
    for factor, bound in ((4, 1023), (16, 4095)):
        with pytest.raises(ValueError, match=f"no number above {bound} of 65535 and would be black"):
            open_picture(png_of_16_bits(colours * factor))


COLOURS = np.stack([SHADES, SHADES[::-1], SHADES.T], axis=-1)


def by_tifffile(values: np.ndarray, **options) -> bytes:
    """What Pillow can't write."""
    buffer = io.BytesIO()
    kind = "rgb" if values.ndim == 3 else "minisblack"
    tifffile.imwrite(buffer, values, **({"photometric": kind} | options))
    return buffer.getvalue()


def declaring(white: float) -> dict:
    return {"extratags": [(shades.TAGS["SMaxSampleValue"], "f", 3, (white,) * 3, True)]}


@pytest.mark.parametrize(
    "content",
    [
        by_tifffile((COLOURS / 255).astype(np.float32)),
        by_tifffile((COLOURS / 255).astype(np.float16)),
        by_tifffile(COLOURS.astype(np.float64)),
        by_tifffile(np.moveaxis(COLOURS, -1, 0).astype(np.float32), planarconfig="separate"),
        by_tifffile((COLOURS * 37 / 255).astype(np.float32), **declaring(37.0)),
        by_tifffile(COLOURS.astype(np.int16)),
        by_tifffile((COLOURS / 255 * 32767).astype(np.int16)),
        by_tifffile((COLOURS * 16).astype(np.int16), **declaring(4080.0)),
        by_tifffile((COLOURS * 4).astype(np.uint16), **declaring(1020.0)),
        by_tifffile(np.dstack([COLOURS / 255, np.ones((8, 8))]).astype(np.float32), extrasamples=["unassalpha"]),
    ],
    ids=[
        "float32", "float16", "float64", "planes", "floats to what is declared", "int16 to 255", "int16 to 32767",
        "int16 of 12 bits, declared", "uint16 of 10 bits, declared", "floats and opacity",
    ],
)  # fmt: skip
def test_colours_in_floats_or_with_a_sign(content):
    assert np.abs(np.asarray(open_picture(content)) - COLOURS).max() <= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((COLOURS / 125 - 1).astype(np.float32), "numbers from -1 to 1, and which of them is white"),
        ((COLOURS / 10).astype(np.float32), "numbers from 0 to 25, and which of them is white"),
        (np.where(COLOURS == 250, np.nan, COLOURS).astype(np.float32), "from 0 to 246, and 3 of 192 are NaN"),
        ((COLOURS * 257 - 32768).astype(np.int16), "numbers from -32768 to 31482, and which"),
        ((COLOURS - 125).astype(np.int8), "numbers from -125 to 125, and which"),
        ((SHADES * 1e7).astype(np.uint32), r"numbers from 0 to 2.5e\+09, and which"),
        ((SHADES - 125).astype(np.int16), "numbers from -125 to 125, and which"),
        (SHADES.astype(np.complex64), r"kind that isn't read \(complex64\): save it with 8 bits"),
    ],
)
def test_colours_that_could_mean_anything_are_refused_with_the_range_found(values, message):
    with pytest.raises(ValueError, match=message):
        open_picture(by_tifffile(values))


def test_packed_floats_are_refused_unread():
    """As what is packed may be a bomb: tifffile would fill the memory."""
    with pytest.raises(ValueError, match=r"isn't read \(float32, 3 a pixel, compression adobe_deflate\)"):
        open_picture(by_tifffile(COLOURS.astype(np.float32), compression="zlib"))


def test_a_negative_of_16_bits_is_turned_into_what_it_shows():
    negative = (255 - SHADES) * 257
    opened = np.asarray(open_picture(by_tifffile(negative.astype(np.uint16), photometric="miniswhite")))[..., 0]
    assert np.abs(opened - SHADES).max() <= 1


def test_float_colours_are_upright():
    wide = np.repeat(COLOURS, 2, axis=1).astype(np.float32)
    turned = open_picture(by_tifffile(wide, extratags=[(shades.TAGS["Orientation"], "H", 1, 6, True)]))
    assert turned.size == (8, 16)
    assert np.abs(np.asarray(turned) - np.rot90(wide, -1)).max() <= 1
