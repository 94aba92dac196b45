"""Files and folders that are written completely or not at all, even if the writer is stopped.

They are first written to a workplace: a hidden folder beside their place, so on the same disk. A lock protects it as
long as its process lives. The next process that writes in the same place removes the workplaces of dead processes.
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
# Messages of libraries in Rust (safetensors, tokenizers) and in C++ (torch) about files that could not be written
_OS_ERROR = re.compile(r"os error (\d+)\)")
_TORCH_ERROR = re.compile(r"inline_container|PytorchStreamWriter|iostream error")


# Checks before the work


def check_writable(folder: Path) -> None:
    """Check that files can be written to a folder, which may not exist yet, before work is spent on them.

    Raises:
        OSError: they cannot.

    Examples:
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
    """Check that a file of this name can be written, before work is spent on it.

    Raises:
        OSError: it is a directory, its name is too long, or nothing can be written in its place.

    Examples:
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
    """A temporary name to write to. At the end of the block the file takes the place of `file`.

    If the block fails, nothing changes. A link stays, and its target is replaced. A device, a pipe or an open
    descriptor (`/dev/stdout`) is written to. The new file gets the mode of the old one, or else the mode of the umask.

    Raises:
        OSError: the file cannot be written; nothing has changed.

    Examples:
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
    """An empty temporary folder to write to. At the end of the block it takes the place of `folder`.

    If the block fails, nothing changes. At every instant the old folder or the new one is there, complete, with all
    other files that people keep in it. On systems that cannot exchange two folders in one step (Linux can), a kill
    between two steps can leave the old folder in the workplace; the next process that writes or checks there puts it
    back.

    Args:
        folder: the folder; a link is followed, and stays.
        replaced: a function that returns the names in an existing folder that the new one replaces; all others are
            kept (`os.listdir` keeps none). With None an existing folder is never replaced.

    Raises:
        FileExistsError: the folder exists and `replaced` is None (another process may have been faster), or the new
            folder has the name of a file that is kept.
        OSError: the folder cannot be written; nothing has changed.

    Examples:
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
            os.chmod(parent, stat.S_IMODE(new.stat().st_mode))  # a library may have made it for its owner alone
            for name in files:
                _finish(Path(parent, name), mode)
            _sync(Path(parent))
        with _locked(target.parent):
            if os.path.lexists(target):
                if replaced is None:
                    raise FileExistsError(f"{folder} exists by now: pass another place, or remove it.")
                _replace(target, new, place, replaced(target))
            else:
                os.rename(new, target)
            _sync(target.parent)


@contextmanager
def writing_errors(target: Path) -> Iterator[None]:
    """Turn the writing errors of all libraries (a full disk, a bad place) into one sentence.

    `written_whole` and `written_folder` include this.

    Raises:
        OSError: `target` cannot be written to, and the reason.

    Examples:
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
    """A signal to end the process; `number` is the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP stop the process as Ctrl-C does, so half-written files are removed.

    Raises:
        Stopped: one of these signals came.

    Examples:
        >>> with stopped_by_signals():
        ...     pass
    """
    process = os.getpid()

    def stop(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a forked child has nothing to remove
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
    """A folder for this writer alone in `parent`; it is removed afterward."""
    parent.mkdir(parents=True, exist_ok=True)
    place = parent / f"{_WORKPLACE}{secrets.token_hex(8)}"
    with _locked(parent):  # else another writer could remove this workplace before it is locked
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
    """One writer of this user at a time, while folders are exchanged."""
    file = parent / f"{_WORKPLACE}{os.getuid() if hasattr(os, 'getuid') else ''}.lock"
    file.touch()  # raises where nothing can be written; a lock would wait without end
    lock = _lock(file)
    lock.acquire(poll_interval=0.01)
    try:
        yield
    finally:
        with suppress(OSError):  # the next in line notices that it is gone, and makes another
            file.unlink()
        lock.release()


def _lock(file: Path) -> Any:
    from filelock import FileLock  # here, since its import would double the time that a command needs to start

    return FileLock(file)


def _clear_dead(parent: Path) -> None:
    for place in parent.glob(f"{_WORKPLACE}*"):
        with suppress(OSError):  # its writer lives, or has just removed it, or is another user
            found = place.lstat()
            if stat.S_ISDIR(found.st_mode) and (not hasattr(os, "getuid") or found.st_uid == os.getuid()):
                with _lock(place / "lock").acquire(timeout=0):
                    _clear(place)


def _clear(place: Path) -> None:
    """Remove a workplace. An old folder in it goes back to its place first, if no new one is there."""
    aside = place / "old"
    for old in aside.iterdir() if aside.exists() else ():
        home = place.parent / old.name
        if not os.path.lexists(home):
            os.rename(old, home)
            logger.warning("%s is as it was before: the process that was to replace it was stopped.", home)
    shutil.rmtree(place, ignore_errors=True)


# Steps


def _replace(target: Path, new: Path, place: Path, names: Collection[str]) -> None:
    """Put `new` in the place of `target`, with its other files than `names`; the old folder stays in the workplace."""
    kept = [name for name in os.listdir(target) if name not in names]
    for name in kept:
        if os.path.lexists(new / name):
            raise FileExistsError(f"{target / name} is in the way, and would not be replaced: move it away.")
        _link(target / name, new / name)
    shutil.copymode(target, new)
    _sync(new)
    if _exchange(new, target):
        old = new
    else:
        old = place / "old" / target.name
        old.parent.mkdir()
        os.rename(target, old)  # if the process is killed here, `_clear` puts it back
        os.rename(new, target)
    for name in os.listdir(old):  # files that were added meanwhile
        if name not in names:
            _link(old / name, target / name)


def _link(source: Path, copy: Path) -> None:
    """Put a kept file or folder into another folder as well, by a hard link if the disk can. Existing names stay."""
    if source.is_dir() and not source.is_symlink():
        if os.path.ismount(source):  # it would stay in the old folder
            raise FileExistsError(f"{source} is a mounted disk, so its folder cannot be replaced: pass another place.")
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
    """Exchange the names of two folders in one step; False where the system cannot."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "renameat2"):
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h> and <linux/fs.h>
    status: int = libc.renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange)
    return status == 0


def _finish(file: Path, mode: int) -> None:
    """Put all of a file on the disk and set its mode; safetensors makes files readable to their owner alone."""
    _sync(file)
    file.chmod(mode)


def _sync(path: Path) -> None:
    """Put all of a file, or the names in a folder, on the disk."""
    if os.name == "posix":  # elsewhere folders cannot be opened, nor files synced that are only read
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_stream(file: Path) -> bool:
    """Whether a name stands for a device, a pipe or an open descriptor.

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
    """As `os.path.lexists`, but with an error for a name that is too long, or in a place that is no directory."""
    with suppress(FileNotFoundError):
        path.lstat()
        return True
    return False


def _descriptor(file: Path) -> int | None:
    """The number of this process's open file behind a name such as `/dev/stdout`; None for other names."""
    name = os.path.abspath(file)
    for _ in range(40):  # systems follow at most 40 links
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
    sys.stdout.flush()  # printed text comes first
    return os.fdopen(os.dup(number), "wb")


def _reason(error: Exception, target: Path) -> str | None:
    """The reason in an error that `target` cannot be written; None if the error is about something else."""
    if isinstance(error, OSError):
        named = Path(os.path.realpath(error.filename)) if isinstance(error.filename, str) else target
        related = named.is_relative_to(target.parent) or target.is_relative_to(named)
        return error.strerror if error.errno is not None and related else None
    if found := _OS_ERROR.search(str(error)):
        return os.strerror(int(found[1]))
    if isinstance(error, RuntimeError) and _TORCH_ERROR.search(str(error)):
        return "not all of it was taken, as by a full disk"
    return None
