"""A tiny SDXL with random weights: the real classes, two text encoders of different widths, 77 positions."""

import copy
import os
import random
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

# Reasons for which a test may be skipped in CI.
ALLOWED_SKIPS = ("needs a CUDA device",)

WORDS = ["a", "the", "red", "blue", "square", "fox", "hare", "above", "of", "and", "in", "quiet", "small", "large"]


def make_tokenizer(model_max_length: int = 77, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer that knows `WORDS` and spells everything else byte by byte."""
    symbols = sorted(ByteLevel.alphabet())
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    merges = []
    for word in WORDS:
        left = word[0]
        for place, letter in enumerate(word[1:], start=2):
            right = letter + "</w>" if place == len(word) else letter
            if (left, right) not in merges:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=model_max_length, pad_token=pad_token)


def make_text_encoder(
    hidden_size: int, projection_dim: int | None = None, positions: int = 77, seed: int = 0
) -> PreTrainedModel:
    """A text encoder of three layers; with `projection_dim` one that also gives a pooled vector."""
    tokenizer = make_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=positions,
        projection_dim=projection_dim or hidden_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_factor=20.0,  # else random embeddings are so small that all texts look alike
    )
    torch.manual_seed(seed)
    if projection_dim:
        return CLIPTextModelWithProjection(config).eval()
    # As loaded from a hub's file, whose keys begin with `text_model.`.
    weights = {f"text_model.{key}": value for key, value in CLIPTextModel(config).state_dict().items()}
    return CLIPTextModel.from_pretrained(None, config=config, state_dict=weights).eval()


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=1,
        projection_class_embeddings_input_dim=6 * 8 + 24,
        cross_attention_dim=32 + 48,
        norm_num_groups=8,
    ).eval()


def _seed(name: str) -> None:
    """Random numbers that depend on a name alone, not on what ran before."""
    seed = zlib.crc32(name.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request) -> None:
    _seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    _seed(item.nodeid)


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


@pytest.fixture(scope="session")
def session_components() -> dict:
    """Components of the tiny SDXL, shared by the whole session: change copies only."""
    text_encoder, text_encoder_2 = make_text_encoder(32, seed=1), make_text_encoder(48, projection_dim=24, seed=2)
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
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
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


@pytest.fixture(scope="session")
def stock_folder(session_components, tmp_path_factory) -> str:
    """The tiny SDXL as stock Diffusers saves it."""
    folder = str(tmp_path_factory.mktemp("stock"))
    StableDiffusionXLPipeline(**session_components).save_pretrained(folder)
    return folder
