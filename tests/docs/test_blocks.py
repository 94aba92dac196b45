"""Every code block of the documents that can run on this machine is run, as a reader would."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from finelip_sdxl.cli.main import main
from tests.helpers.documents import DOCUMENTS, REPOSITORY, Block, blocks_of

RUN = {
    document.relative_to(REPOSITORY).as_posix(): [
        block for block in blocks_of(document) if block.language in ("bash", "python") and block.not_run is None
    ]
    for document in DOCUMENTS
}
# README's test command runs these tests; contributors' commands make weights for hours, or serve the site.
APART = ("CONTRIBUTING.md",)
PAGES = [name for name, blocks in RUN.items() if blocks and name not in APART]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like a clone, in which what a block writes is nobody else's."""
    for entry in REPOSITORY.iterdir():
        if entry.name not in (".git", ".venv", "runs", "site", "out") and not entry.name.startswith("."):
            (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


def as_script(block: Block) -> str:
    """A block of shell with its programs from this environment, and without the installation of packages."""
    if block.run_as is not None:
        return block.run_as
    return "\n".join(shlex.join(command) for command in block.commands())


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, clone: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    program: list[str] = []  # blocks of Python follow upon each other, and are one program
    for block in RUN[page]:
        if block.language == "python":
            program.append(block.text)
        elif "pytest" not in block.text:
            script = ["bash", "-euo", "pipefail", "-c", as_script(block)]
            done = subprocess.run(script, cwd=clone, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{block}\n{done.stderr[-3000:]}"
    if program:
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(program)], cwd=clone, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{page}\n{done.stderr[-3000:]}"


def test_a_block_that_is_not_run_says_why() -> None:
    for document in DOCUMENTS:
        for block in blocks_of(document):
            assert block.not_run is None or re.match(r"needs|trains|serves", block.not_run), str(block)


def test_the_reports_that_are_shown_are_those_of_the_commands(capsys) -> None:
    page = REPOSITORY / "docs/guides/long-prompts.md"
    shown = next(block.text for block in blocks_of(page) if block.language == "text")
    assert main(["tokens", "a red star in the top left"]) == 0
    assert capsys.readouterr().out == shown
