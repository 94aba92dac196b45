"""PNGs that say how they were made, and grids with labels."""

import io
import json
import zlib

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo, PngStream, putchunk

from finelip_sdxl import images
from finelip_sdxl.cli.main import main
from finelip_sdxl.comparison import Settings
from finelip_sdxl.images import label_grid, read_parameters, sampler_name, save_png, to_image

PARAMETERS = {"prompt": "a red fox, 狐\0, " * 40, "seed": 2**32 - 1, "guidance_scale": 3.5, "width": None}
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def file(tmp_path) -> str:
    return str(tmp_path / "picture.png")


def plain(color: tuple[int, int, int] = RED, size: tuple[int, int] = (300, 300)) -> Image.Image:
    return Image.new("RGB", size, color)


def count(grid: Image.Image, color: tuple[int, int, int]) -> int:
    return int((np.asarray(grid) == color).all(axis=-1).sum())


# Parameters


def test_a_picture_keeps_its_pixels_and_its_parameters(file) -> None:
    image = Image.radial_gradient("L")
    save_png(image, file, PARAMETERS)
    assert read_parameters(file) == PARAMETERS
    assert Image.open(file).tobytes() == image.tobytes()
    assert Image.open(file).text["prompt"] == PARAMETERS["prompt"].replace("\0", "\N{REPLACEMENT CHARACTER}")


def test_a_picture_tells_other_programs_its_parameters_in_their_words(file) -> None:
    more = {"negative_prompt": "blurry, dark", "steps": 20, "width": 96, "height": 96, "base": "C: a, b"}
    more |= {"guidance_scale": 5.0, "sampler": "Euler", "finelip_sdxl": "0.1.0"}
    save_png(plain(), file, {**PARAMETERS, **more})
    *prompt, negative, settings = Image.open(file).text["parameters"].splitlines()
    assert "\n".join(prompt) == PARAMETERS["prompt"].replace("\0", "\N{REPLACEMENT CHARACTER}")
    assert negative == "Negative prompt: blurry, dark"
    assert settings == (
        'Steps: 20, Sampler: Euler, CFG scale: 5, Seed: 4294967295, Size: 96x96, Model: "C: a, b",'
        " Version: finelip-sdxl 0.1.0"
    )


def test_a_picture_of_the_first_version_is_read(file) -> None:
    info = PngInfo()
    info.add_itxt("prompt", "a fox")
    info.add_itxt("parameters", json.dumps({"prompt": "a fox", "seed": 7, "hidden_states": "published"}))
    plain().save(file, pnginfo=info)
    assert read_parameters(file) == {"prompt": "a fox", "seed": 7, "hidden_states": "published"}
    assert Settings.from_parameters(read_parameters(file)) == Settings("a fox", seed=7, hidden_states="last")


def test_a_picture_that_cannot_be_written_leaves_the_old_one(file, tmp_path) -> None:
    save_png(plain(), file, PARAMETERS)
    with pytest.raises(OSError, match="cannot write mode"):
        save_png(Image.new("HSV", (8, 8)), file, PARAMETERS)
    assert read_parameters(file) == PARAMETERS
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("order", [(b"iTXt", b"IDAT"), (b"IDAT", b"iTXt")])
def test_parameters_are_found_before_and_behind_pixels_that_are_never_decoded(file, order) -> None:
    side = (100_000).to_bytes(4, "big")
    chunks = {b"iTXt": b'parameters\0\0\0\0\0{"prompt": "a fox"}', b"IDAT": b"no pixels at all"}
    with open(file, "wb") as stream:
        stream.write(b"\x89PNG\r\n\x1a\n")
        putchunk(stream, b"IHDR", side, side, b"\x08\x02\0\0\0")
        for kind in order:
            putchunk(stream, kind, chunks[kind])
        putchunk(stream, b"IEND", b"")
    with pytest.raises(Image.DecompressionBombError):
        Image.open(file)
    assert read_parameters(file) == {"prompt": "a fox"}


@pytest.mark.parametrize(
    ("scheduler", "name"),
    [
        (EulerDiscreteScheduler, "Euler"),
        (EulerAncestralDiscreteScheduler, "Euler a"),
        (DPMSolverMultistepScheduler, "DPM++ 2M"),
        (DDPMScheduler, "DDPM"),
    ],
)
def test_a_scheduler_has_the_name_that_other_programs_know(scheduler, name) -> None:
    assert sampler_name(scheduler()) == name


@pytest.mark.parametrize(
    "text",
    [
        "a portrait of a fox\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1",
        '["a list"]',
        '{"fooocus": true}',
        '{"prompt": 3}',
        "[" * 200_000,
        "1" * 5000,
        "",
    ],
)
def test_parameters_of_other_programs_are_refused(file, text) -> None:
    info = PngInfo()
    info.add_text("parameters", text)
    plain().save(file, pnginfo=info)
    with pytest.raises(ValueError, match=r"^picture.png holds parameters of another program; expected a JSON object"):
        read_parameters(file)


def test_a_picture_without_parameters_is_refused(file) -> None:
    plain().save(file)
    with pytest.raises(ValueError, match=r"^picture.png holds no parameters, since FineLIP-SDXL did not write it"):
        read_parameters(file)


def test_what_is_no_png_is_refused(file, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"picture.png does not exist or is not a file"):
        read_parameters(file)
    with pytest.raises(ValueError, match="does not exist or is not a file"):
        read_parameters(tmp_path)
    for write in (lambda: plain().save(file, format="JPEG"), lambda: open(file, "wb").close()):
        write()
        with pytest.raises(ValueError, match=r"^picture.png is not a PNG: pass a PNG"):
            read_parameters(file)


def test_a_damaged_picture_is_refused(file) -> None:
    save_png(Image.effect_noise((64, 64), 50), file, PARAMETERS)
    with open(file, "rb") as stream:
        whole = stream.read()
    flipped = whole.replace(b"guidance_scale", b"guidance_Scale")
    for damaged in (whole[:10], whole[:200], whole[: len(whole) // 2], whole[:-12], whole[:-9], flipped):
        with open(file, "wb") as stream:
            stream.write(damaged)
        with pytest.raises(ValueError, match=r"^picture.png is a PNG that is damaged or cut short"):
            read_parameters(file)


def test_texts_that_unpack_to_far_more_are_refused(file) -> None:
    info = PngInfo()
    info.add(b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * 100_000_000))
    plain().save(file, pnginfo=info)
    with pytest.raises(ValueError, match="damaged"):
        read_parameters(file)


@pytest.mark.parametrize("kind", [b"tEXt", b"IDAT", b"none"])
def test_a_picture_of_millions_of_chunks_is_not_read_to_its_end(file, monkeypatch, kind) -> None:
    chunks = io.BytesIO()
    putchunk(chunks, kind, b"a\0b")
    with open(file, "wb") as stream:
        stream.write(b"\x89PNG\r\n\x1a\n" + chunks.getvalue() * 1_000_000)
        putchunk(stream, b"IEND", b"")
    read, count = PngStream.read, []
    monkeypatch.setattr(PngStream, "read", lambda self: count.append(1) or read(self))
    with pytest.raises(ValueError, match=r"^picture.png has more than 20,000 chunks: pass a PNG as FineLIP-SDXL"):
        read_parameters(file)
    assert len(count) == images.MAX_CHUNKS


@pytest.mark.parametrize("where", ["all", "one pixel", "one channel"])
def test_a_picture_of_nan_is_refused(where) -> None:
    pixels = torch.zeros(3, 8, 16)
    lost = {"all": slice(None), "one pixel": (slice(None), 2, 3), "one channel": (1, 0, 0)}[where]
    pixels[lost] = torch.nan
    count = 128 if where == "all" else 1
    with pytest.raises(ValueError, match=rf"^{count} of the picture's 128 pixels are not a number .*float32"):
        to_image(pixels)


def test_generate_says_that_a_picture_is_no_number(stock_folder, tmp_path, monkeypatch, capsys) -> None:
    decode = AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda *args, **options: (decode(*args, **options)[0] * torch.nan,))
    arguments = ["--base", stock_folder, "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "a.png")]
    assert main(["generate", "a fox", *arguments]) == 2
    assert "256 of the picture's 256 pixels are not a number (NaN)" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_picture_is_made_of_numbers_as_diffusers_makes_it(dtype) -> None:
    pixels = torch.linspace(0, 1, 3 * 8 * 16).reshape(1, 3, 8, 16).to(dtype)
    (expected,) = VaeImageProcessor().postprocess(2 * pixels - 1, output_type="pil")
    assert (
        to_image(VaeImageProcessor().postprocess(2 * pixels - 1, output_type="pt")[0]).tobytes() == expected.tobytes()
    )


def test_a_file_that_is_too_large_is_not_read(file, monkeypatch) -> None:
    save_png(plain(), file, PARAMETERS)
    monkeypatch.setattr(images, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"^picture.png has [\d,]+ bytes; expected at most 1,000: pass"):
        read_parameters(file)


# Grids


class Drawn:
    """The texts that a grid draws, and the boxes that they fill."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[str] = []
        self.boxes: list[tuple[float, float, float, float]] = []
        draw = ImageDraw.ImageDraw.text

        def text(pen, xy, text, font, anchor, **style) -> None:
            self.texts.append(text)
            self.boxes.append(pen.textbbox(xy, text, font=font, anchor=anchor))
            draw(pen, xy, text, font=font, anchor=anchor, **style)

        monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)


@pytest.fixture
def drawn(monkeypatch) -> Drawn:
    return Drawn(monkeypatch)


def test_a_grid_shows_pictures_and_labels_in_order(drawn) -> None:
    rows = [[plain(RED), plain(BLUE)], [plain(BLUE), plain(BLUE)]]
    grid = label_grid(rows, ["seed 0", "seed 1"], ["Stock SDXL", "compel"], "a fox", [["1", "2"], ["3", "4"]])
    assert drawn.texts == ["a fox", "Stock SDXL", "compel", "seed 0", "1", "2", "seed 1", "3", "4"]
    # No picture is drawn over, and none is missing.
    assert (count(grid, RED), count(grid, BLUE)) == (300 * 300, 3 * 300 * 300)
    places = dict(zip(drawn.texts, drawn.boxes, strict=True))
    left, top, right, bottom = Image.composite(
        Image.new("L", grid.size, 255), Image.new("L", grid.size), grid.getchannel("G").point(lambda g: 255 * (g == 0))
    ).getbbox()
    assert places["a fox"][3] <= places["Stock SDXL"][1]
    assert places["Stock SDXL"][3] <= top
    assert places["seed 0"][2] <= left
    assert top < places["seed 0"][1] < places["1"][1] < places["seed 1"][1] < bottom
    assert left < places["Stock SDXL"][0] < places["compel"][0] < right
    assert grid.getpixel((left, top)) == RED
    assert bottom <= places["4"][1]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((96, 96), (288, 288)), ((96, 40), (672, 280)), ((256, 300), (256, 300)), ((8, 8), (256, 256))],
)
def test_small_pictures_are_enlarged(size, expected) -> None:
    grid = label_grid([[plain(size=size)]], ["seed 0"], ["compel"])
    assert count(grid, RED) == expected[0] * expected[1]


@pytest.mark.parametrize(
    "title",
    [
        "The quick fox jumps over the lazy dog. " * 40,
        "狐は赤い星の上にいる。" * 60,
        "x" * 1000,
        "One line.\n\nAnother\tafter an empty one.\r\nA third, 😀👨‍👩‍👧 עברית é \x07 नमस्ते.",
    ],
)
def test_a_long_title_is_there_in_full_and_within_the_grid(drawn, title) -> None:
    grid = label_grid([[plain(), plain()]], ["seed 0"], ["", ""], title)
    lines = drawn.texts[: drawn.texts.index("seed 0")]
    assert "".join("".join(lines).split()) == "".join(title.split())
    assert all(min(box) > 0 and box[2] < grid.width and box[3] < grid.height for box in drawn.boxes)
    assert count(grid, RED) == 2 * 300 * 300
    assert grid.height > label_grid([[plain(), plain()]], ["seed 0"], ["", ""], "short").height


def test_lines_break_between_words(drawn) -> None:
    label_grid([[plain()]], [""], ["of several words that need more room than there is"])
    assert len(drawn.texts) > 1
    assert " ".join(drawn.texts) == "of several words that need more room than there is"


def test_labels_that_need_more_room_get_it(drawn) -> None:
    grid = label_grid([[plain()]], ["label " * 30], ["title " * 30], captions=[["caption " * 30]])
    assert "".join(drawn.texts).count("caption") == 30
    assert count(grid, RED) == 300 * 300
    assert all(min(box) > 0 and box[2] < grid.width and box[3] < grid.height for box in drawn.boxes)


def test_labels_grow_with_the_pictures(drawn) -> None:
    label_grid([[plain(size=(1024, 1024))]], [""], ["compel"])
    label_grid([[plain(size=(256, 256))]], [""], ["compel"])
    large, small = drawn.boxes
    assert large[3] - large[1] > 3 * (small[3] - small[1])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_pictures_of_any_mode_are_shown(mode) -> None:
    grid = label_grid([[plain((0, 0, 0)).convert(mode)]], [""], [""])
    assert (grid.mode, count(grid, (0, 0, 0))) == ("RGB", 300 * 300)


@pytest.mark.parametrize(
    ("rows", "row_labels", "column_labels", "captions", "message"),
    [
        ([], [], ["a"], None, "The grid is empty"),
        ([[]], ["a"], [], None, "The grid is empty"),
        ([[(96, 96), (96, 104)]], ["a"], ["b", "c"], None, "have sizes 96 × 96 and 96 × 104; expected one size"),
        ([[(96, 96)]], [], ["b"], None, "has 1 rows but 0 row labels"),
        ([[(96, 96)]], ["a"], ["b", "c"], None, r"pictures of the grid are \[1\] in its rows; expected 1 rows of 2"),
        ([[(96, 96)]], ["a"], ["b"], [["c", "d"]], r"The captions of the grid are \[2\] in its rows"),
        ([[(96, 96)]], ["a"], ["b"], [], "The captions of the grid"),
    ],
)
def test_a_grid_that_does_not_fit_together_is_refused(rows, row_labels, column_labels, captions, message) -> None:
    images = [[plain(size=size) for size in row] for row in rows]
    with pytest.raises(ValueError, match=message):
        label_grid(images, row_labels, column_labels, captions=captions)
