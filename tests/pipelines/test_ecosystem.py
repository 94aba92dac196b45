"""What SDXL's users already have, on prompts of every length: LoRAs, textual inversions, IP-Adapters, ControlNets."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DDIMScheduler,
    MultiAdapter,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
    StableDiffusionXLControlNetUnionInpaintPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

import finelip_sdxl
from finelip_sdxl import FineLIPSDXLImg2ImgPipeline, FineLIPSDXLPipeline
from finelip_sdxl.cli import main as cli
from finelip_sdxl.text_encoders import num_positions
from tests.helpers.drawing import draw, embeddings
from tests.helpers.prompts import ALL_LENGTHS, ENDLESS, LONG, SHORT
from tests.helpers.tiny_sdxl import make_text_encoder, make_tokenizer, make_unet


@pytest.fixture
def pipe(components) -> FineLIPSDXLPipeline:
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    return pipe


@pytest.fixture
def with_finelip(components) -> FineLIPSDXLPipeline:
    """One whose first encoder was replaced, and reads short prompts with the original."""
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders(finelip=make_text_encoder(32, positions=248, seed=7))
    return pipe


def read_as_stock(pipe) -> list[bool]:
    """Whether each encoder reads a short prompt as stock does."""
    return [plan.as_stock for plan in pipe.describe_prompt(SHORT).plans]


def differ(one, other, by: float = 1e-3) -> bool:
    """By more than rounding does."""
    return float(np.abs(np.asarray(one) - np.asarray(other)).max()) > by


# LoRA

# Of each part: kohya's prefix, Diffusers' names of layers and their width. Like those that are passed around, it has
# the output projection, by which Diffusers finds an encoder's LoRA.
ENCODER_LAYERS = tuple(f"text_model.encoder.layers.0.self_attn.{layer}" for layer in ("q_proj", "out_proj"))
PARTS = {
    "unet": ("lora_unet", ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q",), 32),
    "text_encoder": ("lora_te1", ENCODER_LAYERS, 32),
    "text_encoder_2": ("lora_te2", ENCODER_LAYERS, 48),
}


def make_lora(layout: str, seed: int = 0, parts: tuple[str, ...] = tuple(PARTS)) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 on the UNet and both text encoders, the same in both layouts."""
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for part in parts:
        prefix, layers, width = PARTS[part]
        for layer in layers:
            down, up = (torch.randn(*shape, generator=random) / 4 for shape in ((2, width), (width, 2)))
            if layout == "kohya":
                # The UNet's blocks have the original project's names there, and alpha/rank scales: by 1/2.
                name = f"{prefix}_{layer.replace('.', '_')}".replace("down_blocks_1_attentions_0", "input_blocks_3_1")
                weights |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": 2 * up}
                weights[f"{name}.alpha"] = torch.tensor(1.0)
            else:
                weights |= {f"{part}.{layer}.lora_A.weight": down, f"{part}.{layer}.lora_B.weight": up}
    return weights


@pytest.fixture(params=["diffusers", "kohya"])
def lora(request, tmp_path) -> str:
    save_file(make_lora(request.param), tmp_path / "lora.safetensors")
    return str(tmp_path / "lora.safetensors")


@ALL_LENGTHS
def test_a_lora_is_loaded_scaled_and_unloaded(pipe, lora, prompt) -> None:
    before = draw(pipe, prompt)
    pipe.load_lora_weights(lora, adapter_name="style")
    strong = draw(pipe, prompt)
    assert differ(strong, before)
    pipe.set_adapters("style", 0.0)
    assert not differ(draw(pipe, prompt), before)
    pipe.set_adapters("style", 0.5)
    assert differ(draw(pipe, prompt), strong)
    assert differ(draw(pipe, prompt), before)
    pipe.unload_lora_weights()
    assert np.array_equal(draw(pipe, prompt), before)


@pytest.mark.parametrize("part", list(PARTS))
def test_a_lora_acts_on_each_part_alone(pipe, part) -> None:
    before = embeddings(pipe), draw(pipe)
    pipe.load_lora_weights(make_lora("kohya", parts=(part,)))
    assert differ(embeddings(pipe), before[0]) == (part != "unet")
    assert differ(draw(pipe), before[1])


def test_a_lora_is_the_same_in_both_layouts(components) -> None:
    one, other = (FineLIPSDXLPipeline(**copy.deepcopy(components)) for _ in range(2))
    for each, layout in ((one, "diffusers"), (other, "kohya")):
        each.swap_text_encoders()
        each.load_lora_weights(make_lora(layout))
    torch.testing.assert_close(embeddings(one), embeddings(other), atol=1e-4, rtol=1e-4)
    assert not differ(draw(one), draw(other))


def test_a_lora_does_to_short_prompts_what_it_does_in_stock(pipe, components, lora) -> None:
    stock = StableDiffusionXLPipeline(**copy.deepcopy(components))
    before = embeddings(stock, SHORT)
    for each in (pipe, stock):
        each.load_lora_weights(lora)
    assert differ(embeddings(stock, SHORT), before)
    torch.testing.assert_close(embeddings(pipe, SHORT), embeddings(stock, SHORT), atol=1e-5, rtol=1e-4)
    assert not differ(draw(pipe, SHORT), draw(stock, SHORT))


@ALL_LENGTHS
def test_a_lora_is_fused_and_unfused(pipe, lora, prompt) -> None:
    before = draw(pipe, prompt)
    pipe.load_lora_weights(lora)
    loaded = draw(pipe, prompt)
    assert differ(loaded, before, by=0.02)
    pipe.fuse_lora()
    assert not differ(draw(pipe, prompt), loaded, by=5e-3)  # added to weights and taken off again, it is rounded
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert not differ(draw(pipe, prompt), before, by=5e-3)


def test_several_loras_act_at_once(pipe) -> None:
    pipe.load_lora_weights(make_lora("diffusers", seed=1), adapter_name="one")
    pipe.load_lora_weights(make_lora("kohya", seed=2), adapter_name="two")
    drawn = {}
    for names in (["one"], ["two"], ["one", "two"]):
        pipe.set_adapters(names)
        drawn[tuple(names)] = draw(pipe)
    assert all(differ(drawn[one], drawn[other]) for one in drawn for other in drawn if one != other)
    assert set(pipe.get_list_adapters()["text_encoder_2"]) == {"one", "two"}


def test_a_lora_on_a_finelip_acts_on_short_prompts_until_it_is_unloaded(with_finelip) -> None:
    before = embeddings(with_finelip, SHORT)
    with_finelip.load_lora_weights(make_lora("kohya"))
    assert read_as_stock(with_finelip) == [False, True]  # the held original lacks it
    assert differ(embeddings(with_finelip, SHORT), before)
    with_finelip.unload_lora_weights()
    assert read_as_stock(with_finelip) == [True, True]
    assert torch.equal(embeddings(with_finelip, SHORT), before)


def test_a_lora_fused_into_a_finelip_goes_on_acting_on_short_prompts(with_finelip, tmp_path) -> None:
    with_finelip.load_lora_weights(make_lora("kohya"))
    loaded = embeddings(with_finelip, SHORT)
    with_finelip.fuse_lora()
    with_finelip.unload_lora_weights()
    with_finelip.save_pretrained(tmp_path)
    reopened = FineLIPSDXLPipeline.from_pretrained(tmp_path)
    for pipe in (with_finelip, FineLIPSDXLImg2ImgPipeline.from_pipe(with_finelip), reopened):
        assert read_as_stock(pipe) == [False, True]
        torch.testing.assert_close(embeddings(pipe, SHORT), loaded, atol=1e-2, rtol=1e-3)


def test_a_lora_of_the_unet_leaves_short_prompts_to_stock(with_finelip) -> None:
    """Those that need few steps are such, and are fused."""
    before = embeddings(with_finelip, SHORT), draw(with_finelip, SHORT)
    with_finelip.load_lora_weights(make_lora("kohya", parts=("unet",)))
    with_finelip.fuse_lora()
    for _ in range(2):
        assert read_as_stock(with_finelip) == [True, True]
        assert torch.equal(embeddings(with_finelip, SHORT), before[0])
        assert differ(draw(with_finelip, SHORT), before[1])
        with_finelip.unload_lora_weights()


# Textual inversion


def add_concept(pipe) -> None:
    """Two vectors in each encoder, as SDXL's inversions have them."""
    random = torch.Generator().manual_seed(7)
    for name, tokenizer, width in (
        ("text_encoder", pipe.tokenizer, 32),
        ("text_encoder_2", pipe.tokenizer_2, 48),
    ):
        vectors = 20 * torch.randn(2, width, generator=random)
        pipe.load_textual_inversion(
            {"<concept>": vectors}, token="<concept>", text_encoder=getattr(pipe, name), tokenizer=tokenizer
        )


def remove_concept(pipe) -> None:
    for name, tokenizer in (("text_encoder", pipe.tokenizer), ("text_encoder_2", pipe.tokenizer_2)):
        pipe.unload_textual_inversion(tokenizer=tokenizer, text_encoder=getattr(pipe, name))


def count_tokens(pipe, prompt: str) -> int:
    return sum(window.tokens for window in pipe.describe_prompt(prompt).plans[0].windows)


@ALL_LENGTHS
def test_a_textual_inversion_of_several_vectors_is_read_wherever_it_stands(pipe, prompt) -> None:
    spelled = embeddings(pipe, f"{prompt} <concept>")
    add_concept(pipe)
    assert count_tokens(pipe, f"{prompt} <concept>") == count_tokens(pipe, prompt) + 2
    last = embeddings(pipe, f"{prompt} <concept>")
    for name, columns in (("text_encoder", slice(0, 32)), ("text_encoder_2", slice(32, None))):
        vectors = getattr(pipe, name).get_input_embeddings().weight
        for number in (-2, -1):
            with torch.no_grad():
                vectors[number].neg_()
            changed = (embeddings(pipe, f"{prompt} <concept>") - last).abs()[0, :, columns].amax(dim=-1)
            with torch.no_grad():
                vectors[number].neg_()
            assert changed.max() > 1e-3
            if prompt == LONG:
                assert changed[:139].max() < 1e-3, "what stands before it, past position 77, does not see it"
    remove_concept(pipe)
    assert not differ(embeddings(pipe, f"{prompt} <concept>"), spelled)


def test_a_textual_inversion_on_a_finelip_is_read_in_short_prompts_until_it_is_unloaded(with_finelip) -> None:
    add_concept(with_finelip)
    assert read_as_stock(with_finelip) == [False, True]
    remove_concept(with_finelip)
    assert read_as_stock(with_finelip) == [True, True]


def test_a_textual_inversion_comes_along_from_stock_and_from_a_folder(components, tmp_path) -> None:
    stock = StableDiffusionXLPipeline(**components)
    add_concept(stock)
    pipe = FineLIPSDXLPipeline.from_pipe(stock)
    pipe.swap_text_encoders()
    pipe.save_pretrained(tmp_path)
    for each in (pipe, FineLIPSDXLPipeline.from_pretrained(tmp_path)):
        assert not differ(embeddings(each, f"<concept> {SHORT}"), embeddings(stock, f"<concept> {SHORT}"))
        assert count_tokens(each, f"{LONG} <concept>") == count_tokens(each, LONG) + 2


# IP-Adapter


def save_ip_adapter(unet, folder: Path) -> None:
    """For every cross-attention of the UNet, a projection of the image to four tokens, and the image's encoder."""
    random = torch.Generator().manual_seed(3)
    width = unet.config.cross_attention_dim
    weights = {
        "image_proj.proj.weight": torch.randn(4 * width, 16, generator=random),
        "image_proj.proj.bias": torch.zeros(4 * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    layers = [name for name in unet.attn_processors if "attn2" in name]
    for number, name in enumerate(layers):
        hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for key in ("to_k_ip", "to_v_ip"):
            weights[f"ip_adapter.{2 * number + 1}.{key}.weight"] = torch.randn(hidden, width, generator=random)
    save_file(weights, folder / "ip-adapter.safetensors")
    torch.manual_seed(4)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "image_encoder")


@ALL_LENGTHS
def test_an_ip_adapter_acts_beside_the_prompt(components, tmp_path, prompt) -> None:
    crop = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pipe = FineLIPSDXLPipeline(**components, feature_extractor=crop)
    pipe.swap_text_encoders()
    before = draw(pipe, prompt)
    save_ip_adapter(pipe.unet, tmp_path)
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name="ip-adapter.safetensors")
    picture = Image.fromarray(np.full((16, 16, 3), 200, dtype=np.uint8))
    pipe.set_ip_adapter_scale(0.0)
    assert not differ(draw(pipe, prompt, ip_adapter_image=picture), before)
    pipe.set_ip_adapter_scale(1.0)
    assert differ(draw(pipe, prompt, ip_adapter_image=picture), before)
    assert differ(
        draw(pipe, prompt, ip_adapter_image=picture), draw(pipe, f"{prompt} a hare", ip_adapter_image=picture)
    )
    pipe.unload_ip_adapter()
    assert not differ(draw(pipe, prompt), before)


# Image to image, inpainting, ControlNets, T2I-Adapters


IMAGE = np.random.RandomState(0).rand(1, 16, 16, 3).astype(np.float32)
CONTROL = torch.from_numpy(IMAGE).permute(0, 3, 1, 2)
MASK = (IMAGE[..., :1] > 0.5).astype(np.float32)
# Of each pipeline: the fixture that gives its own component, and what a call needs.
TASKS = {
    StableDiffusionXLImg2ImgPipeline: (None, {"image": IMAGE, "strength": 0.9}),
    StableDiffusionXLInpaintPipeline: (None, {"image": IMAGE, "mask_image": MASK, "strength": 0.9}),
    StableDiffusionXLControlNetPipeline: ("controlnet", {"image": CONTROL}),
    StableDiffusionXLControlNetImg2ImgPipeline: (
        "controlnet", {"image": IMAGE, "control_image": CONTROL, "strength": 0.9},
    ),
    StableDiffusionXLControlNetInpaintPipeline: (
        "controlnet", {"image": IMAGE, "mask_image": MASK, "control_image": CONTROL, "strength": 0.9},
    ),
    StableDiffusionXLControlNetUnionPipeline: ("controlnet_union", {"control_image": [CONTROL], "control_mode": [0]}),
    StableDiffusionXLControlNetUnionImg2ImgPipeline: (
        "controlnet_union", {"image": IMAGE, "control_image": [CONTROL], "control_mode": [0], "strength": 0.9},
    ),
    StableDiffusionXLControlNetUnionInpaintPipeline: (
        "controlnet_union",
        {"image": IMAGE, "mask_image": MASK, "control_image": [CONTROL], "control_mode": [0], "strength": 0.9},
    ),
    StableDiffusionXLAdapterPipeline: ("t2i_adapter", {"image": CONTROL}),
}  # fmt: skip
EVERY_TASK = pytest.mark.parametrize("stock_class", TASKS, ids=lambda stock_class: stock_class.__name__)


def ours_of(stock_class: type) -> type:
    return getattr(finelip_sdxl, stock_class.__name__.replace("StableDiffusionXL", "FineLIPSDXL"))


@pytest.fixture
def part(stock_class, request) -> dict:
    """The component of its own that a pipeline has."""
    fixture, _ = TASKS[stock_class]
    if fixture is None:
        return {}
    name = "adapter" if fixture == "t2i_adapter" else "controlnet"
    return {name: request.getfixturevalue(fixture)}


@EVERY_TASK
def test_every_pipeline_reads_long_prompts(components, part, stock_class) -> None:
    stock = stock_class(**copy.deepcopy(components), **part)
    pipe = ours_of(stock_class)(**components, **part)
    pipe.swap_text_encoders()
    _, arguments = TASKS[stock_class]
    assert not differ(draw(pipe, SHORT, **arguments), draw(stock, SHORT, **arguments))
    assert differ(draw(pipe, LONG, **arguments), draw(stock, LONG, **arguments))
    assert differ(draw(pipe, ENDLESS, **arguments), draw(pipe, f"{ENDLESS} a quiet hare", **arguments))
    if part:
        scale = "adapter_conditioning_scale" if "adapter" in part else "controlnet_conditioning_scale"
        assert differ(draw(pipe, LONG, **arguments, **{scale: 0.0}), draw(pipe, LONG, **arguments))


@EVERY_TASK
def test_every_pipeline_is_converted_to_its_like(components, part, stock_class, tmp_path, capsys) -> None:
    stock_class(**components, **part).save_pretrained(tmp_path / "stock")
    assert cli.main(["convert", str(tmp_path / "stock"), str(tmp_path / "ours")]) == 0
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["_class_name"] == stock_class.__name__
    pipe = ours_of(stock_class).from_pretrained(tmp_path / "ours")
    assert num_positions(pipe.text_encoder) == num_positions(pipe.text_encoder_2) == 248
    assert all(type(getattr(pipe, name)) is type(own) for name, own in part.items())


def test_several_controlnets_act_at_once(components, controlnet) -> None:
    pipe = finelip_sdxl.FineLIPSDXLControlNetPipeline(**components, controlnet=[controlnet, copy.deepcopy(controlnet)])
    pipe.swap_text_encoders()
    both, one = (draw(pipe, ENDLESS, image=[CONTROL] * 2, controlnet_conditioning_scale=[1.0, b]) for b in (1.0, 0.0))
    assert differ(both, one)


def test_several_t2i_adapters_act_at_once(components, t2i_adapter) -> None:
    adapters = MultiAdapter([t2i_adapter, copy.deepcopy(t2i_adapter)])
    pipe = finelip_sdxl.FineLIPSDXLAdapterPipeline(**components, adapter=adapters)
    pipe.swap_text_encoders()
    both, one = (draw(pipe, ENDLESS, image=[CONTROL] * 2, adapter_conditioning_scale=[1.0, b]) for b in (1.0, 0.0))
    assert differ(both, one)


def test_the_pipeline_of_t2i_adapters_has_the_older_callback_only(components, t2i_adapter) -> None:
    pipe = finelip_sdxl.FineLIPSDXLAdapterPipeline(**components, adapter=t2i_adapter)
    steps = []
    draw(pipe, image=CONTROL, callback=lambda step, timestep, latents: steps.append(step))
    assert steps == [0, 1]
    with pytest.raises(TypeError, match="callback_on_step_end"):
        draw(pipe, image=CONTROL, callback_on_step_end=lambda *arguments: {})


def test_a_t2i_adapter_and_a_conditioning_adapter_do_not_meet(components, t2i_adapter) -> None:
    conditioning_adapter = finelip_sdxl.ConditioningAdapter([32, 48], 24, 8)
    with torch.no_grad():
        for weight in conditioning_adapter.parameters():
            weight.normal_(std=0.1)
    pipe = finelip_sdxl.FineLIPSDXLAdapterPipeline(
        **components, adapter=t2i_adapter, conditioning_adapter=conditioning_adapter
    )
    pipe.swap_text_encoders()
    assert (pipe.adapter, pipe.conditioning_adapter) == (t2i_adapter, conditioning_adapter)
    both = draw(pipe, image=CONTROL)
    assert differ(draw(pipe, image=CONTROL, adapter_conditioning_scale=0.0), both)
    pipe.set_conditioning_adapter_scale(0.0)
    assert differ(draw(pipe, image=CONTROL), both)


# The refiner


@pytest.fixture
def refiners(components) -> tuple[StableDiffusionXLImg2ImgPipeline, FineLIPSDXLImg2ImgPipeline]:
    """Stock's and a stretched one, of the same weights."""
    config = {**make_unet().config, "cross_attention_dim": 48, "projection_class_embeddings_input_dim": 5 * 8 + 24}
    torch.manual_seed(5)
    parts = {
        "vae": components["vae"],
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": make_text_encoder(48, projection_dim=24, seed=2),
        "tokenizer_2": make_tokenizer(pad_token="!"),
        "unet": type(make_unet()).from_config(config).eval(),
        "scheduler": DDIMScheduler(),
        "requires_aesthetics_score": True,
        "force_zeros_for_empty_prompt": False,
    }
    stretched = FineLIPSDXLImg2ImgPipeline(**parts)
    stretched.swap_text_encoders()
    return StableDiffusionXLImg2ImgPipeline(**parts), stretched


@ALL_LENGTHS
def test_a_refiner_takes_over(pipe, refiners, prompt) -> None:
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler()  # Euler's noise is so large halfway that no text shows in what is random
    half = {"num_inference_steps": 4, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    latents = pipe(prompt, denoising_end=0.5, **half).images
    rest = {"image": latents, "denoising_start": 0.5, "num_inference_steps": 4}
    for refiner in refiners:
        assert differ(draw(refiner, prompt, **rest), draw(refiner, prompt, **{**rest, "image": -latents}))
    as_stock, stretched = (draw(refiner, prompt, **rest) for refiner in refiners)
    assert differ(stretched, as_stock) == (prompt != SHORT)
    assert differ(draw(refiners[1], f"{prompt} a hare", **rest), stretched)


# One pipeline from another


def in_dtype(components: dict, dtype: torch.dtype) -> dict:
    return {name: part.to(dtype) if isinstance(part, torch.nn.Module) else part for name, part in components.items()}


def assert_reads_248_in(pipe, dtype: torch.dtype) -> None:
    assert [num_positions(pipe.text_encoder), num_positions(pipe.text_encoder_2)] == [248, 248]
    assert [pipe.tokenizer.model_max_length, pipe.tokenizer_2.model_max_length] == [248, 248]
    assert {part.dtype for part in pipe.components.values() if isinstance(part, torch.nn.Module)} == {dtype}


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@DTYPES
def test_ours_made_of_one_another_lose_neither_positions_nor_dtype(components, dtype) -> None:
    pipe = FineLIPSDXLPipeline(**in_dtype(components, dtype))
    pipe.swap_text_encoders()
    for auto in (AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image):
        pipe = auto.from_pipe(pipe)
        assert type(pipe).__name__.startswith("FineLIPSDXL")
        assert_reads_248_in(pipe, dtype)
    for ours in (FineLIPSDXLImg2ImgPipeline, finelip_sdxl.FineLIPSDXLInpaintPipeline, FineLIPSDXLPipeline):
        source, pipe = pipe, ours.from_pipe(pipe)
        assert_reads_248_in(pipe, dtype)
        assert_reads_248_in(source, dtype)
    assert_reads_248_in(FineLIPSDXLPipeline.from_pipe(pipe, dtype=torch.float64), torch.float64)


@DTYPES
def test_stock_becomes_ours_and_ours_stock(components, dtype) -> None:
    stock = StableDiffusionXLPipeline(**in_dtype(components, dtype))
    pipe = FineLIPSDXLPipeline.from_pipe(stock)
    pipe.swap_text_encoders()
    assert_reads_248_in(pipe, dtype)
    assert num_positions(stock.text_encoder) == 77
    assert stock.unet.dtype == dtype
    # Stock's own `from_pipe` casts to float32, the source as well, unless it is told the dtype.
    again = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe, dtype=dtype)
    assert_reads_248_in(again, dtype)
    assert_reads_248_in(AutoPipelineForText2Image.from_pipe(again), dtype)
    back = FineLIPSDXLPipeline.from_pipe(again)
    assert_reads_248_in(back, dtype)
    assert read_as_stock(back) == [True, True]
