"""Files and folders that are whole: kills at every step, writers at once, odd names and places, full disks."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from finelip_sdxl import files
from finelip_sdxl.files import Stopped, check_file, check_writable, stopped_by_signals, written_folder, written_whole
from tests.helpers.full_disk import files_of_at_most

# A process that is light enough to be forked for every step of a writer, to end or fail there.
STEPS = """
import os, signal, sys
from pathlib import Path
from finelip_sdxl import files

root, how, step, exchanges, what = Path(sys.argv[1]), sys.argv[2], 0, sys.argv[3] == "True", sys.argv[4]
STEPS_OF_FILES = {"open", "os.chmod", "os.link", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir",
    "os.scandir", "os.symlink", "shutil.rmtree"}

def write(text):
    if what == "file":
        with files.written_whole(root / "out") as new:
            new.write_text(text * 9)
        return
    with files.written_folder(root / "out", lambda folder: {"index", "unet"}) as new:
        (new / "unet").mkdir()
        (new / "unet" / "weights").write_text(text)
        (new / "index").write_text(text)

def found():
    out = root / "out"
    if what == "file":
        return out.read_text()
    if not out.exists():
        return "aside"
    mine = (out / "notes" / "a.txt").read_text(), os.readlink(out / "link")
    assert mine == ("mine", "/nowhere"), mine
    return (out / "unet" / "weights").read_text() + (out / "index").read_text()

def end(event, arguments):
    global left
    if event in STEPS_OF_FILES and arguments and str(root) in str(arguments[0]):
        left -= 1
        if left == 0 and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if left == 0:
            raise {"interrupt": KeyboardInterrupt(), "failure": OSError(28, "No space left on device")}[how]

if not exchanges:
    files._exchange = lambda first, second: False
write("old")
if what == "folder":
    (root / "out" / "notes").mkdir()
    (root / "out" / "notes" / "a.txt").write_text("mine")
    os.symlink("/nowhere", root / "out" / "link")
reached = True
while reached:
    step += 1
    child = os.fork()
    if child == 0:
        left = step
        sys.addaudithook(end)
        try:
            write("new")
        except (KeyboardInterrupt, OSError):
            os._exit(0)
        os._exit(7 if left > 0 else 0)
    reached = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 7
    print(found(), len(os.listdir(root)) - 1)
    files.check_writable(root)
    assert os.listdir(root) == ["out"], os.listdir(root)
    assert found() in ("oldold", "newnew", "old" * 9, "new" * 9), found()
    write("old")
    assert found().startswith("old") and os.listdir(root) == ["out"]
"""


@pytest.mark.parametrize("how", ["kill", "interrupt", "failure"])
@pytest.mark.parametrize(("what", "exchanges"), [("file", True), ("folder", True), ("folder", False)])
def test_old_or_new_is_whole_wherever_a_writer_ends(tmp_path, what, how, exchanges) -> None:
    """And the next one that looks at the place leaves nothing there but that."""
    arguments = [str(tmp_path), how, str(exchanges), what]
    done = subprocess.run([sys.executable, "-c", STEPS, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    states = [line.split()[0] for line in done.stdout.splitlines()]
    assert len(states) > 15, "steps that were tried"
    whole = {"old" * 9, "new" * 9} if what == "file" else {"oldold", "newnew"}
    assert set(states) - {"aside"} == whole
    # Where no exchange is possible, one step lies between the old one's going and the new one's coming.
    assert states.count("aside") == (1 if how == "kill" and not exchanges else 0)


WRITERS = """
import os, sys, threading
from pathlib import Path
from finelip_sdxl import files

root, exchanges = Path(sys.argv[1]), sys.argv[2] == "True"
if not exchanges:
    files._exchange = lambda first, second: False

def write(writer):
    for turn in range(3):
        with files.written_folder(root / "out", lambda folder: {"a", "b"}) as new:
            (new / "a").write_text(writer)
            (new / "b").write_text(writer)
        with files.written_whole(root / "file") as new:
            new.write_text(writer * 99)
    done.append(writer)

for process in range(3):
    if os.fork() == 0:
        done = []
        threads = [threading.Thread(target=write, args=[f"{process}{thread}"]) for thread in range(2)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        os._exit(0 if len(done) == 2 else 1)
assert [os.wait()[1] for _ in range(3)] == [0, 0, 0]
"""


@pytest.mark.parametrize("exchanges", [True, False])
def test_writers_at_once_lose_nothing(tmp_path, exchanges) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    subprocess.run([sys.executable, "-c", WRITERS, str(tmp_path), str(exchanges)], check=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "a").read_text() == (out / "b").read_text()
    assert (tmp_path / "file").read_text() == (tmp_path / "file").read_text()[:2] * 99
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


def test_what_a_living_writer_has_begun_is_left_alone(tmp_path) -> None:
    with written_whole(tmp_path / "a") as first:
        first.write_text("first")
        with written_whole(tmp_path / "a") as second, written_folder(tmp_path / "b") as folder:
            second.write_text("second")
            (folder / "c").write_text("third")
        assert (tmp_path / "a").read_text() == "second"
    assert (tmp_path / "a").read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_only_own_workplaces_are_cleared_away(tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").write_text("mine")
    os.symlink(tmp_path / "mine", tmp_path / ".finelip-sdxl-link")
    (tmp_path / ".finelip-sdxl-notes").write_text("mine")
    check_writable(tmp_path)
    assert len(os.listdir(tmp_path)) == 3
    assert (tmp_path / "mine" / "a").read_text() == "mine"


# What is kept


def test_all_that_is_kept_stays_the_same_file(tmp_path) -> None:
    out = tmp_path / "out"
    (out / "loras" / "deep").mkdir(parents=True)
    (out / "loras" / "deep" / "a").write_text("mine")
    (out / "loras").chmod(0o700)
    (tmp_path / "elsewhere").mkdir()
    (out / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(out / ".pipe")
    (out / "index").write_text("old")
    before = (out / "loras" / "deep" / "a").stat()
    with written_folder(out, lambda folder: ["index"]) as new:
        (new / "index").write_text("new")
        with (out / "loras" / "deep" / "a").open("a") as file:
            file.write(", and more of it")
    after = (out / "loras" / "deep" / "a").stat()
    assert (after.st_ino, after.st_nlink) == (before.st_ino, 1)
    assert (out / "loras" / "deep" / "a").read_text() == "mine, and more of it"
    assert stat.S_IMODE((out / "loras").stat().st_mode) == 0o700
    assert (out / "linked").is_symlink()
    assert (out / ".pipe").is_fifo()
    assert (out / "index").read_text() == "new"


def test_what_is_kept_is_copied_where_the_disk_has_no_links(tmp_path, monkeypatch) -> None:
    def link(*arguments, **options) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("mine")
    with written_folder(out, lambda folder: []):
        pass
    assert (out / "a").read_text() == "mine"


def test_what_somebody_adds_at_the_last_moment_is_kept(tmp_path, monkeypatch) -> None:
    out, exchange = tmp_path / "out", files._exchange
    out.mkdir()

    def late(first: Path, second: Path) -> bool:
        (out / "late").write_text("mine")
        return exchange(first, second)

    monkeypatch.setattr(files, "_exchange", late)
    with written_folder(out, lambda folder: []) as new:
        (new / "a").touch()
    assert sorted(os.listdir(out)) == ["a", "late"]


def test_a_name_in_the_way_is_refused_and_nothing_is_changed(tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "unet").write_text("mine")
    with pytest.raises(FileExistsError, match=r"unet is in the way"), written_folder(out, lambda folder: []) as new:
        (new / "unet").mkdir()
    assert (out / "unet").read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]


def test_a_disk_that_is_mounted_in_a_folder_is_not_emptied(tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    (out / "loras" / "disk").mkdir(parents=True)
    (out / "loras" / "disk" / "a").write_text("mine")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    with (
        pytest.raises(FileExistsError, match="disk is a mounted disk"),
        written_folder(out, lambda folder: []),
    ):
        pass
    assert (out / "loras" / "disk" / "a").read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_came_meanwhile_is_not_touched(tmp_path) -> None:
    def write() -> None:
        with written_folder(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "a").write_text("another's")

    with pytest.raises(FileExistsError, match="exists by now"):
        write()
    assert (tmp_path / "out" / "a").read_text() == "another's"
    assert os.listdir(tmp_path) == ["out"]


# Where to


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path, there) -> None:
    (tmp_path / "far").mkdir()
    if there:
        (tmp_path / "far" / "file").write_text("old")
        (tmp_path / "far" / "folder").mkdir()
    for name in ("file", "folder"):
        (tmp_path / name).symlink_to(Path("far", name))
    with written_whole(tmp_path / "file") as new:
        new.write_text("new")
    with written_folder(tmp_path / "folder", os.listdir) as new:
        (new / "a").write_text("new")
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "folder").is_symlink()
    assert (tmp_path / "far" / "file").read_text() == (tmp_path / "far" / "folder" / "a").read_text() == "new"
    assert sorted(os.listdir(tmp_path / "far")) == ["file", "folder"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
        (lambda path: path.mkdir(), "is a directory: pass the name of a file"),
    ],
)
def test_what_is_no_place_for_a_file_is_refused_and_stays(tmp_path, make, message) -> None:
    make(tmp_path / "a")
    with pytest.raises(OSError, match=message):
        check_file(tmp_path / "a")
    with pytest.raises(OSError, match=message), written_whole(tmp_path / "a") as new:
        new.write_text("new")
    assert (tmp_path / "a").is_symlink() or (tmp_path / "a").is_dir()


def test_devices_and_pipes_are_written_to_and_stay(tmp_path) -> None:
    (tmp_path / "null").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()), daemon=True)
    reader.start()
    for name in ("/dev/null", tmp_path / "null", tmp_path / "pipe"):
        check_file(Path(name))
        with written_whole(Path(name)) as new:
            new.write_text("all of it")
    reader.join()
    assert read == ["all of it"]
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert (tmp_path / "null").is_symlink()
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["null", "pipe"]
    message = r"^/dev/full cannot be written to \(No space left on device\)"
    with pytest.raises(OSError, match=message), written_whole(Path("/dev/full")) as new:
        new.write_text("all of it")


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
@pytest.mark.parametrize("piped", [True, False])
def test_what_goes_to_the_output_comes_after_what_was_printed(tmp_path, name, piped) -> None:
    code = (
        "import sys; from pathlib import Path; from finelip_sdxl.files import written_whole\n"
        "print('printed')\n"
        "with written_whole(Path(sys.argv[1])) as new: new.write_text('written\\n')\n"
        "print('at last')"
    )
    if name == "link":
        name = str(tmp_path / "link")
        os.symlink("/dev/stdout", name)
    command, out = [sys.executable, "-c", code, name], tmp_path / "out"
    if piped:
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    else:
        with out.open("w") as file:
            subprocess.run(command, check=True, stdout=file)
        text = out.read_text()
    assert text == "printed\nwritten\nat last\n"


@pytest.mark.parametrize(
    "name", ["a" * 255, "two\nlines", os.fsdecode(b"not \xff utf-8"), " spaces ", "狐" * 85, "-a*?["]
)
def test_odd_names_are_names(tmp_path, name) -> None:
    file = tmp_path / name / name
    check_file(file)
    with written_whole(file) as new:
        save_file({"a": torch.zeros(1)}, new)
    file.rename(tmp_path / name / "a")
    with written_folder(file) as folder:
        (folder / name).write_text("all of it")
    assert (file / name).read_text() == "all of it"
    assert sorted(os.listdir(tmp_path / name)) == sorted(["a", name])


@pytest.mark.parametrize("name", ["a" * 256, "狐" * 86, "file/a", f"{'b' * 256}/a", "a\0b"])
def test_names_that_cannot_be_are_one_sentence(tmp_path, name) -> None:
    (tmp_path / "file").write_text("mine")
    file = tmp_path / name
    expected = ValueError if "\0" in name else OSError
    for check in (check_file, check_writable):
        with pytest.raises(expected, match=r"cannot be written to|is no directory|null (byte|character)"):
            check(file)
    for write in (written_whole, written_folder):
        with pytest.raises(expected), write(file):
            pass
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_is_gone_when_all_is_drawn_is_one_sentence(tmp_path) -> None:
    def write() -> None:
        with written_whole(tmp_path / "out" / "a.txt") as new:
            shutil.rmtree(tmp_path / "out")
            new.write_text("all of it")

    with pytest.raises(OSError, match=r"a\.txt cannot be written to \(No such file or directory\)"):
        write()


def test_an_error_about_something_else_is_not_about_the_file(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="/nowhere/input"), written_whole(tmp_path / "a"):
        Path("/nowhere/input").read_text()
    with pytest.raises(RuntimeError, match=r"^shapes$"), written_whole(tmp_path / "a"):
        raise RuntimeError("shapes")
    assert not os.listdir(tmp_path)


# Modes


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_new_files_and_folders_have_the_mode_of_the_umask(tmp_path, umask) -> None:
    with written_whole(tmp_path / "a.safetensors") as new:
        save_file({"a": torch.zeros(1)}, new)  # which gives it 0600
    with written_folder(tmp_path / "b") as folder:
        (folder / "deep").mkdir()
        save_file({"a": torch.zeros(1)}, folder / "deep" / "a.safetensors")
    assert mode(tmp_path / "a.safetensors") == mode(tmp_path / "b" / "deep" / "a.safetensors") == 0o640
    assert mode(tmp_path / "b") == mode(tmp_path / "b" / "deep") == 0o750


def test_what_is_replaced_hands_on_its_mode(tmp_path, umask) -> None:
    (tmp_path / "a").write_text("private")
    (tmp_path / "a").chmod(0o600)
    (tmp_path / "b").mkdir(mode=0o700)
    (tmp_path / "b" / "kept").write_text("private")
    (tmp_path / "b" / "kept").chmod(0o400)
    with written_whole(tmp_path / "a") as new:
        new.write_text("new")
    with written_folder(tmp_path / "b", lambda folder: []) as folder:
        (folder / "new").touch()
    assert (mode(tmp_path / "a"), mode(tmp_path / "b"), mode(tmp_path / "b" / "kept")) == (0o600, 0o700, 0o400)


# Full disks


WRITES = {
    "safetensors": lambda file: save_file({"a": torch.zeros(9999)}, file),
    "torch": lambda file: torch.save({"a": torch.zeros(9999)}, file),
    "torch by a stream": lambda file: torch.save({"a": torch.zeros(9999)}, file.open("wb")),
    "tokenizers": lambda file: Tokenizer(models.BPE({chr(n): n for n in range(99, 2999)}, [])).save(str(file)),
    "pillow": lambda file: Image.frombytes("L", (99, 99), os.urandom(99 * 99)).save(file, format="PNG"),
    "text": lambda file: file.write_text("a" * 99999),
}


@pytest.mark.parametrize("library", WRITES)
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path, library) -> None:
    def write_all(folder: Path) -> None:
        with written_folder(folder, os.listdir) as new:
            (new / "half").write_text("of it")
            write(new / "a")

    write = WRITES[library]
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a").write_text("old")
    with files_of_at_most(1000):
        message = r"cannot be written to \((File too large|not all of it was taken, as by a full disk)\): make room"
        with pytest.raises(OSError, match=message), written_whole(tmp_path / "a") as new:
            write(new)
        with pytest.raises(OSError, match=message):
            write_all(tmp_path / "b")
    assert (tmp_path / "a").read_text() == (tmp_path / "b" / "a").read_text() == "old"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "a", "b"]


# Signals


@pytest.mark.usefixtures("heard_signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_stops_as_an_interrupt_does_and_nothing_is_left(tmp_path, name) -> None:
    def write() -> None:
        with stopped_by_signals(), written_folder(tmp_path / "a") as new:
            (new / "half").write_text("of it")
            signal.raise_signal(number)

    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=name) as raised:
        write()
    assert raised.value.number == number
    assert signal.getsignal(number) == before
    assert not os.listdir(tmp_path)


@pytest.mark.usefixtures("heard_signals")  # which puts back the handlers
def test_signals_that_are_ignored_or_handled_stay_so() -> None:
    handled = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` sets it
    signal.signal(signal.SIGTERM, lambda *_: handled.append(1))
    with stopped_by_signals():
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
    assert handled == [1]


def test_threads_other_than_the_main_one_take_no_signals() -> None:
    done = []

    def run() -> None:
        with stopped_by_signals():
            done.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [before]


def test_a_forked_child_ends_without_a_word(tmp_path) -> None:
    code = (
        "import os, signal, sys; from finelip_sdxl.files import stopped_by_signals\n"
        "with stopped_by_signals():\n"
        "    if os.fork() == 0: signal.raise_signal(signal.SIGTERM)\n"
        "    print(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (json.loads(done.stdout), done.stderr) == (128 + signal.SIGTERM, "")
