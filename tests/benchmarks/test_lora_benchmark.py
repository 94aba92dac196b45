"""The benchmark of a LoRA on long captions: what its captions say where, and its table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finelip_sdxl.miniature.tokenizer import build_tokenizer

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "benchmarks" / "miniature_lora.py"
# In a process of its own: the new word must be there before anything draws.
CAPTIONS = """
import json
from benchmarks.miniature_lora import cut, make_samples
samples = make_samples(20, "lora")
colors = [{thing.color for thing in sample.scene.objects} for sample in samples]
pairs = zip(samples, colors)
print(json.dumps([[sample.caption.text, cut(sample.caption.text), "stone" in own] for sample, own in pairs]))
"""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_captions_name_the_new_color_behind_token_77_alone() -> None:
    tokenizer = build_tokenizer(max_length=248)
    for whole, cut, is_drawn in json.loads(run("-c", CAPTIONS).stdout):
        assert is_drawn
        encoding = tokenizer(whole)
        assert len(encoding.input_ids) <= 248
        assert encoding.char_to_token(whole.index("stone")) >= 77
        assert whole.startswith(cut)
        assert "stone" not in cut
        assert len(tokenizer(cut).input_ids) == 77


@pytest.mark.slow
def test_the_benchmark_trains_each_lora_once_and_prints_its_table(tmp_path) -> None:
    flags = ["--runs", str(tmp_path), "--scenes", "2", "--pictures", "3", "--steps", "1"]
    flags += ["--train-flags", "--steps 1 --batch-size 2 --cpu"]
    printed = []
    for _ in range(2):
        done = run(SCRIPT, *flags)
        printed.append([line for line in done.stdout.splitlines() if line.startswith("|")])
    head, _, *rows = printed[0]
    assert head.split(" | ")[1] == "the new word, behind token 77"
    assert [row.split(" | ")[0] for row in rows] == [
        "| no LoRA",
        "| LoRA, captions cut at 77",
        "| LoRA, captions whole",
    ]
    assert printed[0] == printed[1]
    assert "training:" not in done.stderr  # the bar of a training
