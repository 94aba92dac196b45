"""What the documents promise: links lead somewhere, flags exist, code is Python, and figures have one place."""

import ast
import re
from pathlib import Path

import pytest

from docs.site_extension import parser_of
from tests.helpers.documents import DOCUMENTS, REPOSITORY, Block, anchors_of, blocks_of, links_of

NAMES = [document.relative_to(REPOSITORY).as_posix() for document in DOCUMENTS]
BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]
# Words of British spelling; the code and the documents are American.
BRITISH = re.compile(
    r"\b(?:(?:colour|behaviour|neighbour|favour)\w*|(?:normal|optim|initial|general|recogn)is\w+"
    r"|labelled|cancelled|centre[sd]?|licence|grey|(?:to|after|up|down|back|for)wards)\b"
)


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name: str) -> None:
    document = REPOSITORY / name
    text = document.read_text(encoding="utf-8")
    for target in links_of(text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (document.parent / path).resolve() if path else document
        assert there.exists(), f"{name}: {target}"
        assert there.is_relative_to(REPOSITORY), f"{name}: {target} leads out of the repository"
        if anchor:
            assert anchor in anchors_of(there.read_text(encoding="utf-8")), f"{name}: {target}"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("docs/")])
def test_a_page_of_the_site_links_to_nothing_outside_of_it(name: str) -> None:
    document = REPOSITORY / name
    for target in links_of(document.read_text(encoding="utf-8")):
        if not re.match(r"https?://", target):
            path = target.partition("#")[0]
            assert (document.parent / path).resolve().is_relative_to(REPOSITORY / "docs"), f"{name}: {target}"


def is_of_a_parser(command: list[str]) -> bool:
    return command[0] == "finelip-sdxl" or any(word.startswith(("training/", "demo/app.py")) for word in command[:4])


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "bash"], ids=str)
def test_every_flag_of_a_command_exists(block: Block, capsys) -> None:
    for command in filter(is_of_a_parser, block.commands()):
        programs = [word for word in command if word == "finelip-sdxl" or word.endswith(".py")]
        if programs[0].startswith(("training/measure", "training/miniature")):
            continue
        parse, words = parser_of(programs[0]), command[command.index(programs[0]) + 1 :]
        try:
            parse(words)
        except SystemExit as ended:
            pytest.fail(f"{block}: {capsys.readouterr().err or ended}")


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_every_block_of_python_can_be_compiled(block: Block) -> None:
    ast.parse(block.text)


def test_the_site_names_every_page_once() -> None:
    text = (REPOSITORY / "zensical.toml").read_text(encoding="utf-8")
    named = re.findall(r'"([\w/-]+\.md)"', text)
    pages = {page.relative_to(REPOSITORY / "docs").as_posix() for page in (REPOSITORY / "docs").rglob("*.md")}
    assert sorted(named) == sorted(pages)


def test_readme_is_short_and_says_untried_once() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 130
    assert readme.count("no GPU") == 1
    assert "untried" not in readme


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_spelling_is_american(name: str) -> None:
    text = Path(REPOSITORY, name).read_text(encoding="utf-8")
    assert not BRITISH.findall(text)


@pytest.mark.parametrize("name", [name for name in NAMES if re.match(r"docs/results/(?!index)", name)])
def test_a_page_of_results_begins_with_its_finding_and_names_its_command(name: str) -> None:
    title, finding, rest = Path(REPOSITORY, name).read_text(encoding="utf-8").split("\n\n", 2)
    assert title.startswith("# ")
    assert len(re.findall(r"\.(?=\s|$)", finding)) == 2, f"{name} begins with two sentences of finding"
    assert "|---" in rest
    for figures in re.findall(r"^\(`.*?\)$", rest, flags=re.MULTILINE | re.DOTALL):
        assert re.search(r"20\d\d-\d\d-\d\d", figures), f"{name}: {figures} has no date"
        assert "cores" in figures, f"{name}: {figures} names no machine"
