"""The documents of the repository: their code blocks, headings and links.

A code block of a document is run by the tests, unless the line before it says why not, or says what to run instead:

    <!-- not run: needs the hub -->
    <!-- run as: finelip-sdxl evaluate images --data miniature:2 -->
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# Build outputs and environments hold documents of others.
DOCUMENTS = sorted(
    [
        *REPOSITORY.glob("*.md"),
        *(REPOSITORY / "docs").rglob("*.md"),
        *(REPOSITORY / name / "README.md" for name in ("demo", "examples", "finelip_sdxl/miniature")),
    ]
)

_BLOCK = re.compile(
    r"^(?P<mark><!-- (?:not run|run as): [^\n]+ -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<target>[^)\s]+)\)")
_INSTALL = re.compile(r"^.*\bpip install\b[^&]*(?:&&|$)")


@dataclass(frozen=True)
class Block:
    """A code block of a document.

    Attributes:
        document: path of the document in the repository.
        line: line of its first line, from 1.
        language: the word behind its fence.
        text: what stands in it.
        not_run: why it is not run; None if it is.
        run_as: what is run in its place; None for the block itself.
    """

    document: str
    line: int
    language: str
    text: str
    not_run: str | None = None
    run_as: str | None = None

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """The commands of a block of shell, in words, without the installation of packages.

        Examples:
            >>> block = Block("a.md", 1, "bash", "pip install -e . && .venv/bin/finelip-sdxl tokens 'a fox'\\n")
            >>> list(block.commands())
            [['finelip-sdxl', 'tokens', 'a fox']]
        """
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(_INSTALL.sub("", line), comments=True)
            if words:
                yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def blocks_of(document: Path) -> list[Block]:
    """The code blocks of a document, in their order."""
    text, name = document.read_text(encoding="utf-8"), document.relative_to(REPOSITORY).as_posix()
    found = []
    for match in _BLOCK.finditer(text):
        kind, _, said = (match["mark"] or "").removeprefix("<!-- ").removesuffix(" -->\n").partition(": ")
        marks = {"not_run": said if kind == "not run" else None, "run_as": said if kind == "run as" else None}
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(name, line, match["language"], match["text"], **marks))
    return found


def links_of(text: str) -> list[str]:
    """The targets of the links of a document, without those in code.

    Examples:
        >>> links_of("[one](a.md#b), `[no](c.md)` and ![a picture](d.png)")
        ['a.md#b', 'd.png']
    """
    without_code = re.sub(r"`[^`\n]+`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [match["target"] for match in _LINK.finditer(without_code)]


def anchors_of(text: str) -> set[str]:
    """The anchors of a document's headings, as the forges and the site make them.

    Examples:
        >>> sorted(anchors_of("# A title\\n\\n## With `code`, and more\\n"))
        ['a-title', 'with-code-and-more']
    """
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", without_code, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
