"""What the tests of the training recipes share: how a run is stopped, started on two processes, and refused."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

processes = multiprocessing.get_context("forkserver")
RECIPES = ("training.align_adapter", "training.train_finelip", "training.train_lora")
processes.set_forkserver_preload(["torch.distributed", *RECIPES])


def forget_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Stop(Exception):
    """The run ends here."""


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillIn:
    """Before a function is called with this path, or before it has written more than `half` of the file."""

    def __init__(self, module: Any, name: str, path: str, half: bytes = b"") -> None:
        self.module, self.name, self.path, self.half = module.__name__, name, path, half

    def __call__(self) -> None:
        module = sys.modules[self.module]
        function = getattr(module, self.name)

        def deadly(*inputs: Any, **options: Any) -> Any:
            paths = [Path(value) for value in inputs if isinstance(value, str | Path)]
            if not any(str(path).endswith(self.path) for path in paths):
                return function(*inputs, **options)
            if self.half:
                paths[0].write_bytes(self.half)
            return die()

        setattr(module, self.name, deadly)


def nothing() -> None:
    """Let it live."""


def one_of_two(process: int, port: int, work: Callable[..., None], *inputs: Any) -> None:
    """Of a process: what torchrun sets, and then the work."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(RANK=str(process), LOCAL_RANK=str(process))
    torch.set_num_threads(1)
    work(process, *inputs)
    sys.stdout.flush()
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)  # gloo may abort at a regular exit, when all is done


def on_two_processes(work: Callable[..., None], *inputs: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [processes.Process(target=one_of_two, args=(process, port, work, *inputs)) for process in (0, 1)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(timeout=120)
    for process in pair:
        process.kill()
    assert [process.exitcode for process in pair] == [0, 0]


def refusal(recipe: Any, capsys: pytest.CaptureFixture, *flags: str) -> str:
    """The one sentence that ends a recipe's program."""
    forget_accelerator()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        recipe.main(flags)
    printed = capsys.readouterr().err
    assert stopped.value.code not in (0, None)
    message = stopped.value.code if isinstance(stopped.value.code, str) else printed.splitlines()[-1]
    assert "Traceback" not in printed + message
    assert "\n" not in message
    start = f"{Path(recipe.__file__).name}: error: "
    assert message.startswith(start)
    return message.removeprefix(start)
