"""Train a FineLIP on your own images and captions, from a CSV file, and load what comes out.

    python examples/train_on_csv.py --out runs/my-finelip
    python examples/train_on_csv.py --csv my_pairs.csv --base openai/clip-vit-large-patch14 --steps 10000

The CSV has a header, a path of an image and its caption in each line:

    image,caption
    images/0.png,"A large red star is in the top left. ..."

Without `--csv` a few pictures of the miniature's world are drawn, to try it.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

from finelip_sdxl import load_finelip
from finelip_sdxl.miniature.dataset import MiniatureScenes

RECIPE = Path(__file__).parents[1] / "training" / "train_finelip.py"


def draw_pairs(folder: Path, count: int) -> Path:
    """Some images with captions, and the CSV file that lists them."""
    scenes = MiniatureScenes("train", count)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with open(folder / "pairs.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for index in range(count):
            scenes.image(index).save(folder / "images" / f"{index}.png")
            rows.writerow([f"images/{index}.png", scenes.captions(index)[0]])
    return folder / "pairs.csv"


def main(arguments: list[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--csv", type=Path, help="columns image and caption (default: drawn scenes)")
    flags.add_argument("--base", default="miniature-clip-1", help="CLIP to begin with (default: the miniature's)")
    flags.add_argument("--steps", type=int, default=4, help="steps of training (default: %(default)s)")
    flags.add_argument("--batch-size", type=int, default=4, help="pairs in a step (default: %(default)s)")
    flags.add_argument("--out", type=Path, default=Path("runs/my-finelip"), help="folder of the run")
    options = flags.parse_args(arguments)

    pairs = options.csv or draw_pairs(options.out.parent / f"{options.out.name}-data", count=8)
    command = [sys.executable, str(RECIPE), "--base", options.base, "--data", f"csv:{pairs}"]
    command += ["--max-steps", str(options.steps), "--batch-size", str(options.batch_size), "--eval-data", "none"]
    command += ["--region-weight", "0"]  # a CSV knows no regions, which the miniature's preset asks for
    subprocess.run([*command, "--output-dir", str(options.out)], check=True)

    model = load_finelip(options.out / "last")
    print(f"{options.out / 'last'}: a FineLIP of {model.config.text_config.max_position_embeddings} positions")


if __name__ == "__main__":
    main()
