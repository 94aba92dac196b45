"""Small benchmarks of prompts, in the layouts in which their authors publish them."""

import json
from pathlib import Path
from typing import Any

PROMPTS = ["a red fox", "a blue hare above the square", "the quiet fox of the large square"]


def dpg_bench(folder: Path) -> str:
    """Each prompt in a file; the names of two hold dots."""
    for name, prompt in zip(["COCOval2014000000000042", "diffusiondb.1", "whoops12.v2"], PROMPTS, strict=True):
        _write(folder / "prompts" / f"{name}.txt", prompt)
    return f"dpg-bench:{folder}"


def tiif(folder: Path) -> str:
    """Two types, of two prompts and of one."""
    entries = [_tiif("action+2d", PROMPTS[0]), _tiif("action+2d", PROMPTS[1])]
    _write(folder / "action+2d_prompts.jsonl", *map(json.dumps, entries))
    _write(folder / "style_prompts.jsonl", json.dumps(_tiif("style", PROMPTS[2])))
    return f"tiif:{folder}"


def _tiif(kind: str, prompt: str) -> dict[str, str]:
    return {"type": kind, "short_description": prompt, "long_description": f"{prompt}, quiet and small"}


def longbench_t2i(folder: Path) -> str:
    rows = [{"instruction": prompt, "label": [{"Objects": "a fox"}]} for prompt in PROMPTS]
    return f"longbench-t2i:{_write(folder / 'instruction.jsonl', *map(json.dumps, rows))}"


def detailmaster_entries() -> list[dict[str, Any]]:
    """The last entry is the first once more, as in the small benchmark."""
    targets = ["docci", "ln_coco", "ln_flickr"]
    rows = [
        {"dataset_target": target, "image_id": f"{number:05}.jpg", "polished_prompt": prompt}
        for number, (target, prompt) in enumerate(zip(targets, PROMPTS, strict=True))
    ]
    return [*rows, rows[0]]


def detailmaster(folder: Path) -> str:
    return f"detailmaster:{_write(folder / 'detailmaster.json', json.dumps(detailmaster_entries()))}"


def txt(folder: Path) -> str:
    return f"txt:{_write(folder / 'prompts.txt', *PROMPTS)}"


def _write(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))
    return file
