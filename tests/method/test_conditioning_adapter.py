"""The conditioning adapter, by itself and in the pipelines."""

import copy
import inspect
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders

from finelip_sdxl import ConditioningAdapter, FineLIPSDXLPipeline, load_finelip
from finelip_sdxl.pipelines import __all__ as pipeline_names
from tests.helpers.drawing import draw
from tests.helpers.prompts import SENTENCES, SHORT


def make_adapter(changed: bool = True, state_dims: tuple[int, ...] = (32, 48)) -> ConditioningAdapter:
    """One that fits the tiny SDXL; `changed` as if it had been trained."""
    torch.manual_seed(5)
    adapter = ConditioningAdapter(state_dims, pooled_dim=24, hidden_dim=8)
    if changed:
        for residual in (*adapter.states, adapter.pooled):
            torch.nn.init.normal_(residual[-1].weight, std=0.3)
    return adapter


def some_states() -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(6)
    return [torch.randn(2, 9, 32), torch.randn(2, 9, 48)], torch.randn(2, 24)


# By itself


def test_a_new_adapter_changes_nothing() -> None:
    states, pooled = some_states()
    adapted, adapted_pooled = make_adapter(changed=False)(states, pooled)
    assert all(torch.equal(new, old) for new, old in zip(adapted, states, strict=True))
    assert torch.equal(adapted_pooled, pooled)


def test_the_scale_is_that_of_the_change() -> None:
    states, pooled = some_states()
    adapter = make_adapter()
    whole, whole_pooled = adapter(states, pooled)
    half, half_pooled = adapter(states, pooled, scale=0.5)
    for new, part, old in zip([*whole, whole_pooled], [*half, half_pooled], [*states, pooled], strict=True):
        assert not torch.allclose(new, old)
        torch.testing.assert_close(part - old, (new - old) / 2)


def test_tokens_do_not_mix() -> None:
    states, pooled = some_states()
    adapter = make_adapter()
    before = adapter(states, pooled)[0][0]
    states[0][:, 4] += 1
    after = adapter(states, pooled)[0][0]
    changed = (after != before).any(dim=-1)
    assert changed[:, 4].all()
    assert not changed[:, :4].any()
    assert not changed[:, 5:].any()


def test_what_is_none_stays_none() -> None:
    states, pooled = some_states()
    adapted, adapted_pooled = make_adapter()([None, states[1]], None)
    assert adapted[0] is None
    assert adapted_pooled is None
    assert torch.equal(adapted[1], make_adapter()(states, pooled)[0][1])


def test_the_result_has_the_dtype_of_the_states() -> None:
    states, pooled = some_states()
    adapted, adapted_pooled = make_adapter()([part.bfloat16() for part in states], pooled.bfloat16())
    assert {part.dtype for part in [*adapted, adapted_pooled]} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_comes_back_from_a_folder(tmp_path, dtype) -> None:
    adapter = make_adapter().to(dtype)
    adapter.save_pretrained(tmp_path)
    again = ConditioningAdapter.from_pretrained(tmp_path, dtype=dtype)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert again.config.hidden_dim == 8
    assert all(torch.equal(new, old) for new, old in zip(again.parameters(), adapter.parameters(), strict=True))


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([torch.zeros(1, 2, 48), torch.zeros(1, 2, 32)], "widths 32, 48, 24, but got 48, 32, 24"),
        ([torch.zeros(1, 2, 32)], "widths 32, 48, 24, but got 32, 24"),
    ],
)
def test_refuses_states_that_it_was_not_made_for(states, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_adapter()(states, torch.zeros(1, 24))


def test_refuses_widths_below_one() -> None:
    with pytest.raises(ValueError, match="hidden_dim=0; expected whole numbers of at least 1"):
        ConditioningAdapter((32, 48), 24, hidden_dim=0)


@pytest.mark.parametrize("state_dims", [(), [], None, "32", 32, {}, (32, "48"), (32, True), (32.0, 48), [[32], 48]])
def test_refuses_widths_that_are_no_list_of_whole_numbers(state_dims) -> None:
    with pytest.raises(ValueError, match="expected whole numbers of at least 1"):
        ConditioningAdapter(state_dims, 24, hidden_dim=8)


# In the pipelines


@pytest.fixture
def pipe(stock_folder) -> FineLIPSDXLPipeline:
    return FineLIPSDXLPipeline.from_pretrained(stock_folder, conditioning_adapter=make_adapter())


def test_adapts_a_long_prompt_and_its_negative(pipe) -> None:
    bare = FineLIPSDXLPipeline.from_pipe(pipe, conditioning_adapter=None)
    adapted, plain = (
        each.encode_prompt(SENTENCES, negative_prompt="a hare", do_classifier_free_guidance=True)
        for each in (pipe, bare)
    )
    states, pooled = pipe.conditioning_adapter(plain[0].split((32, 48), dim=-1), plain[2])
    torch.testing.assert_close(adapted[0], torch.cat(states, dim=-1))
    torch.testing.assert_close(adapted[2], pooled)
    assert not torch.allclose(adapted[1], plain[1])
    assert not torch.allclose(adapted[3], plain[3])


def draw_at(pipe, scale: float, prompt: str = SENTENCES) -> np.ndarray:
    pipe.set_conditioning_adapter_scale(scale)
    return draw(pipe, prompt)


def test_the_scale_blends(pipe) -> None:
    bare = FineLIPSDXLPipeline.from_pipe(pipe, conditioning_adapter=None)
    default = draw(pipe, SENTENCES)
    none, half, whole = (draw_at(pipe, scale) for scale in (0, 0.5, 1))
    assert np.array_equal(none, draw(bare, SENTENCES))
    assert np.array_equal(whole, default)
    assert not np.allclose(half, none, atol=1e-3)
    assert not np.allclose(half, whole, atol=1e-3)


@pytest.mark.parametrize("scale", [-0.1, 1.5, float("nan")])
def test_refuses_a_scale_out_of_range(pipe, scale) -> None:
    pipe.set_conditioning_adapter_scale(0.5)
    with pytest.raises(ValueError, match=f"scale of the conditioning adapter is {scale}; expected a number from 0"):
        pipe.set_conditioning_adapter_scale(scale)
    assert pipe.conditioning_adapter_scale == 0.5


def test_from_pipe_hands_the_scale_on_and_a_folder_does_not_keep_it(pipe, tmp_path) -> None:
    pipe.set_conditioning_adapter_scale(0.5)
    other = FineLIPSDXLPipeline.from_pipe(pipe)
    assert other.conditioning_adapter_scale == 0.5
    other.set_conditioning_adapter_scale(0)
    assert pipe.conditioning_adapter_scale == 0.5
    assert FineLIPSDXLPipeline.from_pipe(StableDiffusionXLPipeline.from_pipe(pipe)).conditioning_adapter_scale == 1
    pipe.save_pretrained(tmp_path)
    assert FineLIPSDXLPipeline.from_pretrained(tmp_path).conditioning_adapter_scale == 1
    assert copy.deepcopy(pipe).conditioning_adapter_scale == 0.5


def test_a_short_prompt_read_as_stock_does_not_pass_through_it(pipe, stock_folder) -> None:
    stock = StableDiffusionXLPipeline.from_pretrained(stock_folder)
    np.testing.assert_allclose(draw(pipe, SHORT), draw(stock, SHORT), atol=1e-5)
    pipe.short_prompt_encoder = "long"
    assert not np.allclose(draw(pipe, SHORT), draw(stock, SHORT), atol=1e-3)


@pytest.mark.parametrize("arguments", [{"clip_skip": 1}, {}])
def test_states_that_it_does_not_know_do_not_pass_through_it(pipe, caplog, arguments) -> None:
    if not arguments:
        pipe.hidden_states = "last"
    bare = FineLIPSDXLPipeline.from_pipe(pipe, conditioning_adapter=None)
    caplog.clear()
    assert np.array_equal(draw(pipe, SENTENCES, **arguments), draw(bare, SENTENCES, **arguments))
    draw(pipe, SENTENCES, **arguments)
    said = [record.getMessage() for record in caplog.records if "penultimate states only" in record.getMessage()]
    assert len(said) == 1


def test_every_pipeline_takes_it() -> None:
    import finelip_sdxl.pipelines

    for name in pipeline_names:
        if not name.startswith("FineLIP"):  # the mixin, and what makes further classes
            continue
        pipeline = getattr(finelip_sdxl.pipelines, name)
        assert "conditioning_adapter" in inspect.signature(pipeline.__init__).parameters
        assert "conditioning_adapter->unet" in pipeline.model_cpu_offload_seq


def test_works_offloaded(pipe) -> None:
    expected = draw(pipe, SENTENCES)
    pipe.enable_model_cpu_offload(device="cpu")
    np.testing.assert_allclose(draw(pipe, SENTENCES), expected, atol=1e-5)
    pipe.remove_all_hooks()
    pipe.enable_sequential_cpu_offload(device="meta")


def test_of_another_sdxl_is_refused_in_a_sentence(stock_folder) -> None:
    sentence = "takes states and a pooled vector of widths 32, 64, 24, but"
    with pytest.raises(ValueError, match=f"{sentence} this SDXL's are 32, 48, 24: use it with"):
        FineLIPSDXLPipeline.from_pretrained(stock_folder, conditioning_adapter=make_adapter(state_dims=(32, 64)))
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder)
    pipe.register_modules(conditioning_adapter=make_adapter(state_dims=(32, 64)))
    with pytest.raises(ValueError, match=f"{sentence} got 32, 48"):
        draw(pipe, SENTENCES)


def test_the_folder_above_an_adapter_leads_to_it(stock_folder, tmp_path) -> None:
    make_adapter().save_pretrained(tmp_path / "last")
    for folder, hint in ((tmp_path, "pass .*last"), (tmp_path.parent, "pass the folder `last`")):
        with pytest.raises(FileNotFoundError, match=f"holds no conditioning adapter: .*{hint}"):
            FineLIPSDXLPipeline.from_pretrained(stock_folder, conditioning_adapter=folder)
    with pytest.raises(ValueError, match="text_encoder is no conditioning adapter: pass the folder"):
        FineLIPSDXLPipeline.from_pretrained(stock_folder, conditioning_adapter=f"{stock_folder}/text_encoder")


# Loading and saving


def test_comes_back_with_its_pipeline(pipe, tmp_path, caplog) -> None:
    pipe.save_pretrained(tmp_path)
    assert "finelip-sdxl export" in caplog.text
    again = FineLIPSDXLPipeline.from_pretrained(tmp_path)
    np.testing.assert_allclose(draw(again, SENTENCES), draw(pipe, SENTENCES), atol=1e-5)
    assert FineLIPSDXLPipeline.from_pretrained(tmp_path, conditioning_adapter=None).conditioning_adapter is None


def test_comes_back_with_its_pipeline_of_a_variant(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path, variant="fp16")
    again = FineLIPSDXLPipeline.from_pretrained(tmp_path, variant="fp16")
    np.testing.assert_allclose(draw(again, SENTENCES), draw(pipe, SENTENCES), atol=1e-5)


def test_a_pipeline_without_one_says_nothing_of_it(stock_folder, tmp_path, caplog) -> None:
    FineLIPSDXLPipeline.from_pretrained(stock_folder).save_pretrained(tmp_path)
    assert "conditioning" not in (tmp_path / "model_index.json").read_text()
    assert "conditioning" not in caplog.text


def test_stock_opens_the_folder_without_it_and_says_so(pipe, tmp_path, caplog) -> None:
    pipe.save_pretrained(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        stock = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    assert not hasattr(stock, "conditioning_adapter")


@pytest.mark.slow
def test_diffusers_alone_opens_the_folder(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path)
    program = (
        "import sys; sys.modules['finelip_sdxl'] = None\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r})\n"
        "print(type(pipe).__name__)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == "StableDiffusionXLPipeline"
    assert "conditioning_adapter" in result.stderr


def test_a_repository_with_it_can_be_downloaded(pipe, tmp_path) -> None:
    """Diffusers refuses to download one whose index names a module that is not its own."""
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    _, folders = _get_custom_components_and_folders("user/repository", index, files)
    assert "unet" in folders
    assert "conditioning_adapter" not in folders  # `from_pretrained` loads it by itself


@pytest.mark.parametrize("kind", [str, Path])
def test_loads_from_a_folder_of_its_own(stock_folder, tmp_path, kind) -> None:
    make_adapter().save_pretrained(tmp_path)
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder, conditioning_adapter=kind(tmp_path), dtype=torch.bfloat16)
    assert pipe.conditioning_adapter.dtype == torch.bfloat16


def test_another_finelip_comes_without_the_saved_adapter(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path)
    finelip = load_finelip(pipe.text_encoder)
    assert FineLIPSDXLPipeline.from_pretrained(tmp_path, finelip=finelip).conditioning_adapter is None
    kept = FineLIPSDXLPipeline.from_pretrained(tmp_path, finelip=finelip, conditioning_adapter=make_adapter())
    assert kept.conditioning_adapter is not None


def test_a_folder_that_is_not_there_is_named(stock_folder, tmp_path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        FineLIPSDXLPipeline.from_pretrained(stock_folder, conditioning_adapter=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        (
            "{folder}/nowhere",
            FileNotFoundError,
            "{folder}/nowhere does not exist: pass the directory or hub id of a con",
        ),
        ("adapter.safetensors", FileNotFoundError, "adapter.safetensors does not exist: pass the directory or hub id"),
        ("me/my/adapter", FileNotFoundError, "me/my/adapter does not exist: pass the directory or hub id of a cond"),
        ("", FileNotFoundError, "'' does not exist: pass the directory or hub id of a conditioning adapter"),
        ("me/adapter", OSError, "me/adapter is no path here, and the hub cannot be reached to look for it: "),
        (
            "{folder}/weights.safetensors",
            FileNotFoundError,
            "weights.safetensors is a file, and no conditioning adapter",
        ),
        ("{folder}/empty", FileNotFoundError, "empty holds no conditioning adapter: pass the folder `last` of a run"),
        (
            "{folder}/pipeline",
            FileNotFoundError,
            "holds no conditioning adapter: pass {folder}/pipeline/conditioning_a",
        ),
        ("{folder}/damaged", ValueError, "config.json is no JSON"),
        ("{folder}/list", ValueError, "config.json holds a list; expected an object"),
        (
            "miniature",
            ValueError,
            "takes states and a pooled vector of widths 128, 160, 160, but this SDXL's are 32",
        ),
    ],
)
def test_a_name_that_leads_to_no_adapter_is_told_as_for_other_models(
    stock_folder, tmp_path, monkeypatch, name, error, said
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for folder, config in (("empty", None), ("damaged", "{"), ("list", "[1]"), ("pipeline/conditioning_adapter", "{}")):
        (tmp_path / folder).mkdir(parents=True)
        if config is not None:
            (tmp_path / folder / "config.json").write_text(config)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(error, match=re.escape(said.format(folder=tmp_path))):
        FineLIPSDXLPipeline.from_pretrained(stock_folder, conditioning_adapter=name.format(folder=tmp_path))


def test_an_adapter_on_the_hub_is_found(stock_folder, tmp_path, monkeypatch) -> None:
    make_adapter().save_pretrained(tmp_path / "adapter")
    asked = []

    def download(repo, filename, subfolder=None, **arguments) -> str:
        asked.append((repo, arguments))
        return str(tmp_path / "adapter" / filename)

    real = ConditioningAdapter.from_pretrained
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(
        ConditioningAdapter, "from_pretrained", lambda name, **arguments: real(tmp_path / name.split("/")[1])
    )
    pipe = FineLIPSDXLPipeline.from_pretrained(stock_folder, conditioning_adapter="me/adapter", revision="main")
    assert torch.equal(pipe.conditioning_adapter.pooled[-1].weight, make_adapter().pooled[-1].weight)
    assert asked == [("me/adapter", {"revision": "main"})]


def test_the_name_of_an_sdxl_that_ships_stands_for_its_adapter() -> None:
    named = FineLIPSDXLPipeline.from_pretrained("miniature", conditioning_adapter="miniature").conditioning_adapter
    own = FineLIPSDXLPipeline.from_pretrained("miniature").conditioning_adapter
    assert all(torch.equal(one, other) for one, other in zip(named.parameters(), own.parameters(), strict=True))
