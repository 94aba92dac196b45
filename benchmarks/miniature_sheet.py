"""Draw README's first picture: one prompt in three ways, with each of its objects marked right or wrong.

    python benchmarks/miniature_sheet.py --out docs/miniature-story.png

Above the pictures stands what the prompt says of objects past the tokens that stock encodes. The objects of the whole
prompt are judged, as on the page.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from finelip_sdxl.comparison.comparison import Comparison
from finelip_sdxl.comparison.settings import Settings
from finelip_sdxl.images import save_compact
from finelip_sdxl.miniature.marking import RIGHT, WRONG
from finelip_sdxl.miniature.parsing import DescribedObject, parse_description
from finelip_sdxl.miniature.scoring import ObjectScore, score_objects
from finelip_sdxl.miniature.tokenizer import build_tokenizer
from finelip_sdxl.miniature.world import PLACES
from finelip_sdxl.options import COLUMNS, STOCK_POSITIONS

LONG_PROMPT = Path(__file__).parents[1] / "examples" / "long_prompt.txt"
# In pixels of a sheet that README shows at half its size.
PICTURE, GAP = 496, 28
WIDTH = 3 * PICTURE + 4 * GAP
TITLE, TEXT, SMALL = 38, 31, 27  # heights of letters
LINE = 48
BADGE, FRAME = 22, 8  # radius of a mark, width of a frame
INK, GRAY, BAR = (31, 35, 40), (101, 109, 118), (208, 215, 222)
ABOUT = {
    "stock": "encodes the first {positions}",
    "compel": "encodes {positions} at a time",
    "finelip": "encodes all {tokens}",
}


def objects_past_stock(prompt: str) -> list[DescribedObject]:
    """The described objects whose sentences stock cuts."""
    tokens = build_tokenizer(max_length=10**6)(prompt)
    described = parse_description(prompt)
    return [thing for thing in described if tokens.char_to_token(thing.end - 1) >= STOCK_POSITIONS - 1]


def quoted(prompt: str, thing: DescribedObject) -> str:
    """An object's sentence up to its first comma: what follows are fillers."""
    sentence = prompt[thing.start : thing.end].strip().rstrip(".")
    return f"… {sentence.partition(',')[0]}{' …' if ',' in sentence else '.'}"


def mark(picture: Image.Image, described: tuple[DescribedObject, ...], scores: tuple[ObjectScore, ...]) -> Image.Image:
    """The picture, as large as on the sheet, with a frame and a sign for each object; larger than on the page."""
    # Four times as large, for smooth edges.
    times, cell = 4, PICTURE // 3
    marked = picture.resize((PICTURE, PICTURE), Image.Resampling.LANCZOS)
    for thing, score in zip(described, scores, strict=True):
        overlay = Image.new("RGBA", (cell * times, cell * times))
        pen, color = ImageDraw.Draw(overlay), RIGHT if score.right else WRONG
        edge = 4 * times
        box = (edge, edge, overlay.width - 1 - edge, overlay.height - 1 - edge)
        pen.rounded_rectangle(box, radius=20 * times, outline=color, width=FRAME * times)
        center = overlay.width - (BADGE + 6) * times, (BADGE + 6) * times
        pen.circle(center, (BADGE + 3) * times, fill="white")
        pen.circle(center, BADGE * times, fill=color)
        pen.text(center, "✓" if score.right else "✗", "white", font(34 * times, bold=True), anchor="mm")
        overlay = overlay.resize((cell, cell), Image.Resampling.BOX)
        row, column = divmod(PLACES.index(thing.place), 3)
        marked.paste(overlay, (column * PICTURE // 3, row * PICTURE // 3), overlay)
    return marked


def draw_sheet(prompt: str, tokens: int, pictures: dict[str, Image.Image]) -> Image.Image:
    """The sheet of a prompt of so many tokens, and of its pictures by the columns' keys."""
    described = parse_description(prompt)
    lines = [quoted(prompt, thing) for thing in objects_past_stock(prompt)]
    top = 2 * GAP + 2 * TITLE + len(lines) * LINE  # of the columns
    below = top + TITLE + 2 * LINE  # of their headings
    sheet = Image.new("RGB", (WIDTH, below + PICTURE + LINE + GAP), "white")
    pen = ImageDraw.Draw(sheet)

    heading = f"A prompt of {tokens} tokens. Stock SDXL drops all past the {STOCK_POSITIONS}th:"
    pen.text((GAP, GAP), heading, INK, font(TITLE, bold=True))
    first = GAP + 2 * TITLE
    pen.rectangle((GAP, first - 8, GAP + 5, first + len(lines) * LINE - 16), fill=BAR)
    for number, text in enumerate(lines):
        pen.text((2 * GAP, first + number * LINE), text, INK, font(TEXT))
    for number, (column, picture) in enumerate(pictures.items()):
        scores = score_objects(picture, described)
        right = sum(score.right for score in scores)
        color = RIGHT if right == len(scores) else WRONG
        left = GAP + number * (PICTURE + GAP)
        pen.text((left, top + TITLE), COLUMNS[column], INK, font(TITLE, bold=True), anchor="ls")
        about = ABOUT[column].format(positions=STOCK_POSITIONS, tokens=tokens)
        pen.text((left, top + TITLE + LINE), about, GRAY, font(SMALL), anchor="ls")
        share = f"{right} of {len(scores)} right"
        pen.text((left + PICTURE, top + TITLE + LINE), share, color, font(SMALL, bold=True), anchor="rs")
        sheet.paste(mark(picture, described, scores), (left, below - GAP // 2))
    note = "The same noise, the same UNet; ✓ right and ✗ wrong in shape, color and place."
    pen.text((GAP, sheet.height - LINE), note, GRAY, font(SMALL), anchor="lm")
    return sheet


def font(height: float, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / name, round(height))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "text file with the prompt (default: %(default)s)"
    flags.add_argument("--prompt-file", type=Path, default=LONG_PROMPT, metavar="FILE", help=text)
    flags.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the noise (default: %(default)s)")
    text = "file to write (default: %(default)s)"
    flags.add_argument("--out", type=Path, default=Path("docs/miniature-story.png"), metavar="PNG", help=text)
    arguments = flags.parse_args()

    prompt = arguments.prompt_file.read_text(encoding="utf-8").strip()
    comparison = Comparison.load("miniature")
    settings = Settings(prompt, seed=arguments.seed)
    pictures = {column: comparison.draw(column, settings).image for column in COLUMNS}
    sheet = draw_sheet(prompt, comparison.plan(prompt)["finelip"].tokens, pictures)
    save_compact(sheet, arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
