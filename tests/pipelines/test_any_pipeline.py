"""`long_prompts`: every pipeline class of the installed Diffusers that encodes prompts as SDXL's do."""

import copy
import inspect
import json
import re
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffSDXLPipeline,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    LCMScheduler,
    LEditsPPPipelineStableDiffusionXL,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPAGImg2ImgPipeline,
    StableDiffusionXLControlNetPAGPipeline,
    StableDiffusionXLControlNetXSPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPAGImg2ImgPipeline,
    StableDiffusionXLPAGInpaintPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    TextToVideoZeroSDXLPipeline,
)
from diffusers.pipelines.kolors import pipeline_kolors, pipeline_kolors_img2img
from diffusers.pipelines.pag import pipeline_pag_kolors
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

import finelip_sdxl
from finelip_sdxl import FineLIPSDXLPipeline, long_prompts
from finelip_sdxl.cli import main as cli
from finelip_sdxl.pipelines import LongPromptMixin
from finelip_sdxl.text_encoders import num_positions
from tests.helpers.prompts import ALL_LENGTHS, ENDLESS, LONG, SHORT
from tests.helpers.tiny_sdxl import make_unet

SDXL_PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
IMAGE = np.random.RandomState(0).rand(1, 16, 16, 3).astype(np.float32)
CONTROL = torch.from_numpy(IMAGE).permute(0, 3, 1, 2)
MASK = (IMAGE[..., :1] > 0.5).astype(np.float32)


def public_pipelines() -> list[type[DiffusionPipeline]]:
    """The pipeline classes of the installed Diffusers."""
    found = (getattr(diffusers, name, None) for name in dir(diffusers) if "Pipeline" in name)
    return [cls for cls in found if isinstance(cls, type) and issubclass(cls, DiffusionPipeline)]


def encodes_like_sdxl(cls: type) -> bool:
    """By the two texts and the pooled vectors, which other families of models with an `encode_prompt` do not have."""
    names = inspect.signature(getattr(cls, "encode_prompt", len)).parameters.keys()
    own = {"prompt", "prompt_2", "negative_prompt_2", "negative_pooled_prompt_embeds", "lora_scale"}
    return own <= names and not {"prompt_3", "max_sequence_length"} & names


LIKE_SDXL = [cls for cls in public_pipelines() if encodes_like_sdxl(cls)]
OTHERS = [cls for cls in public_pipelines() if not encodes_like_sdxl(cls)]

# What a drawing needs with the classes that have no name in this package; `test_ecosystem.py` draws with the others.
DRAWINGS: dict[type, dict[str, Any]] = {
    StableDiffusionXLPAGPipeline: {"pag_scale": 2.0},
    StableDiffusionXLPAGImg2ImgPipeline: {"image": IMAGE, "strength": 0.9, "pag_scale": 2.0},
    StableDiffusionXLPAGInpaintPipeline: {"image": IMAGE, "mask_image": MASK, "strength": 0.9, "pag_scale": 2.0},
    StableDiffusionXLControlNetPAGPipeline: {"image": CONTROL, "pag_scale": 2.0},
    StableDiffusionXLControlNetPAGImg2ImgPipeline: {
        "image": IMAGE, "control_image": CONTROL, "strength": 0.9, "pag_scale": 2.0,
    },
    StableDiffusionXLControlNetXSPipeline: {"image": CONTROL},
    StableDiffusionXLInstructPix2PixPipeline: {"image": IMAGE},
    AnimateDiffSDXLPipeline: {"num_frames": 2},
    TextToVideoZeroSDXLPipeline: {"video_length": 2, "t0": 1, "t1": 2, "num_inference_steps": 4},
}  # fmt: skip
OF_OWN_NAME = [cls for cls in LIKE_SDXL if cls not in DRAWINGS]


@pytest.fixture
def parts(stock_class, request, components) -> dict[str, Any]:
    """All components of a pipeline class, the tiny SDXL's among them."""
    name = stock_class.__name__
    own: dict[str, str] = {}
    if "ControlNetXS" in name:
        own = {"unet": "deep_unet", "controlnet": "controlnet_xs"}
    elif "ControlNet" in name:
        own = {"controlnet": "controlnet_union" if "Union" in name else "controlnet"}
    elif "Adapter" in name:
        own = {"adapter": "t2i_adapter"}
    elif "AnimateDiff" in name:
        own = {"motion_adapter": "motion_adapter"}
    elif "InstructPix2Pix" in name:
        own = {"unet": "editing_unet"}
    with_pag = {"pag_applied_layers": ["mid"]} if "PAG" in name else {}
    return {**components, **{part: request.getfixturevalue(fixture) for part, fixture in own.items()}, **with_pag}


def build(stock_class: type, parts: dict[str, Any], **options: Any) -> Any:
    pipe = long_prompts(stock_class)(**parts, **options)
    pipe.swap_text_encoders()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompt: str, **arguments: Any) -> np.ndarray:
    """Pictures or videos from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    stock_class = pipe._stock_class() if isinstance(pipe, LongPromptMixin) else type(pipe)
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    drawn = pipe(prompt, **{**settings, **DRAWINGS.get(stock_class, {}), **arguments})
    return np.asarray(drawn.frames if "frames" in drawn else drawn.images)


def differ(one: np.ndarray, other: np.ndarray) -> bool:
    """By more than rounding does."""
    return float(np.abs(one - other).max()) > 1e-3


# Every class


def test_the_installed_diffusers_has_the_classes_that_issues_name() -> None:
    assert set(DRAWINGS) <= set(LIKE_SDXL)
    assert len(OF_OWN_NAME) == 10


@pytest.mark.parametrize("stock_class", LIKE_SDXL, ids=lambda cls: cls.__name__)
def test_every_class_encodes_prompts_of_any_length(stock_class, parts) -> None:
    stock = stock_class(**copy.deepcopy(parts))
    pipe = build(stock_class, parts)
    assert isinstance(pipe, stock_class)

    def encoded(encoder: Any, prompt: str) -> tuple:
        with torch.no_grad():
            return encoder.encode_prompt(prompt, None, torch.device("cpu"), 2, True, "a hare")

    for found, expected in zip(encoded(pipe, SHORT), encoded(stock, SHORT), strict=True):
        assert torch.equal(found, expected)
    reference = FineLIPSDXLPipeline(**{name: pipe.components[name] for name in SDXL_PARTS})
    for prompt, positions in ((LONG, 154), (ENDLESS, 496)):
        found = encoded(pipe, prompt)
        assert found[0].shape == found[1].shape == (2, positions, 80)
        assert all(torch.equal(*pair) for pair in zip(found, encoded(reference, prompt), strict=True))
    assert pipe.describe_prompt(ENDLESS).windows == 2


@pytest.mark.parametrize("stock_class", DRAWINGS, ids=lambda cls: cls.__name__)
def test_every_class_draws_from_prompts_of_any_length(stock_class, parts) -> None:
    stock_parts = copy.deepcopy(parts)
    pipe = build(stock_class, parts)
    # AnimateDiff makes a UNet of its own, some of it from random numbers.
    stock = stock_class(**{**stock_parts, "unet": pipe.unet})
    assert not differ(draw(pipe, SHORT), draw(stock, SHORT))
    assert differ(draw(pipe, f"{LONG} a quiet hare"), draw(pipe, LONG))
    assert differ(draw(pipe, f"{ENDLESS} a quiet hare"), draw(pipe, ENDLESS))


@pytest.mark.parametrize(
    "stock_class", [StableDiffusionXLPAGPipeline, AnimateDiffSDXLPipeline], ids=lambda cls: cls.__name__
)
def test_the_text_projection_cache_changes_no_bit(stock_class, parts) -> None:
    pipe = build(stock_class, parts)
    expected = draw(pipe, LONG)
    pipe.enable_text_projection_cache()
    assert np.array_equal(draw(pipe, LONG), expected)


@pytest.mark.parametrize("stock_class", DRAWINGS, ids=lambda cls: cls.__name__)
def test_options_and_their_checks_are_those_of_the_other_pipelines(stock_class, parts) -> None:
    pipe = build(stock_class, parts, overflow="error")
    with pytest.raises(ValueError, match="shorten it, or set overflow"):
        draw(pipe, ENDLESS)
    with pytest.raises(TypeError, match=r"`weightin` is no argument of .*: did you mean `weighting`"):
        pipe(SHORT, weightin="a1111")
    signature = inspect.signature(type(pipe).__call__)
    stock = inspect.signature(stock_class.__call__).parameters
    assert [name for name in stock if stock[name].kind is not inspect.Parameter.VAR_KEYWORD] == [
        name for name in signature.parameters if name in stock
    ]
    assert {"overflow", "weighting", "conditioning_adapter_scale"} <= signature.parameters.keys()


@pytest.mark.parametrize(
    "stock_class",
    [StableDiffusionXLPAGPipeline, StableDiffusionXLInstructPix2PixPipeline, AnimateDiffSDXLPipeline],
    ids=lambda cls: cls.__name__,
)
def test_a_class_is_saved_and_converted_for_stock_diffusers(stock_class, parts, tmp_path, capsys) -> None:
    stock_class(**parts).save_pretrained(tmp_path / "stock")
    assert cli.main(["convert", str(tmp_path / "stock"), str(tmp_path / "ours"), "--overflow", "error"]) == 0
    assert json.loads((tmp_path / "ours" / "model_index.json").read_text())["_class_name"] == stock_class.__name__
    pipe = long_prompts(stock_class).from_pretrained(tmp_path / "ours")
    assert pipe.overflow == "error"
    assert num_positions(pipe.text_encoder) == num_positions(pipe.text_encoder_2) == 248


# The class itself


@pytest.mark.parametrize("stock_class", OF_OWN_NAME, ids=lambda cls: cls.__name__)
def test_a_class_with_a_name_here_is_the_one_of_that_name(stock_class) -> None:
    ours = getattr(finelip_sdxl, stock_class.__name__.replace("StableDiffusionXL", "FineLIPSDXL"))
    assert long_prompts(stock_class) is long_prompts(ours) is ours


@pytest.mark.parametrize("stock_class", DRAWINGS, ids=lambda cls: cls.__name__)
def test_a_class_is_made_once_and_says_what_it_is(stock_class) -> None:
    ours = long_prompts(stock_class)
    assert long_prompts(stock_class) is long_prompts(ours) is ours
    assert ours.__name__ == re.sub("^(StableDiffusion(?=XL)|)", "FineLIP", stock_class.__name__, count=1).replace(
        "FineLIPXL", "FineLIPSDXL"
    )
    assert f"Diffusers' `{stock_class.__name__}` for prompts of any length" in ours.__doc__
    assert "\n    overflow: " in ours.__doc__


def test_a_class_of_one_s_own_keeps_what_it_does(components) -> None:
    class Shouting(StableDiffusionXLPipeline):
        def shout(self, prompt: str) -> str:
            return prompt.upper()

        def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
            return super().encode_prompt(*args, **kwargs)

    pipe = build(Shouting, components)
    assert type(pipe).__name__ == "FineLIPShouting"
    assert pipe.shout("a fox") == "A FOX"
    assert pipe.encode_prompt(ENDLESS, device="cpu")[0].shape[1] == 496


@pytest.mark.parametrize("other", OTHERS, ids=lambda cls: cls.__name__)
def test_every_other_class_is_refused_by_what_it_lacks(other) -> None:
    with pytest.raises(TypeError, match=rf"^{other.__name__} does not encode prompts as SDXL's pipelines do: its? "):
        long_prompts(other)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (pipeline_kolors.KolorsPipeline, "its `encode_prompt` does not take `prompt_2`.*Use it as Diffusers has it"),
        (pipeline_kolors_img2img.KolorsImg2ImgPipeline, "does not take `prompt_2`"),
        (pipeline_pag_kolors.KolorsPAGPipeline, "does not take `prompt_2`"),
        (StableDiffusionPipeline, "does not take `prompt_2`"),
        (StableDiffusion3Pipeline, "also takes `prompt_3`"),
        (StableVideoDiffusionPipeline, "it lacks `encode_prompt`"),
        (LEditsPPPipelineStableDiffusionXL, "does not take `prompt`.*248 tokens with the text encoders and tok"),
        (None, "takes a pipeline class of Diffusers, such as StableDiffusionXLPAGPipeline, but got None"),
        ("StableDiffusionXLPipeline", "but got 'StableDiffusionXLPipeline'"),
        (torch.nn.Linear, "but got Linear"),
    ],
)
def test_a_refusal_says_why_and_what_to_do(other, reason) -> None:
    with pytest.raises(TypeError, match=reason):
        long_prompts(other)


def test_a_pipeline_in_place_of_its_class_is_refused(components) -> None:
    with pytest.raises(TypeError, match=r"got a loaded StableDiffusionXLPipeline: call .*\.from_pipe\(pipe\)"):
        long_prompts(StableDiffusionXLPipeline(**components))


def test_a_subclass_of_the_mixin_is_checked_too() -> None:
    with pytest.raises(TypeError, match="KolorsPipeline does not encode prompts as SDXL's pipelines do"):
        type("Mine", (LongPromptMixin, pipeline_kolors.KolorsPipeline), {})


def test_a_class_that_opens_no_single_files_says_so(tmp_path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ValueError, match=r"opens no single files: .*FineLIPSDXLPipeline.from_single_file.*from_pipe"):
        long_prompts(TextToVideoZeroSDXLPipeline).from_single_file(file)


def test_ledits_takes_248_tokens_with_the_encoders_of_a_pipeline(components) -> None:
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    parts = {name: part for name, part in pipe.components.items() if name in components}
    editing = LEditsPPPipelineStableDiffusionXL(**{**parts, "scheduler": diffusers.DPMSolverMultistepScheduler()})
    editing.batch_size = 1
    with torch.no_grad():
        found = editing.encode_prompt(device="cpu", negative_prompt="", editing_prompt=[LONG])
    assert found[1].shape[1] == 248
    reference = pipe.encode_prompt(LONG, device="cpu", length_buckets=())[0]
    torch.testing.assert_close(found[1], reference, atol=1e-4, rtol=1e-4)


# AutoPipeline


AUTO = [
    (AutoPipelineForText2Image, StableDiffusionXLPAGPipeline, {}),
    (AutoPipelineForImage2Image, StableDiffusionXLPAGImg2ImgPipeline, {"image": IMAGE, "strength": 0.9}),
    (AutoPipelineForInpainting, StableDiffusionXLPAGInpaintPipeline, {"image": IMAGE, "mask_image": MASK}),
]


@pytest.mark.parametrize(("auto", "stock_class", "arguments"), AUTO)
def test_perturbed_attention_guidance_is_switched_on_and_off(components, auto, stock_class, arguments) -> None:
    pipe = FineLIPSDXLPipeline(**components, overflow="error")
    pipe.swap_text_encoders()
    guided = auto.from_pipe(pipe, enable_pag=True, pag_applied_layers=["mid"])
    assert type(guided) is long_prompts(stock_class)
    assert guided.overflow == "error"
    assert guided.unet is pipe.unet
    strong, weak = (draw(guided, LONG, pag_scale=scale, **arguments) for scale in (3.0, 0.0))
    assert differ(strong, weak)
    without = auto.from_pipe(guided, enable_pag=False)
    assert "PAG" not in type(without).__name__
    assert isinstance(without, LongPromptMixin)
    assert not differ(draw(without, LONG, **arguments), weak)


def test_perturbed_attention_guidance_stays_from_task_to_task(components, controlnet) -> None:
    pipe = FineLIPSDXLPipeline(**components)
    guided = AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True)
    assert type(AutoPipelineForImage2Image.from_pipe(guided)) is long_prompts(StableDiffusionXLPAGImg2ImgPipeline)
    with_controlnet = AutoPipelineForText2Image.from_pipe(pipe, controlnet=controlnet, enable_pag=True)
    assert type(with_controlnet) is long_prompts(StableDiffusionXLControlNetPAGPipeline)


def test_a_task_that_has_no_such_guidance_says_so(components, controlnet) -> None:
    pipe = FineLIPSDXLPipeline(**components)
    with pytest.raises(ValueError, match=r"no StableDiffusionXLControlNetPAGInpaintPipeline: leave out enable_pag"):
        AutoPipelineForInpainting.from_pipe(pipe, controlnet=controlnet, enable_pag=True)


def test_a_folder_of_ours_is_opened_by_stock_with_guidance(components, tmp_path) -> None:
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    pipe.save_pretrained(tmp_path)
    guided = AutoPipelineForText2Image.from_pretrained(tmp_path, enable_pag=True, pag_applied_layers=["mid"])
    assert type(guided) is StableDiffusionXLPAGPipeline
    assert num_positions(guided.text_encoder) == 248
    assert type(AutoPipelineForText2Image.from_pipe(guided, enable_pag=True)) is StableDiffusionXLPAGPipeline
    ours = long_prompts(StableDiffusionXLPAGPipeline).from_pretrained(tmp_path, pag_applied_layers=["mid"])
    assert not differ(draw(ours, LONG, length_buckets=()), draw(guided, LONG, pag_scale=2.0))


# Few-step models: guidance off


@ALL_LENGTHS
@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [(LCMScheduler, 4), (diffusers.EulerDiscreteScheduler, 1), (diffusers.EulerAncestralDiscreteScheduler, 2)],
    ids=["LCM", "Lightning", "Turbo"],
)
def test_few_step_models_draw_without_guidance(components, prompt, scheduler, steps) -> None:
    """As their cards say: LCM with guidance 1, Lightning and Turbo with 0 and trailing timesteps."""
    config = {**components["scheduler"].config, "timestep_spacing": "trailing"}
    components["scheduler"] = scheduler.from_config(config)
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    shapes = []
    pipe.unet.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["encoder_hidden_states"].shape)), with_kwargs=True
    )
    off = {"guidance_scale": 1.0 if scheduler is LCMScheduler else 0.0, "num_inference_steps": steps}
    found = draw(pipe, prompt, **off)
    positions = {SHORT: 77, LONG: 154, ENDLESS: 496}[prompt]
    assert shapes == [(1, positions, 80)] * steps
    assert not differ(draw(pipe, prompt, negative_prompt=ENDLESS, **off), found)  # no negative prompt is encoded
    assert differ(draw(pipe, f"{prompt} a quiet hare", **off), found)
    if prompt == SHORT:
        stock = StableDiffusionXLPipeline(**{**components, "scheduler": scheduler.from_config(config)})
        assert not differ(draw(stock, prompt, **off), found)


def test_a_distilled_unet_takes_its_guidance_as_an_input(components) -> None:
    """An LCM's UNet is told the guidance scale, and runs once a step at any."""
    unet = make_unet(time_cond_proj_dim=8)
    pipe = FineLIPSDXLPipeline(**{**components, "unet": unet, "scheduler": LCMScheduler()})
    pipe.swap_text_encoders()
    one, other = (draw(pipe, LONG, guidance_scale=scale, num_inference_steps=4) for scale in (2.0, 8.0))
    assert differ(one, other)
