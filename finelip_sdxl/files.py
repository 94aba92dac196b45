"""Files and folders that are whole whenever they are there, whatever stops the one who writes them.

What is written lies first in a workplace: a hidden folder beside its place, so on the same disk. It is held by a lock
that goes with its process, and the next one that writes in the same place removes what a dead one has left.
"""

import ctypes
import errno
import logging
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)

_WORKPLACE = ".finelip-sdxl-"
# How libraries in Rust (safetensors, tokenizers) and in C++ (torch) say that a file could not be written.
_OS_ERROR = re.compile(r"os error (\d+)\)")
_TORCH_ERROR = re.compile(r"inline_container|PytorchStreamWriter|iostream error")


# Checks before the work


def check_writable(folder: Path) -> None:
    """See whether files can be written to a folder, or where it is to be made, before they cost work.

    Raises:
        OSError: they cannot.

    Example:
        >>> check_writable(Path("not/yet/there"))
    """
    with writing_errors(folder):
        place = Path(os.path.realpath(folder))
        while not _is_there(place):
            place = place.parent
        if not place.is_dir():
            raise NotADirectoryError(f"{place} is no directory: pass another place.")
        with _workplace(place):
            pass


def check_file(file: Path) -> None:
    """See whether a file of this name can be written, before it costs work.

    Raises:
        OSError: it is a directory, too long a name, or in a place where nothing can be written.

    Example:
        >>> check_file(Path("not/yet/there.txt"))
    """
    with writing_errors(file):
        if not _is_stream(file):
            check_writable(Path(os.path.realpath(file)).parent)
        elif not os.access(file, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


# Writing


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Another name to write under first, which takes the place of `file` when that went well.

    A link stays, and what it leads to is replaced. A device, a pipe or an open descriptor (`/dev/stdout`) is written
    to. A file that is replaced hands on its mode; a new one's follows from the umask, whatever the writer gives it.

    Raises:
        OSError: the file cannot be written; what was there is as it was.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with written_whole(Path(folder, "a.txt")) as temporary:
        ...         _ = temporary.write_text("all of it")
        ...     Path(folder, "a.txt").read_text()
        'all of it'
    """
    file = Path(file)
    with writing_errors(file):
        if _is_stream(file):
            with tempfile.TemporaryDirectory() as place:
                yield (new := Path(place, "new"))
                with new.open("rb") as source, _open_stream(file) as stream:
                    shutil.copyfileobj(source, stream)
            return
        target = Path(os.path.realpath(file))
        with _workplace(target.parent) as place:
            new = place / "new"
            new.touch()
            mode = stat.S_IMODE((target if target.exists() else new).stat().st_mode)
            new.unlink()
            yield new
            _finish(new, mode)
            os.replace(new, target)
            _sync(target.parent)


@contextmanager
def written_folder(folder: Path, replaced: Callable[[Path], Collection[str]] | None = None) -> Iterator[Path]:
    """An empty folder to write to, which takes the place of `folder` when that went well.

    At every instant the old folder or the new one is there whole, with all that others keep in it. Where the system
    cannot exchange two folders in one step (Linux can), a kill between two steps can leave the old one in the
    workplace: the next one that writes or checks there puts it back.

    Args:
        folder: a link is followed, and stays.
        replaced: gives the names in a folder that is there that the new one takes the place of; everything else in it
            is kept (`os.listdir` keeps nothing). None: a folder that is there is not touched.

    Raises:
        FileExistsError: the folder is there (another process may have been faster), or a name in the new one is that
            of something that is kept.
        OSError: the folder cannot be written; what was there is as it was.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as parent:
        ...     with written_folder(Path(parent, "a")) as new:
        ...         _ = Path(new, "b.txt").write_text("all of it")
        ...     os.listdir(parent)
        ['a']
    """
    folder = Path(folder)
    target = Path(os.path.realpath(folder))
    with writing_errors(folder), _workplace(target.parent) as place:
        new = place / "new"
        new.mkdir()
        yield new
        mode = stat.S_IMODE(new.stat().st_mode) & 0o666
        for parent, _, files in os.walk(new):
            for name in files:
                _finish(Path(parent, name), mode)
            _sync(Path(parent))
        with _locked(target.parent):
            if os.path.lexists(target):
                if replaced is None:
                    raise FileExistsError(f"{folder} exists by now: pass another place, or have it replaced.")
                _replace(target, new, place, replaced(target))
            else:
                os.rename(new, target)
            _sync(target.parent)


@contextmanager
def writing_errors(target: Path) -> Iterator[None]:
    """A full disk or a bad place in one sentence, whichever library writes. `written_whole` and `written_folder` do
    this for what is written in them.

    Raises:
        OSError: says what cannot be written to, and why.

    Example:
        >>> with writing_errors(Path("model")):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
        OSError: model cannot be written to (No space left on device): make room, or pass another place.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error, Path(os.path.realpath(target)))
        if reason is None:
            raise
        raise OSError(f"{target} cannot be written to ({reason}): make room, or pass another place.") from error


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP stop as Ctrl-C does, so that what is half written is removed.

    Raises:
        Stopped: one of them came.

    Example:
        >>> with stopped_by_signals():
        ...     pass
    """
    process = os.getpid()

    def stop(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a child that was forked has nothing to clear away
            os._exit(128 + number)
        raise Stopped(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # `nohup` ignores SIGHUP
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Workplaces


@contextmanager
def _workplace(parent: Path) -> Iterator[Path]:
    """A folder of this writer's own in `parent`, which is gone afterwards."""
    parent.mkdir(parents=True, exist_ok=True)
    place = parent / f"{_WORKPLACE}{secrets.token_hex(8)}"
    with _locked(parent):  # else another one could take a workplace that is not locked yet for a dead one's
        _clear_dead(parent)
        place.mkdir(mode=0o700)
        lock = _lock(place / "lock")
        lock.acquire()
    try:
        yield place
    finally:
        try:
            _clear(place)
        finally:
            lock.release()
            shutil.rmtree(place, ignore_errors=True)  # on Windows, where a locked file cannot be removed


@contextmanager
def _locked(parent: Path) -> Iterator[None]:
    """One writer of this user's at a time, for as long as folders take each other's places."""
    file = parent / f"{_WORKPLACE}{os.getuid() if hasattr(os, 'getuid') else ''}.lock"
    file.touch()  # fails where nothing can be written; a lock would wait there
    lock = _lock(file)
    lock.acquire(poll_interval=0.01)
    try:
        yield
    finally:
        with suppress(OSError):  # whoever waits for it sees that it is gone, and makes another
            file.unlink()
        lock.release()


def _lock(file: Path) -> Any:
    from filelock import FileLock  # as slow to import as all else that a command needs to start

    return FileLock(file)


def _clear_dead(parent: Path) -> None:
    for place in parent.glob(f"{_WORKPLACE}*"):
        with suppress(OSError):  # its writer lives or has just removed it, or it is another user's
            found = place.lstat()
            if stat.S_ISDIR(found.st_mode) and (not hasattr(os, "getuid") or found.st_uid == os.getuid()):
                with _lock(place / "lock").acquire(timeout=0):
                    _clear(place)


def _clear(place: Path) -> None:
    """Remove a workplace, after a folder that was to be replaced is back where it was if nothing took its place."""
    aside = place / "old"
    for old in aside.iterdir() if aside.exists() else ():
        home = place.parent / old.name
        if not os.path.lexists(home):
            os.rename(old, home)
            logger.warning("%s is there as it was: what was to replace it did not come to its end.", home)
    shutil.rmtree(place, ignore_errors=True)


# Steps


def _replace(target: Path, new: Path, place: Path, names: Collection[str]) -> None:
    """`new` in the place of `target`, with all in it but `names`; the old one is left in the workplace."""
    kept = [name for name in os.listdir(target) if name not in names]
    for name in kept:
        if os.path.lexists(new / name):
            raise FileExistsError(f"{target / name} is in the way, and no part of what is replaced: move it away.")
        _link(target / name, new / name)
    shutil.copymode(target, new)
    _sync(new)
    if _exchange(new, target):
        old = new
    else:
        old = place / "old" / target.name
        old.parent.mkdir()
        os.rename(target, old)  # should all end here, `_clear` puts it back
        os.rename(new, target)
    for name in os.listdir(old):  # what somebody added meanwhile
        if name not in names:
            _link(old / name, target / name)


def _link(source: Path, copy: Path) -> None:
    """What somebody keeps in a folder, in another one as well: no copy where the disk can. What is there stays."""
    if source.is_dir() and not source.is_symlink():
        if os.path.ismount(source):  # it would go with the old folder
            raise FileExistsError(f"{source} is where a disk is mounted, so nothing can take its folder's place.")
        copy.mkdir(exist_ok=True)
        for name in os.listdir(source):
            _link(source / name, copy / name)
        shutil.copystat(source, copy)
    elif not os.path.lexists(copy):
        try:
            os.link(source, copy, follow_symlinks=False)
        except (OSError, NotImplementedError):
            shutil.copy2(source, copy, follow_symlinks=False)


def _exchange(first: Path, second: Path) -> bool:
    """Give two folders each other's names in one step; False where the system cannot."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "renameat2"):
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h> and <linux/fs.h>
    status: int = libc.renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange)
    return status == 0


def _finish(file: Path, mode: int) -> None:
    """All of a file on the disk, and readable to whom its mode says: safetensors gives files to their owner alone."""
    _sync(file)
    file.chmod(mode)


def _sync(path: Path) -> None:
    """All of a file, or the names in a folder, on the disk."""
    if os.name == "posix":  # elsewhere folders cannot be opened, nor files synced that are only read
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_stream(file: Path) -> bool:
    """Whether bytes go through a name to somewhere else: a device, a pipe, a descriptor.

    Raises:
        OSError: it is a directory, or a link that leads back to itself.
    """
    try:
        found = file.stat()
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(f"{file} is a directory: pass the name of a file.")
    return not stat.S_ISREG(found.st_mode) or _descriptor(file) is not None


def _is_there(path: Path) -> bool:
    """As `os.path.lexists`, which also says no to a name that is too long or in a place that is no directory."""
    with suppress(FileNotFoundError):
        path.lstat()
        return True
    return False


def _descriptor(file: Path) -> int | None:
    """The number of this process's open file that a name such as `/dev/stdout` leads to."""
    name = os.path.abspath(file)
    for _ in range(40):  # links, of which systems follow no more
        name = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
        if found := re.fullmatch(rf"/proc/{os.getpid()}/fd/(\d+)", name):
            return int(found[1])
        if not os.path.islink(name):
            break
        name = os.path.join(os.path.dirname(name), os.readlink(name))
    return None


def _open_stream(file: Path) -> BinaryIO:
    number = _descriptor(file)
    if number is None:
        return file.open("wb")
    sys.stdout.flush()  # what was printed comes first
    return os.fdopen(os.dup(number), "wb")


def _reason(error: Exception, target: Path) -> str | None:
    """Why something could not be written, unless an error is about something else."""
    if isinstance(error, OSError):
        named = Path(os.path.realpath(error.filename)) if isinstance(error.filename, str) else target
        related = named.is_relative_to(target.parent) or target.is_relative_to(named)
        return error.strerror if error.errno is not None and related else None
    if found := _OS_ERROR.search(str(error)):
        return os.strerror(int(found[1]))
    if isinstance(error, RuntimeError) and _TORCH_ERROR.search(str(error)):
        return "not all of it was taken, as by a full disk"
    return None
