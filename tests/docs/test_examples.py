"""The examples run as they are, on the miniature."""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from tests.helpers.documents import REPOSITORY

EXAMPLES = REPOSITORY / "examples"

pytestmark = pytest.mark.slow


def run(script: str, *flags: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / script, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_long_prompt_becomes_a_picture(tmp_path: Path) -> None:
    printed = run("generate.py", "--steps", "2", "--out", str(tmp_path / "picture.png"))
    assert "217 tokens in 1 window of 248 positions" in printed
    assert Image.open(tmp_path / "picture.png").size[0] > 0


def test_a_finelip_is_trained_on_a_csv(tmp_path: Path) -> None:
    printed = run("train_on_csv.py", "--steps", "1", "--out", str(tmp_path / "run"))
    assert printed.splitlines()[-1].endswith("a FineLIP of 248 positions")


def test_aligned_encoders_are_exported_and_draw_in_stock_diffusers(tmp_path: Path) -> None:
    printed = run("align_and_export.py", "--steps", "1", "--out", str(tmp_path))
    assert f"{tmp_path / 'plain-sdxl'}: 248 tokens" in printed
    assert Image.open(tmp_path / "picture.png").size[0] > 0


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "long_prompt.txt", tmp_path)
    notebook = nbformat.read(EXAMPLES / "long_prompts.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "the notebook is kept without its outputs"
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    printed = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("2 windows of 248 positions" in text for text in printed)
