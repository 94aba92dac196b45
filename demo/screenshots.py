"""Take README's pictures of the page: a comparison in light, and several seeds in dark.

    python demo/screenshots.py --out docs

Needs Chromium, and `pip install playwright`.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from finelip_sdxl.images import save_compact

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that this runs as a script

from demo import app

WIDTH = 1280
PATIENCE = 120_000  # milliseconds
ALL_DRAWN = "[...document.querySelectorAll('.heading-share')].filter(share => share.textContent).length == 3"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--out", type=Path, default=Path("docs"), help="folder of the pictures (default: %(default)s)")
    flags.add_argument(
        "--chromium", default=shutil.which("chromium"), help="program of Chromium (default: %(default)s)"
    )
    options = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        served = app.serve(app.parse([]), Path(folder), wait=False)
        browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        for scheme, draw in (("light", draw_columns), ("dark", draw_seeds)):
            page = browser.new_page(viewport={"width": WIDTH, "height": 1000}, color_scheme=scheme)
            page.set_default_timeout(PATIENCE)
            page.goto(served.local_url)
            page.locator("#meter .meter-line").first.wait_for()
            draw(page)
            page.wait_for_function("[...document.images].every(image => image.complete)")
            shown = Image.open(io.BytesIO(page.screenshot(full_page=True, type="png")))
            save_compact(shown, options.out / f"demo-{scheme}.png")
            print(options.out / f"demo-{scheme}.png")
        browser.close()
        served.close()


def draw_columns(page: Any) -> None:
    page.wait_for_function(ALL_DRAWN)  # the page opens with the pictures of its first example


def draw_seeds(page: Any) -> None:
    page.wait_for_function(ALL_DRAWN)
    page.get_by_role("button", name="Many seeds").click()
    page.wait_for_timeout(1000)  # a new component takes its first value once more
    page.locator("#seeds input[type=number]").fill("2")
    page.locator("#seeds input[type=number]").blur()
    page.click("#draw-grid")
    page.get_by_text("6 pictures").wait_for()


if __name__ == "__main__":
    main()
