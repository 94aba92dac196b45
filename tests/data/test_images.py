"""Pictures of users as RGB of 8 bits: modes, transparency, damaged metadata, and sizes that cost too much."""

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin
from transformers import AutoImageProcessor, CLIPImageProcessorPil

from finelip_sdxl.data import UnreadableImageError, load_image_processor
from finelip_sdxl.data.images import MAX_RATIO, middle, read_image
from finelip_sdxl.training.precompute import cut_square

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # which Pillow says, and reads on

WIDE = [0, 0x0100, 0x8080, 0xFFFF]  # of 16 bits
NARROW = [0, 1, 128, 255]  # the same of 8
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8))


def png(color: int, bits: int, pixels: bytes, width: int, **chunks: bytes) -> bytes:
    """A PNG of one row; colors are PNG's: 0 gray, 2 RGB, 3 palette, 4 gray with alpha, 6 RGBA."""
    header = struct.pack(">IIBBBBB", width, 1, bits, color, 0, 0, 0)
    parts = {"IHDR": header, **chunks, "IDAT": zlib.compress(b"\0" + pixels), "IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, content) for name, content in parts.items())


def chunk(name: str, content: bytes) -> bytes:
    named = name.encode() + content
    return struct.pack(">I", len(content)) + named + struct.pack(">I", zlib.crc32(named))


def tiff(pixels: bytes, width: int, bits: int, order: str = "<", white_is_zero: bool = False, kind: int = 1) -> bytes:
    """A gray TIFF of one row; kinds of numbers are TIFF's: 1 unsigned, 2 signed, 3 floating-point."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: not white_is_zero, 273: 134, 277: 1, 278: 1, 279: len(pixels)}
    entries = [struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in {**tags, 339: kind}.items()]
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(entries))
    return head + b"".join(entries) + bytes(4) + pixels


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def colors(content: bytes) -> list[tuple[int, int, int]]:
    image = read_image(content, "a")
    assert image.mode == "RGB"
    return [image.getpixel((x, 0)) for x in range(image.width)]


def gray(*levels: int) -> list[tuple[int, int, int]]:
    return [(level, level, level) for level in levels]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(png(0, 16, struct.pack(">4H", *WIDE), 4), id="PNG"),
        pytest.param(tiff(struct.pack("<4H", *WIDE), 4, 16), id="TIFF"),
        pytest.param(tiff(struct.pack(">4H", *WIDE), 4, 16, ">"), id="TIFF, big end first"),
        pytest.param(tiff(struct.pack("<4H", *[65535 - w for w in WIDE]), 4, 16, white_is_zero=True), id="white is 0"),
        pytest.param(b"P5 4 1 65535\n" + struct.pack(">4H", *WIDE), id="PGM"),
        pytest.param(saved(Image.fromarray(np.array([WIDE], dtype=np.uint16)), "JPEG2000"), id="JPEG 2000"),
        pytest.param(png(0, 8, bytes(NARROW), 4), id="8 bits"),
    ],
)
def test_gray_of_16_bits_is_scaled(content) -> None:
    assert colors(content) == gray(*NARROW)


def test_other_depths_are_scaled_too() -> None:
    assert colors(tiff(bytes([0xFF, 0xF8, 0x00]), 2, 12)) == gray(255, 128)
    assert colors(b"P5 3 1 1023\n" + struct.pack(">3H", 0, 512, 1023)) == gray(0, 128, 255)
    assert colors(png(2, 16, struct.pack(">3H", 0xFFFF, 0, 0x8080), 1)) == [(255, 0, 128)]
    assert colors(png(0, 4, b"\x0f", 2)) == gray(0, 255)


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (tiff(struct.pack("<2I", 0, 70_000), 2, 32), "mode I"),
        (tiff(struct.pack("<2h", -1, 100), 2, 16, kind=2), "mode I"),
        (tiff(struct.pack("<2f", 0, 1), 2, 32, kind=3), "mode F"),
        (b"Pf 2 1\n-1\n" + struct.pack("<2f", 0, 1), "mode F"),
    ],
)
def test_numbers_without_a_known_white_are_refused_by_name(content, mode) -> None:
    with pytest.raises(UnreadableImageError, match=rf"^stars\.tif cannot be read \(its pixels are .*{mode}, without"):
        read_image(content, "stars.tif")


CLEAR = Image.new("RGBA", (1, 1), (0, 0, 0, 0))
PALETTE = bytes([0, 0, 0, 255, 0, 0])


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(saved(CLEAR, "PNG"), id="RGBA"),
        pytest.param(saved(CLEAR.convert("LA"), "PNG"), id="LA"),
        pytest.param(saved(CLEAR, "WEBP", lossless=True), id="WebP"),
        pytest.param(saved(CLEAR, "TIFF"), id="TIFF"),
        pytest.param(saved(CLEAR.resize((16, 16)), "ICO"), id="ICO"),
        pytest.param(saved(Image.new("P", (1, 1)), "GIF", transparency=0), id="GIF"),
        pytest.param(png(4, 16, struct.pack(">2H", 0, 0), 1), id="LA of 16 bits"),
        pytest.param(png(6, 16, bytes(8), 1), id="RGBA of 16 bits"),
        pytest.param(png(3, 8, b"\0", 1, PLTE=PALETTE, tRNS=b"\0"), id="palette"),
        pytest.param(png(0, 8, b"\0", 1, tRNS=b"\0\0"), id="gray that is transparent"),
        pytest.param(png(0, 1, b"\0", 1, tRNS=b"\0\0"), id="black that is transparent"),
        pytest.param(png(0, 4, b"\x70", 1, tRNS=b"\0\7"), id="gray of 4 bits"),
        pytest.param(png(0, 2, b"\x40", 1, tRNS=b"\0\1"), id="gray of 2 bits"),
        pytest.param(png(0, 16, b"\x12\x34", 1, tRNS=b"\x12\x34"), id="gray of 16 bits"),
        pytest.param(png(2, 8, b"\1\2\3", 1, tRNS=b"\0\1\0\2\0\3"), id="color that is transparent"),
        pytest.param(png(2, 16, b"\1\1\2\2\3\3", 1, tRNS=b"\1\1\2\2\3\3"), id="color of 16 bits"),
    ],
)
def test_what_is_transparent_becomes_white(content) -> None:
    assert colors(content)[0] == (255, 255, 255)


def test_what_is_half_transparent_is_mixed_with_white_and_what_is_opaque_stays() -> None:
    assert colors(png(3, 8, b"\0\1", 2, PLTE=PALETTE, tRNS=b"\x80")) == [(127, 127, 127), (255, 0, 0)]
    assert colors(png(6, 8, b"\1\2\3\xff\0\0\0\x80", 2)) == [(1, 2, 3), (127, 127, 127)]
    assert colors(png(0, 16, b"\x12\x34\x12\x35", 2, tRNS=b"\x12\x34"))[1] == (18, 18, 18)
    opaque = NOISE.copy()
    opaque.putalpha(255)
    assert read_image(saved(opaque, "PNG"), "a").tobytes() == NOISE.tobytes()


def test_other_color_spaces_stay_right() -> None:
    red = Image.new("RGB", (8, 8), (200, 30, 60))
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    contents = [saved(red.convert(mode), "TIFF") for mode in ("RGBX", "CMYK")] + [
        saved(ImageCms.applyTransform(red, lab), "TIFF"),
        saved(red.convert("YCbCr"), "JPEG", quality=100),
        saved(red.convert("CMYK"), "JPEG", quality=100),
    ]
    for content in contents:
        # Each space has 8 bits, and the two JPEGs round as well.
        assert np.abs(np.subtract(colors(content)[0], (200, 30, 60))).max() <= 2
    assert colors(saved(Image.new("1", (1, 1), 1), "PNG")) == gray(255)


# Metadata


def exif(orientation: int = 6) -> bytes:
    """With a resolution of -1/2, as some cameras and programs write."""
    data = Image.Exif()
    data[0x0112], data[0x011A] = orientation, TiffImagePlugin.IFDRational(1, 2)
    return data.tobytes().replace(struct.pack(">II", 1, 2), struct.pack(">iI", -1, 2))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_a_negative_rational_costs_neither_the_picture_nor_its_orientation(kind) -> None:
    assert struct.pack(">i", -1) in exif()
    assert read_image(saved(NOISE, kind, exif=exif()), "a").size == (6, 10)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright(kind, orientation) -> None:
    data = Image.Exif()
    data[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100}
    picture = Image.new("RGB", (64, 32), "white")
    picture.paste("black", (0, 0, 32, 16))
    upright = read_image(saved(picture, kind, exif=data, **options), "a")
    assert upright.size == ((64, 32) if orientation < 5 else (32, 64))
    # Where the dark corner at the top left comes to lie, as the EXIF specification names the first row and column.
    at_left, at_top = orientation in (1, 4, 5, 8), orientation in (1, 2, 5, 6)
    dark = upright.getpixel((upright.width // 4 if at_left else upright.width * 3 // 4,
                             upright.height // 4 if at_top else upright.height * 3 // 4))  # fmt: skip
    assert max(dark) < 10


@pytest.mark.parametrize(
    "damaged",
    [
        b"Exif\0\0",
        b"Exif\0\0MM\0*",
        b"Exif\0\0MM\0*\xff\xff\xff\xff",
        b"Exif\0\0nonsense",
        exif()[:20],
        exif(0),
        exif(9),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_data_does_not_cost_the_picture(kind, damaged) -> None:
    assert read_image(saved(NOISE, kind, exif=damaged), "a").size == NOISE.size


def test_an_avif_is_read_without_its_exif_data_where_these_are_damaged() -> None:
    content = saved(NOISE, "AVIF", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    damaged = content.replace(b"MM\0*", b"....")
    assert damaged != content
    assert read_image(damaged, "a").tobytes() == read_image(saved(NOISE, "AVIF"), "a").tobytes()


def long_text() -> bytes:
    """A PNG's compressed text of two million characters: Pillow gives up above one."""
    return chunk("zTXt", b"parameters\0\0" + zlib.compress(b"a" * 2_000_000))


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(long_text(), id="compressed text"),
        pytest.param(chunk("iTXt", b"a\0\1\0\0\0" + zlib.compress(b"a" * 2_000_000)), id="international text"),
        pytest.param(chunk("iCCP", b"a\0\0" + zlib.compress(b"a" * 2_000_000)), id="color profile"),
        pytest.param(b"".join([long_text()[:-4], b"none"]), id="wrong checksum"),
        pytest.param(chunk("tEXt", b"a\0" + b"b" * (1 << 20)) * 65, id="65 MB of texts"),
        pytest.param(b"".join([chunk("eXIf", exif(1)[6:])[:-1], b"\0"]), id="wrong checksum of EXIF data"),
        pytest.param(chunk("pHYs", b"\0"), id="cut resolution"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_a_png_s_texts_do_not_cost_the_picture(extra, late, tmp_path) -> None:
    content = saved(NOISE, "PNG")
    place = content.index(b"IEND" if late else b"IDAT") - 4
    file = tmp_path / "a.png"
    file.write_bytes(content[:place] + extra + content[place:])
    limit = PngImagePlugin.MAX_TEXT_CHUNK
    assert read_image(file, "a").tobytes() == NOISE.tobytes()
    assert read_image(file.read_bytes(), "a").tobytes() == NOISE.tobytes()
    assert limit == PngImagePlugin.MAX_TEXT_CHUNK, "the limit of all who use Pillow"


def test_orientation_and_transparency_outlast_a_text_that_is_too_long() -> None:
    image = NOISE.convert("RGBA")
    image.putalpha(0)
    content = saved(image, "PNG", exif=exif())
    place = content.index(b"IDAT") - 4
    read = read_image(content[:place] + long_text() + content[place:], "a")
    assert (read.size, read.getcolors()) == ((6, 10), [(60, (255, 255, 255))])


def test_broken_pixels_are_refused_also_behind_a_long_text() -> None:
    content = saved(NOISE, "PNG")
    place = content.index(b"IDAT") - 4
    for broken in (content[:-30], content[:place] + long_text() + content[place:-30], content[:40], content[:10]):
        with pytest.raises(UnreadableImageError, match=r"^fox\.png cannot be read \([^\n]+\)\.$"):
            read_image(broken, "fox.png")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for file in (tmp_path, tmp_path / "pipe.png", tmp_path / "zero.png", Path("/dev/zero")):
        with pytest.raises(UnreadableImageError, match=r"cannot be read \(it is no regular file\)"):
            read_image(file, str(file))


def test_a_path_that_cannot_be_is_refused(tmp_path) -> None:
    for name in ("a\0b", "a" * 300, "\ud800", "none"):
        with pytest.raises(UnreadableImageError, match="cannot be read"):
            read_image(tmp_path / name, "a")


def test_a_name_that_is_no_text_can_be_printed(tmp_path) -> None:
    file = tmp_path / "caf\udce9.png"
    file.write_bytes(saved(NOISE, "PNG"))
    assert read_image(file, str(file)).tobytes() == NOISE.tobytes()
    file.write_bytes(b"no image")
    with pytest.raises(UnreadableImageError, match=r"caf\\udce9\.png cannot be read") as raised:
        read_image(file, str(file))
    assert str(raised.value).encode()


def test_a_picture_that_unpacks_to_too_much_is_refused() -> None:
    rows = zlib.compress(bytes(1 << 20))
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk("IHDR", header) + chunk("IDAT", rows) + chunk("IEND", b"")
    with pytest.raises(UnreadableImageError, match=r"bomb\.png cannot be read \(.*exceeds limit"):
        read_image(content, "bomb.png")


# Sizes


@pytest.mark.parametrize("size", [(640, 480), (16, 1), (1, 16), (1, 1), (4096, 256)])
def test_the_middle_of_an_ordinary_image_is_all_of_it(size) -> None:
    assert middle(*size) == (0, 0, *size)


@pytest.mark.parametrize(("long", "short"), [(20_000, 1), (20_001, 1), (999, 3), (50_000, 7)])
def test_the_middle_of_a_long_image_is_bounded_and_in_the_middle(long, short) -> None:
    left, top, right, bottom = middle(long, short)
    assert (top, bottom) == (0, short)
    assert left == long - right, "by whole pixels, so that nothing is moved by half of one"
    assert right - left - MAX_RATIO * short in (0, 1)
    assert middle(short, long) == (top, left, bottom, right)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def scaled_sizes(monkeypatch) -> list[tuple[int, int]]:
    """To what sizes Pillow scales."""
    sizes, resize = [], Image.Image.resize

    def counting(self: Image.Image, size: tuple[int, int], *args: Any, **kwargs: Any) -> Image.Image:
        sizes.append(tuple(size))
        return resize(self, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", counting)
    return sizes


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (60_000, 50), (3, 9_999)])
def test_of_a_long_image_only_the_middle_is_scaled(size, scaled_sizes, tmp_path) -> None:
    pixels = load_image_processor(tmp_path, 224)(noise(*size), return_tensors="pt").pixel_values
    cut, time_ids = cut_square(noise(*size), 128)
    assert (pixels.shape, cut.size) == ((1, 3, 224, 224), (128, 128))
    assert time_ids[:2] == [size[1], size[0]], "what SDXL is told of the original stays"
    assert len(scaled_sizes) == 2
    assert all(width * height <= (MAX_RATIO + 1) * 224 * 224 for width, height in scaled_sizes)


def whole_square(image: Image.Image, resolution: int) -> Image.Image:
    """`cut_square` as it would be if nothing were cut off before."""
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    scaled = image.resize((width, height), Image.Resampling.LANCZOS)
    return scaled.crop((left, top, left + resolution, top + resolution))


@pytest.mark.parametrize("size", [(640, 480), (48, 64), (31, 17), (1, 1), (1, 16), (40, 1), (7, 420), (1000, 40)])
def test_an_image_is_scaled_bit_for_bit_as_a_whole(size, tmp_path) -> None:
    """Also a long one whose sides do not have to be rounded: what is cut off is beyond the filters' reach."""
    image = noise(*size)
    clip = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    ours, expected = (
        processor(image, return_tensors="np").pixel_values for processor in (load_image_processor(tmp_path, 32), clip)
    )
    assert np.array_equal(ours, expected)
    assert cut_square(image, 32)[0].tobytes() == whole_square(image, 32).tobytes()


def test_a_saved_image_processor_is_loaded_by_anybody(tmp_path) -> None:
    load_image_processor(tmp_path, 32).save_pretrained(tmp_path)
    theirs, ours = AutoImageProcessor.from_pretrained(tmp_path), load_image_processor(tmp_path, 99)
    assert type(theirs) is CLIPImageProcessorPil
    assert ours.to_dict() == theirs.to_dict()
