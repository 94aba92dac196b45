"""The text-encoder block for Modular Diffusers: embeddings of `FineLIPSDXLPipeline`, by every guider."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    DiffusionPipeline,
    LayerSkipConfig,
    ModularPipeline,
    ModularPipelineBlocks,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    StableDiffusionXLAutoBlocks,
    StableDiffusionXLPipeline,
    TangentialClassifierFreeGuidance,
)
from safetensors.torch import save_file

from finelip_sdxl import ConditioningAdapter, FineLIPSDXLPipeline
from finelip_sdxl.pipelines.export import stock_pipeline
from finelip_sdxl.pipelines.modular import FineLIPSDXLTextEncoderStep
from finelip_sdxl.pipelines.prompt_encoding import EMBEDDINGS
from finelip_sdxl.prompts.plan import PromptPlan
from tests.helpers.drawing import draw
from tests.helpers.prompts import ALL_LENGTHS, ENDLESS, LONG, SHORT
from tests.helpers.tiny_sdxl import make_text_encoder
from tests.pipelines.test_ecosystem import make_lora

DIRECTORY = str(Path(__file__).parents[2] / "pipelines")
# Guiders run the prompt and the negative prompt one after the other, pipelines both at once; the tiny UNet's random
# weights make more of the last bits than a trained one's.
ROUNDING = 1e-3
LAYERS = {"indices": [0], "fqn": "mid_block.attentions.0.transformer_blocks"}


def make_blocks(workflow: str = "text2image") -> Any:
    blocks = StableDiffusionXLAutoBlocks().get_workflow(workflow)
    blocks.sub_blocks["text_encoder"] = ModularPipelineBlocks.from_pretrained(DIRECTORY, trust_remote_code=True)
    return blocks


def modular(pipe: DiffusionPipeline, **parts: Any) -> Any:
    """A modular pipeline of the components of another."""
    made = make_blocks().init_pipeline()
    made.update_components(guider=ClassifierFreeGuidance(guidance_scale=5.0))
    made.update_components(**{**pipe.components, **parts})
    made.set_progress_bar_config(disable=True)
    return made


def from_folder(folder: Path | str, blocks: Any = None) -> Any:
    made = (blocks or make_blocks()).init_pipeline(str(folder))
    made.load_components()
    made.update_components(guider=ClassifierFreeGuidance(guidance_scale=5.0))
    made.set_progress_bar_config(disable=True)
    return made


def run(made: Any, prompt: str | list[str] = LONG, output: str | list[str] | None = None, **inputs: Any) -> Any:
    """Two steps from the noise of `draw`."""
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    return made(prompt=prompt, output=output, **{**settings, **inputs})


def encoded(made: Any, prompt: str | list[str] = LONG, **inputs: Any) -> list[torch.Tensor]:
    state = run(made, prompt, **inputs)
    return [state.get(name) for name in EMBEDDINGS]


def assert_equal(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is other is None) or torch.equal(one, other)


@pytest.fixture
def pipe(components) -> FineLIPSDXLPipeline:
    """Replaced encoders with their originals, and an adapter that counts."""
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders(
        make_text_encoder(32, positions=248, seed=7), make_text_encoder(48, projection_dim=24, positions=248, seed=8)
    )
    torch.manual_seed(0)
    adapter = ConditioningAdapter([32, 48], 24, 8).eval()
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    pipe.register_modules(conditioning_adapter=adapter)
    return pipe


# Embeddings and pictures


@ALL_LENGTHS
@pytest.mark.parametrize("negative", [None, "a small hare"], ids=["zeros", "negative"])
def test_embeddings_are_the_pipeline_s_bit_for_bit_and_so_is_the_picture_but_for_rounding(
    pipe, prompt, negative
) -> None:
    made = modular(pipe)
    state = run(made, prompt, negative_prompt=negative)
    expected = pipe.encode_prompt(prompt, negative_prompt=negative)
    assert_equal([state.get(name) for name in EMBEDDINGS], expected)
    assert state.get("prompt_embeds").shape[1] == {SHORT: 77, LONG: 154, ENDLESS: 496}[prompt]
    report = state.get("prompt_report")
    assert isinstance(report, PromptPlan)
    assert str(report) == str(pipe.describe_prompt(prompt, negative_prompt=negative))
    picture = draw(pipe, prompt, negative_prompt=negative)
    np.testing.assert_allclose(state.get("images"), picture, atol=ROUNDING)


def test_a_short_prompt_is_drawn_as_stock_draws_it(pipe, components) -> None:
    stock = draw(StableDiffusionXLPipeline(**components), SHORT)
    np.testing.assert_allclose(run(modular(pipe), SHORT, "images"), stock, atol=ROUNDING)


@pytest.mark.parametrize(
    "inputs",
    [
        {"weighting": "a1111", "emphasis": "comfyui"},
        {"weighting": "a1111", "emphasis": "a1111"},
        {"weighting": "compel"},
        {"overflow": "truncate"},
        {"length_buckets": ()},
        {"short_prompt_encoder": "long", "conditioning_adapter_scale": 0.5},
        {"hidden_states": "last"},
        {"clip_skip": 1, "prompt_2": SHORT, "negative_prompt": SHORT, "negative_prompt_2": LONG},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", [f"{SHORT} (quiet:1.4)", f"{ENDLESS} (quiet:0.6)"], ids=["short", "long"])
def test_options_are_inputs(pipe, prompt, inputs) -> None:
    assert_equal(encoded(modular(pipe), prompt, **inputs), pipe.encode_prompt(prompt, **inputs))


def test_options_are_configs_too_and_hold_where_no_input_does(pipe) -> None:
    made = modular(pipe)
    made.update_components(overflow="truncate", length_buckets=[], weighting="compel")
    own = {"overflow": "truncate", "length_buckets": (), "weighting": "compel"}
    prompt = f"(quiet)1.5 {ENDLESS}"
    assert_equal(encoded(made, prompt), pipe.encode_prompt(prompt, **own))
    assert_equal(encoded(made, prompt, overflow="window"), pipe.encode_prompt(prompt, **own | {"overflow": "window"}))
    report = run(made, prompt, "prompt_report")
    assert report.cut


def test_batches_and_several_images(pipe) -> None:
    def seeds() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(2)]

    for prompt, images in (([SHORT, LONG], 1), (LONG, 2)):
        found = run(modular(pipe), prompt, "images", num_images_per_prompt=images, generator=seeds())
        expected = draw(pipe, prompt, num_images_per_prompt=images, generator=seeds())
        np.testing.assert_allclose(found, expected, atol=ROUNDING)


def test_a_lora_and_its_scale_reach_the_text_encoders(pipe, tmp_path) -> None:
    save_file(make_lora("diffusers"), tmp_path / "lora.safetensors")
    made = modular(pipe)
    before = encoded(made)
    made.load_lora_weights(str(tmp_path / "lora.safetensors"), adapter_name="style")
    strong, off = encoded(made), encoded(made, cross_attention_kwargs={"scale": 0.0})
    assert not torch.allclose(strong[0], before[0], atol=1e-3)
    torch.testing.assert_close(off, before)
    assert_equal(encoded(made), strong)


def test_other_tasks_take_the_block(pipe) -> None:
    made = make_blocks("image2image").init_pipeline()
    made.update_components(**pipe.components)
    made.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16)
    one, other = (run(made, text, "images", image=image, strength=0.9) for text in (LONG, f"{LONG} a quiet hare"))
    assert np.abs(one - other).max() > 1e-3


# Components from folders


@ALL_LENGTHS
def test_a_saved_folder_brings_everything_also_its_adapter(pipe, tmp_path, prompt) -> None:
    pipe.weighting = "compel"
    pipe.save_pretrained(tmp_path)
    made, ours = from_folder(tmp_path), FineLIPSDXLPipeline.from_pretrained(tmp_path)
    assert made.conditioning_adapter is None  # loaded with the first prompt
    prompt = f"{prompt} (quiet)1.3"
    for _ in range(2):
        assert_equal(encoded(made, prompt), ours.encode_prompt(prompt))
    assert isinstance(made.conditioning_adapter, ConditioningAdapter)


def test_a_modular_pipeline_of_it_is_saved_and_opened(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path / "ours")
    made = from_folder(tmp_path / "ours")
    expected = encoded(made)
    made.save_pretrained(str(tmp_path / "modular"), overwrite_modular_index=True)
    again = from_folder(tmp_path / "modular")
    assert isinstance(again.conditioning_adapter, ConditioningAdapter)
    assert_equal(encoded(again), expected)


def test_a_modular_folder_without_an_adapter_is_opened(pipe, tmp_path) -> None:
    made = modular(pipe, conditioning_adapter=None)
    made.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    # Weights in a mapped file go through other kernels.
    torch.testing.assert_close(encoded(from_folder(tmp_path)), encoded(made), atol=1e-3, rtol=1e-4)


def test_the_adapter_stays_away_from_encoders_that_it_was_not_trained_with(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path)
    made = from_folder(tmp_path)
    made.update_components(text_encoder=make_text_encoder(32, positions=248, seed=9))
    run(made)
    assert made.conditioning_adapter is None


def test_a_folder_for_stock_diffusers_is_opened(components, tmp_path) -> None:
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    stock_pipeline(pipe).save_pretrained(tmp_path)
    assert_equal(encoded(from_folder(tmp_path)), FineLIPSDXLPipeline.from_pretrained(tmp_path).encode_prompt(LONG))


@pytest.mark.slow
def test_the_miniature_is_drawn(tmp_path) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained("miniature")
    pipe.save_pretrained(tmp_path)
    prompt = "A red star is in the top left. A blue ring is in the center. " * 12
    settings = {"num_inference_steps": 4, "negative_prompt": "a green leaf"}
    picture = draw(pipe, prompt, guidance_scale=5.0, **settings)
    found = run(from_folder(tmp_path), prompt, "images", **settings)
    # 8 bits have steps of 4e-3.
    np.testing.assert_allclose(found, picture, atol=2e-3)


# Guiders


def guiders() -> dict[str, Any]:
    skipped = LayerSkipConfig(**LAYERS)
    scores = LayerSkipConfig(**LAYERS, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    always = {"start": 0.0, "stop": 1.0}
    return {
        "APG": AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5),
        "AutoGuidance": AutoGuidance(auto_guidance_config=skipped),
        "CFG-Zero*": ClassifierFreeZeroStarGuidance(),
        "APG mix": AdaptiveProjectedMixGuidance(),
        "PAG": PerturbedAttentionGuidance(
            perturbed_guidance_config=scores, **{f"perturbed_guidance_{name}": at for name, at in always.items()}
        ),
        "PAG alone": PerturbedAttentionGuidance(
            guidance_scale=1.0,
            perturbed_guidance_config=scores,
            **{f"perturbed_guidance_{name}": at for name, at in always.items()},
        ),
        "skip-layer": SkipLayerGuidance(
            skip_layer_config=skipped, **{f"skip_layer_guidance_{name}": at for name, at in always.items()}
        ),
        "tangential": TangentialClassifierFreeGuidance(),
    }


@pytest.mark.parametrize("name", guiders())
@ALL_LENGTHS
def test_every_guider_draws_from_prompts_of_any_length(pipe, name, prompt) -> None:
    made = modular(pipe, guider=guiders()[name])
    state = run(made, prompt, num_inference_steps=4)
    assert_equal([state.get(name) for name in EMBEDDINGS], pipe.encode_prompt(prompt))
    plain = run(
        modular(pipe, guider=ClassifierFreeGuidance(guidance_scale=7.5)), prompt, "images", num_inference_steps=4
    )
    assert np.abs(state.get("images") - plain).max() > 1e-3, "the guider counts"
    other = run(made, f"{prompt} a quiet hare", "images", num_inference_steps=4)
    assert np.abs(state.get("images") - other).max() > 1e-3, "the end of the prompt counts"


def test_without_guidance_no_negative_prompt_is_encoded(pipe) -> None:
    made = modular(pipe, guider=ClassifierFreeGuidance(guidance_scale=1.0))
    state = run(made, LONG, negative_prompt=ENDLESS)
    assert_equal([state.get(name) for name in EMBEDDINGS], pipe.encode_prompt(LONG, do_classifier_free_guidance=False))
    assert str(state.get("prompt_report")) == str(pipe.describe_prompt(LONG))
    np.testing.assert_allclose(state.get("images"), draw(pipe, LONG, guidance_scale=1.0), atol=ROUNDING)


def test_guidance_that_stops_early_holds_in_the_second_picture_too(pipe) -> None:
    made = modular(pipe, guider=ClassifierFreeGuidance(guidance_scale=5.0, stop=0.5))
    first, second = (run(made, LONG, "images", num_inference_steps=4) for _ in range(2))
    assert np.array_equal(first, second)


# What is refused


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"weighting": "a111"}, ValueError, r"^`weighting` must be one of None, 'compel', 'a1111', but is 'a111'\.$"),
        ({"emphasis": "strong"}, ValueError, r"^`emphasis` must be one of 'compel', "),
        ({"overflow": "cut"}, ValueError, r"^`overflow` must be one of 'window', "),
        ({"length_buckets": 77}, ValueError, r"^`length_buckets` must be a list of lengths"),
        ({"conditioning_adapter_scale": 2}, ValueError, r"^The scale of the conditioning adapter is 2; expected"),
        ({"clip_skip": 9}, ValueError, r"^`clip_skip` is 9; expected a whole number of layers from 0 to 2"),
        ({"prompt": None}, TypeError, r"^`prompt` must be a string or a list of strings, but is None\.$"),
        ({"prompt": []}, ValueError, r"^`prompt` is an empty list"),
        (
            {"prompt": ENDLESS, "overflow": "error"},
            ValueError,
            r"422 tokens for text_encoder; expected at most 248",
        ),
        ({"negative_prompt": ["a", "b"]}, ValueError, r"^`negative_prompt` holds 2 texts and `prompt` 1"),
    ],
    ids=str,
)
def test_a_wrong_input_is_refused_in_one_sentence(pipe, inputs, error, message) -> None:
    with pytest.raises(error, match=message):
        run(modular(pipe), **{"prompt": LONG, **inputs})


@pytest.mark.parametrize("missing", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
def test_a_missing_encoder_or_tokenizer_is_named(pipe, missing) -> None:
    made = modular(pipe, **{missing: None})
    with pytest.raises(ValueError, match=rf"^The modular pipeline has no {missing}: call load_components\(\), or pass"):
        run(made)


def test_without_any_component_all_are_named() -> None:
    with pytest.raises(ValueError, match="no text_encoder and no tokenizer and no text_encoder_2 and no tokenizer_2: "):
        run(make_blocks().init_pipeline())


def test_encoders_of_77_positions_are_refused_before_they_cut(components, stock_folder) -> None:
    for made in (modular(StableDiffusionXLPipeline(**components)), from_folder(stock_folder)):
        with pytest.raises(ValueError, match=r"^These text encoders have 77 positions: load"):
            run(made)


# The folder


def test_the_folder_still_holds_the_custom_pipeline(stock_folder) -> None:
    pipe = DiffusionPipeline.from_pretrained(stock_folder, custom_pipeline=DIRECTORY, trust_remote_code=True)
    assert type(pipe).__name__ == "FineLIPSDXLCustomPipeline"


def test_the_block_of_the_folder_is_the_package_s_and_says_what_it_takes() -> None:
    block = ModularPipelineBlocks.from_pretrained(DIRECTORY, trust_remote_code=True)
    assert type(block) is FineLIPSDXLTextEncoderStep
    assert {"prompt", "weighting", "emphasis", "overflow"} <= set(block.input_names)
    assert "prompt_report" in block.output_names
    assert "conditioning_adapter" in block.doc
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        ModularPipelineBlocks.from_pretrained(DIRECTORY)


def test_a_copy_of_the_block_encodes_the_same(pipe) -> None:
    made = modular(pipe)
    again = copy.deepcopy(made.blocks).init_pipeline()
    assert isinstance(again, ModularPipeline)
    again.update_components(**pipe.components, guider=ClassifierFreeGuidance(guidance_scale=5.0))
    again.set_progress_bar_config(disable=True)
    assert_equal(encoded(again), encoded(made))


def test_the_config_names_the_block() -> None:
    config = json.loads(Path(DIRECTORY, "modular_config.json").read_text())
    assert config["auto_map"] == {"ModularPipelineBlocks": f"block.{FineLIPSDXLTextEncoderStep.__name__}"}


@pytest.mark.parametrize("blocked", ["finelip_sdxl", "finelip_sdxl.pipelines.modular"])
def test_without_the_package_it_says_what_to_install(blocked) -> None:
    code = f"import sys; sys.modules[{blocked!r}] = None; import runpy; runpy.run_path({DIRECTORY + '/block.py'!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "ImportError: This block needs FineLIP-SDXL: run `pip install .` in a clone of its repository."
