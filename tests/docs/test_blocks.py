"""Every code block of the documents that can run on this machine is run, as a reader would."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finelip_sdxl.cli.main import main
from tests.helpers.documents import DOCUMENTS, REPOSITORY, Block, blocks_of

# README's test command runs these tests; contributors' commands make weights for hours, or serve the site.
APART = ("CONTRIBUTING.md",)
RUN = {
    document.relative_to(REPOSITORY).as_posix(): [
        block
        for block in blocks_of(document)
        if block.language in ("bash", "python") and block.not_run is None and "pytest" not in block.text
    ]
    for document in DOCUMENTS
}


@pytest.fixture
def clone(tmp_path: Path, monkeypatch) -> Path:
    """The working folder looks like a clone, and what a block writes is nobody else's."""
    for entry in REPOSITORY.iterdir():
        if entry.name not in ("runs", "site", "out") and not entry.name.startswith("."):
            (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands_of(block: Block) -> Iterator[list[str]]:
    if block.run_as is None:
        yield from block.commands()
    else:
        yield shlex.split(block.run_as)


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name, blocks in RUN.items() if blocks and name not in APART])
def test_the_code_of_a_page_runs(page: str, clone: Path, capsys) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}  # blocks of Python follow upon each other
    for block in RUN[page]:
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, block.document, "exec"), names)
            continue
        for command in commands_of(block):
            if command[0] == "finelip-sdxl":
                assert main(command[1:]) == 0, f"{block}: {capsys.readouterr().err}"
            else:
                assert command[0] == "python", f"{block}: a test knows no {command[0]}; say why it is not run"
                done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True)
                assert done.returncode == 0, f"{block}: {done.stderr[-3000:]}"


def test_a_block_that_is_not_run_says_why() -> None:
    for document in DOCUMENTS:
        for block in blocks_of(document):
            assert block.not_run is None or re.match(r"needs|trains|serves", block.not_run), str(block)


def test_the_reports_that_are_shown_are_those_of_the_commands(capsys) -> None:
    page = REPOSITORY / "docs/guides/long-prompts.md"
    shown = next(block.text for block in blocks_of(page) if block.language == "text")
    assert main(["tokens", "a red star in the top left"]) == 0
    assert capsys.readouterr().out == shown
