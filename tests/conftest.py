"""What all tests share: the order of random numbers, which skips CI allows, and a tiny SDXL."""

import copy
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: there is a worker for each core

import random
import signal
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, EulerDiscreteScheduler, StableDiffusionXLPipeline

from finelip_sdxl import FineLIPSDXLPipeline
from tests.helpers.tiny_sdxl import make_text_encoders, make_tokenizer, make_unet

# Reasons for which a test may be skipped in CI: the machine has no GPU.
ALLOWED_SKIPS = ("needs a CUDA device",)


def _seed(name: str) -> None:
    """Random numbers that depend on a name alone, not on what ran before."""
    seed = zlib.crc32(name.encode())
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` writes the stack down for every absent device
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed)
    random.seed(seed)


def pytest_collection_finish() -> None:
    """Spare the garbage collector the half million objects of the libraries: it went through them time and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request) -> None:
    _seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    _seed(item.nodeid)


def pytest_terminal_summary(terminalreporter, config) -> None:
    terminalreporter.write_line(f"random order: --randomly-seed={config.getoption('randomly_seed', 'none')}")


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Fail CI where a test was skipped without leave: it would not exist there."""
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("CI") or reporter is None:
        return
    skipped = [(report.nodeid, report.longrepr[2]) for report in reporter.stats.get("skipped", ())]
    refused = [f"{name}: {why}" for name, why in skipped if not any(allowed in why for allowed in ALLOWED_SKIPS)]
    if refused:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_line("CI fails, since these tests were skipped and may not be:", red=True)
        for line in refused:
            reporter.write_line(f"  {line}", red=True)


@pytest.fixture
def heard_signals() -> Iterator[None]:
    """Signals stop the process, also where `nohup` or a shell's background lets it ignore some."""
    handlers = {"SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL, "SIGINT": signal.default_int_handler}
    before = {name: signal.signal(getattr(signal, name), handler) for name, handler in handlers.items()}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.fixture(scope="session")
def session_components() -> dict:
    """Components of the tiny SDXL, shared by the whole session: change copies only."""
    text_encoders = make_text_encoders()
    torch.manual_seed(0)
    return {
        "vae": AutoencoderKL(
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        ).eval(),
        **text_encoders,
        "tokenizer": make_tokenizer(),
        "tokenizer_2": make_tokenizer(pad_token="!"),
        "unet": make_unet(),
        "scheduler": EulerDiscreteScheduler(),
    }


@pytest.fixture(scope="session")
def controlnet(session_components) -> ControlNetModel:
    """A ControlNet that changes the picture: a new one's outputs are all zero."""
    torch.manual_seed(3)
    controlnet = ControlNetModel.from_unet(
        session_components["unet"], conditioning_embedding_out_channels=(16, 32)
    ).eval()
    with torch.no_grad():
        for block in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
            torch.nn.init.normal_(block.weight, std=0.5)
    return controlnet


@pytest.fixture
def components(session_components) -> dict:
    """Components of the tiny SDXL, this test's own."""
    return copy.deepcopy(session_components)


@pytest.fixture
def pipe(components) -> FineLIPSDXLPipeline:
    """A tiny SDXL whose text encoders are stretched; a module may have a `pipe` of its own."""
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def stock_folder(session_components, tmp_path_factory) -> str:
    """The tiny SDXL as stock Diffusers saves it."""
    folder = str(tmp_path_factory.mktemp("stock"))
    StableDiffusionXLPipeline(**session_components).save_pretrained(folder)
    return folder
