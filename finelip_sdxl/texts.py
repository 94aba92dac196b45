"""Users' text files, decoded strictly and cut into lines."""

from pathlib import Path


def read_text(path: Path) -> str:
    """Returns the text of a UTF-8 file, without a byte order mark.

    Raises:
        FileNotFoundError: it is not there, or is no regular file.
        ValueError: it is not UTF-8; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is no file: pass the name of a text file.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(_split(error.object[: error.start].decode("latin-1")))
        raise ValueError(f"{path} is not UTF-8 text (in line {line}, {error.reason}): save it as UTF-8.") from error
    if "\0" in text:
        line = len(_split(text[: text.index("\0")]))
        raise ValueError(f"{path} is not UTF-8 text (line {line} holds a NUL, as in UTF-16): save it as UTF-8.")
    return text


def lines_of(text: str) -> list[tuple[int, str]]:
    """Returns the lines that are not blank, with their numbers from 1.

    Lines end at a line feed, a carriage return, or both. (`str.splitlines` also breaks at U+2028, a form feed and
    others, and captions hold these.)

    Examples:
        >>> lines_of("A fox.\\u2028It sleeps.\\r\\n\\nA hare.")
        [(1, 'A fox.\\u2028It sleeps.'), (3, 'A hare.')]
    """
    return [(number, line) for number, line in enumerate(_split(text), 1) if line.strip()]


def _split(text: str) -> list[str]:
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
