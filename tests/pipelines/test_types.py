"""What a type checker says of a user's script."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="TYPES ARE NOT TESTED: mypy is not installed")

SCRIPT = """from finelip_sdxl import FineLIPSDXLInpaintPipeline, FineLIPSDXLPipeline

pipe: FineLIPSDXLPipeline = FineLIPSDXLPipeline.from_pretrained("miniature", short_prompt_encoder="long")
pipe.set_conditioning_adapter_scale(0.5)
print(pipe.describe_prompt("a red star", overflow="error").positions)
pipe("a red star", weighting="a1111")
reveal_type(FineLIPSDXLPipeline.from_pretrained("miniature"))
reveal_type(FineLIPSDXLInpaintPipeline.from_single_file("fine_tune.safetensors"))
reveal_type(FineLIPSDXLInpaintPipeline.from_pipe(pipe))
"""


@pytest.mark.slow
def test_a_misspelled_option_is_an_error(tmp_path) -> None:
    # The libraries' own code takes minutes to check, and says nothing of ours.
    config = tmp_path / "mypy.ini"
    config.write_text(
        "[mypy]\nignore_missing_imports = true\n[mypy-torch.*,transformers.*,diffusers.*]\nfollow_imports = skip\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(tmp_path / "cache")]
    root = Path(__file__).parents[2]
    misspelled, no_number = SCRIPT.replace("long", "logn"), SCRIPT.replace("0.5", '"half"')
    no_syntax, no_treatment = SCRIPT.replace("a1111", "a1112"), SCRIPT.replace('"error"', '"eror"')
    for script, errors, name in (
        (SCRIPT, 0, ""),
        (misspelled, 1, "short_prompt_encoder"),
        (no_number, 1, "set_conditioning_adapter_scale"),
        (no_syntax, 1, "weighting"),
        (no_treatment, 1, "overflow"),
    ):
        (tmp_path / "script.py").write_text(script)
        checked = subprocess.run([*command, str(tmp_path / "script.py")], cwd=root, capture_output=True, text=True)
        said = [line for line in checked.stdout.splitlines() if "script.py" in line and "error" in line]
        assert len(said) == errors, checked.stdout + checked.stderr
        assert all(name in line for line in said)
        types = re.findall(r'Revealed type is "(?:\w+\.)*(\w+)"', checked.stdout)
        assert types == ["FineLIPSDXLPipeline", "FineLIPSDXLInpaintPipeline", "FineLIPSDXLInpaintPipeline"]
