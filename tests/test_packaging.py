"""What an installation puts where: one package, with pipelines and the weights of the miniature."""

import ast
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distributions, version
from pathlib import Path

import pytest

import finelip_sdxl

REPOSITORY = Path(__file__).parent.parent
PROGRAM = """
import finelip_sdxl, finelip_sdxl.pipelines
from finelip_sdxl.miniature import miniature_path
print(finelip_sdxl.__file__)
print(finelip_sdxl.pipelines.__file__)
print((miniature_path() / "unet" / "diffusion_pytorch_model.safetensors").is_file())
"""


def imported_from(folder: Path, **environment: str) -> list[str]:
    """Where a fresh interpreter, started far from the repository, finds the package."""
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return run.stdout.split()


@pytest.mark.slow
def test_an_editable_install_finds_the_pipelines(tmp_path) -> None:
    origins = [json.loads(found.read_text("direct_url.json") or "{}") for found in distributions(name="finelip-sdxl")]
    if not any(origin.get("dir_info", {}).get("editable") for origin in origins):
        pytest.skip("the package is not installed with `pip install -e .` here")
    package, pipelines, has_weights = imported_from(tmp_path)
    assert Path(package) == REPOSITORY / "finelip_sdxl" / "__init__.py"
    assert Path(pipelines) == REPOSITORY / "finelip_sdxl" / "pipelines" / "__init__.py"
    assert has_weights == "True"


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script in a fresh interpreter."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)


def test_names_and_version_are_known_without_torch() -> None:
    done = run(
        "import sys, finelip_sdxl\n"
        "print(finelip_sdxl.__version__, *dir(finelip_sdxl))\n"
        "print(*{'torch', 'transformers', 'diffusers', 'numpy', 'PIL'} & sys.modules.keys())"
    )
    names, imported = done.stdout.splitlines()
    assert names.split() == [version("finelip-sdxl"), *sorted(finelip_sdxl.__all__)]
    assert imported == ""
    assert {"FineLIPSDXLPipeline", "__version__", "load_finelip"} <= set(names.split())


def test_help_imports_safetensors_alone() -> None:
    done = run(
        "import sys; before = {*sys.modules}\n"
        "from finelip_sdxl.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print({name.partition('.')[0] for name in {*sys.modules} - before})"
    )
    imported = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    assert imported - sys.stdlib_module_names == {"finelip_sdxl", "safetensors"}


@pytest.mark.slow
def test_pipelines_import_no_more_packages_than_stock() -> None:
    done = run(
        "import sys\n"
        "from diffusers import AutoPipelineForText2Image, StableDiffusionXLPipeline\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "import finelip_sdxl.pipelines\n"
        "print({name.partition('.')[0] for name in sys.modules} - before)"
    )
    assert ast.literal_eval(done.stdout.splitlines()[-1]) == {"finelip_sdxl"}


def test_all_public_names_exist() -> None:
    assert all(hasattr(finelip_sdxl, name) for name in finelip_sdxl.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'FineLIPSDXL'"):
        finelip_sdxl.FineLIPSDXL  # noqa: B018


NEWCOMER = """
import sys
sys.modules["torchao"] = None  # its messages are no business of this package
import logging
import finelip_sdxl
from finelip_sdxl import FineLIPSDXLPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging
for library in (diffusers_logging, transformers_logging):
    assert library.get_verbosity() == library.WARNING
    library.disable_progress_bar()
logger = logging.getLogger("transformers.utils.import_utils")
assert logger.level == logging.NOTSET
FineLIPSDXLPipeline.from_pretrained("miniature")
logger.warning("Another warning.")
"""


@pytest.mark.slow
def test_import_and_loading_print_no_warnings() -> None:
    done = run(NEWCOMER)
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if line] == ["[transformers] Another warning."]


@pytest.mark.slow
def test_a_wheel_holds_one_package_with_pipelines_and_weights(tmp_path) -> None:
    # Building leaves files in the source folder, which would be in the next wheel as well.
    source = tmp_path / "source"
    shutil.copytree(REPOSITORY / "finelip_sdxl", source / "finelip_sdxl", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source], capture_output=True, text=True
    )
    if built.returncode and "No matching distribution found for setuptools" in built.stderr:
        pytest.skip("pip cannot fetch setuptools, with which the wheel is built, on this machine")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    packages = {entry.name for entry in site.iterdir() if entry.suffix != ".dist-info"}
    assert packages - {"bin"} == {"finelip_sdxl"}
    package, pipelines, has_weights = imported_from(tmp_path, PYTHONPATH=str(site))
    assert Path(package) == site / "finelip_sdxl" / "__init__.py"
    assert Path(pipelines) == site / "finelip_sdxl" / "pipelines" / "__init__.py"
    assert has_weights == "True"
