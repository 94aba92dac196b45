"""Files that are whole whenever they are there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_writable(folder: Path) -> None:
    """See whether files can be written to a folder, or where it is to be made, before they cost work.

    Raises:
        OSError: they cannot.

    Example:
        >>> check_writable(Path("not/yet/there"))
    """
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written to ({error.strerror}): pass another place.") from error


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Another name to write under first, which takes the place of `file` when that went well.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with written_whole(Path(folder, "a.txt")) as temporary:
        ...         _ = temporary.write_text("all of it")
        ...     Path(folder, "a.txt").read_text()
        'all of it'
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
