"""The examples of `docs/compatibility.md`."""

import re
from pathlib import Path

import pytest
from PIL import Image

PAGE = (Path(__file__).parent.parent / "docs" / "compatibility.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_examples_run_as_they_stand(capsys) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/compatibility.md", "exec"), names)
        if "image" in block:
            assert isinstance(names.pop("image"), Image.Image)
    assert "LoRAs, not encoded: <lora:ink:0.8>" in capsys.readouterr().out
