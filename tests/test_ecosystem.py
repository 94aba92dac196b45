"""What SDXL's users already have, on prompts of every length: LoRAs, textual inversions, IP-Adapters, ControlNets."""

import copy
import inspect

import numpy as np
import pytest
import torch
from conftest import make_text_encoder, make_tokenizer, make_unet
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetUnionModel,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetUnionImg2ImgPipeline,
    StableDiffusionXLControlNetUnionInpaintPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

import finelip_sdxl
from finelip_sdxl import FineLIPSDXLImg2ImgPipeline, FineLIPSDXLPipeline
from finelip_sdxl.text_encoders import num_positions

SHORT = "a red fox above the blue square"
LONG = " ".join([SHORT] * 20)  # 142 tokens
ENDLESS = " ".join([SHORT] * 60)  # 422
PROMPTS = pytest.mark.parametrize("prompt", [SHORT, LONG, ENDLESS], ids=["77", "248", "past-248"])


@pytest.fixture
def pipe(components) -> FineLIPSDXLPipeline:
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    return pipe


def embeddings(pipe, prompt: str = LONG) -> torch.Tensor:
    with torch.no_grad():
        return pipe.encode_prompt(prompt, device="cpu")[0]


def draw(pipe, prompt: str = LONG, **arguments) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, **{"num_inference_steps": 2, "generator": generator, "output_type": "np", **arguments}).images[
        0
    ]


def differ(one, other, by: float = 1e-3) -> bool:
    """By more than rounding does."""
    return float(np.abs(np.asarray(one) - np.asarray(other)).max()) > by


# LoRA

# Of each part: kohya's prefix and Diffusers', a layer's path and its width. Like those that are passed around, it has
# the output projection, by which Diffusers tells kohya's layout.
ENCODER_LAYERS = tuple(f"text_model.encoder.layers.0.self_attn.{layer}" for layer in ("q_proj", "out_proj"))
PARTS = {
    "unet": ("lora_unet", ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q",), 32),
    "text_encoder": ("lora_te1", ENCODER_LAYERS, 32),
    "text_encoder_2": ("lora_te2", ENCODER_LAYERS, 48),
}


def make_lora(layout: str, seed: int = 0, parts: tuple[str, ...] = tuple(PARTS)) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 on the UNet and both text encoders; kohya's alpha of 2 scales by 1."""
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for part in parts:
        prefix, layers, width = PARTS[part]
        for layer in layers:
            down, up = (torch.randn(*shape, generator=random) / 4 for shape in ((2, width), (width, 2)))
            if layout == "kohya":
                name = f"{prefix}_{layer.replace('.', '_')}"
                weights |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                weights[f"{name}.alpha"] = torch.tensor(2.0)
            else:
                weights |= {f"{part}.{layer}.lora_A.weight": down, f"{part}.{layer}.lora_B.weight": up}
    return weights


@pytest.fixture(params=["diffusers", "kohya"])
def lora(request, tmp_path) -> str:
    save_file(make_lora(request.param), tmp_path / "lora.safetensors")
    return str(tmp_path / "lora.safetensors")


@PROMPTS
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


def test_a_lora_does_to_short_prompts_what_it_does_in_stock(pipe, components, lora) -> None:
    stock = StableDiffusionXLPipeline(**copy.deepcopy(components))
    for each in (pipe, stock):
        each.load_lora_weights(lora)
    torch.testing.assert_close(embeddings(pipe, SHORT), embeddings(stock, SHORT), atol=1e-5, rtol=1e-4)
    assert not differ(draw(pipe, SHORT), draw(stock, SHORT))


@PROMPTS
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


# Textual inversion


def add_concept(pipe, dtype: torch.dtype = torch.float32) -> None:
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


@pytest.mark.parametrize("prompt", [f"<concept> {SHORT}", f"{LONG} <concept>", f"{ENDLESS} <concept>"])
def test_a_textual_inversion_of_several_vectors_is_read_wherever_it_stands(pipe, prompt) -> None:
    tokens = sum(window.tokens for window in pipe.describe_prompt(prompt).readings[0].windows)
    before = embeddings(pipe, prompt)
    add_concept(pipe)
    after = embeddings(pipe, prompt)
    readings = pipe.describe_prompt(prompt).readings
    assert sum(window.tokens for window in readings[0].windows) < tokens  # two tokens, no longer spelled
    assert differ(after[..., :32], before[:, : after.shape[1], :32])
    assert differ(after[..., 32:], before[:, : after.shape[1], 32:])
    for name, tokenizer in (("text_encoder", pipe.tokenizer), ("text_encoder_2", pipe.tokenizer_2)):
        pipe.unload_textual_inversion("<concept>", tokenizer=tokenizer, text_encoder=getattr(pipe, name))
    assert not differ(embeddings(pipe, prompt), before)


# IP-Adapter


def make_ip_adapter(pipe) -> dict:
    """For every cross-attention of the UNet, and a projection of the image to four tokens."""
    random = torch.Generator().manual_seed(3)
    width = pipe.unet.config.cross_attention_dim
    layers, number = {}, 1
    for name in pipe.unet.attn_processors:
        if "attn2" in name:
            hidden = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for key in ("to_k_ip", "to_v_ip"):
                layers[f"{number}.{key}.weight"] = torch.randn(hidden, width, generator=random)
            number += 2
    projection = {
        "proj.weight": torch.randn(4 * width, 16, generator=random),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": layers}


@PROMPTS
def test_an_ip_adapter_acts_beside_the_prompt(components, prompt) -> None:
    torch.manual_seed(4)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=16, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    pipe = FineLIPSDXLPipeline(
        **components,
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    )
    pipe.swap_text_encoders()
    before = draw(pipe, prompt)
    adapter = make_ip_adapter(pipe)
    pipe.unet._load_ip_adapter_weights([adapter])
    picture = Image.fromarray(np.full((16, 16, 3), 200, dtype=np.uint8))
    pipe.set_ip_adapter_scale(0.0)
    assert not differ(draw(pipe, prompt, ip_adapter_image=picture), before)
    pipe.set_ip_adapter_scale(1.0)
    assert differ(draw(pipe, prompt, ip_adapter_image=picture), before)
    assert draw(pipe, SHORT, ip_adapter_image=picture).shape == (16, 16, 3)


# ControlNets, T2I-Adapters


@pytest.fixture
def controlnet_union() -> ControlNetUnionModel:
    torch.manual_seed(3)
    tiny = {
        "num_trans_channel": 16,
        "num_trans_head": 2,
        "num_proj_channel": 16,
        "conditioning_embedding_out_channels": (16, 32),
    }
    shape = make_unet().config
    shared = {
        name: shape[name] for name in inspect.signature(ControlNetUnionModel.__init__).parameters if name in shape
    }
    model = ControlNetUnionModel(**{**shared, **tiny})
    with torch.no_grad():
        for block in [*model.controlnet_down_blocks, model.controlnet_mid_block]:
            torch.nn.init.normal_(block.weight, std=0.5)
    return model.eval()


@pytest.fixture
def t2i_adapter() -> T2IAdapter:
    torch.manual_seed(3)
    return T2IAdapter(
        in_channels=3, channels=[16, 32, 32, 32], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
    ).eval()


IMAGE = np.random.RandomState(0).rand(1, 16, 16, 3).astype(np.float32)
CONTROL = torch.from_numpy(IMAGE).permute(0, 3, 1, 2)
MASK = (IMAGE[..., :1] > 0.5).astype(np.float32)
CONTROLLED = {
    StableDiffusionXLControlNetImg2ImgPipeline: {"image": IMAGE, "control_image": CONTROL, "strength": 0.9},
    StableDiffusionXLControlNetInpaintPipeline: {
        "image": IMAGE, "mask_image": MASK, "control_image": CONTROL, "strength": 0.9,
    },
    StableDiffusionXLControlNetUnionPipeline: {"control_image": [CONTROL], "control_mode": [0]},
    StableDiffusionXLControlNetUnionImg2ImgPipeline: {
        "image": IMAGE, "control_image": [CONTROL], "control_mode": [0], "strength": 0.9,
    },
    StableDiffusionXLControlNetUnionInpaintPipeline: {
        "image": IMAGE, "mask_image": MASK, "control_image": [CONTROL], "control_mode": [0], "strength": 0.9,
    },
}  # fmt: skip


def ours_of(stock_class: type) -> type:
    return getattr(finelip_sdxl, stock_class.__name__.replace("StableDiffusionXL", "FineLIPSDXL"))


@pytest.mark.parametrize("stock_class", CONTROLLED, ids=lambda stock_class: stock_class.__name__)
def test_every_controlnet_pipeline_reads_long_prompts(components, controlnet, controlnet_union, stock_class) -> None:
    part = controlnet_union if "Union" in stock_class.__name__ else controlnet
    stock = stock_class(**copy.deepcopy(components), controlnet=part)
    pipe = ours_of(stock_class)(**components, controlnet=part)
    pipe.swap_text_encoders()
    arguments = CONTROLLED[stock_class]
    assert not differ(draw(pipe, SHORT, **arguments), draw(stock, SHORT, **arguments))
    assert differ(draw(pipe, LONG, **arguments), draw(stock, LONG, **arguments))
    assert draw(pipe, ENDLESS, **arguments).shape == (16, 16, 3)
    scaled = draw(pipe, LONG, **arguments, controlnet_conditioning_scale=0.0)
    assert differ(scaled, draw(pipe, LONG, **arguments))


def test_a_t2i_adapter_pipeline_reads_long_prompts(components, t2i_adapter) -> None:
    stock = StableDiffusionXLAdapterPipeline(**copy.deepcopy(components), adapter=t2i_adapter)
    pipe = finelip_sdxl.FineLIPSDXLAdapterPipeline(**components, adapter=t2i_adapter)
    pipe.swap_text_encoders()
    pipe.conditioning_adapter = finelip_sdxl.ConditioningAdapter([32, 48], 24, 8)
    arguments = {"image": CONTROL}
    assert not differ(draw(pipe, SHORT, **arguments), draw(stock, SHORT, **arguments))
    assert differ(draw(pipe, LONG, **arguments), draw(stock, LONG, **arguments))
    assert draw(pipe, ENDLESS, **arguments).shape == (16, 16, 3)
    assert differ(draw(pipe, LONG, **arguments, adapter_conditioning_scale=0.0), draw(pipe, LONG, **arguments))
    assert pipe.adapter is t2i_adapter


def test_its_folder_opens_with_its_own_class_again(components, t2i_adapter, tmp_path) -> None:
    pipe = finelip_sdxl.FineLIPSDXLAdapterPipeline(**components, adapter=t2i_adapter)
    pipe.swap_text_encoders()
    pipe.save_pretrained(tmp_path)
    again = finelip_sdxl.FineLIPSDXLAdapterPipeline.from_pretrained(tmp_path)
    assert isinstance(again.adapter, T2IAdapter)
    assert not differ(draw(again, LONG, image=CONTROL), draw(pipe, LONG, image=CONTROL))


# The refiner


@pytest.mark.parametrize("stretched", [False, True], ids=["stock", "stretched"])
@PROMPTS
def test_the_refiner_takes_over(pipe, components, prompt, stretched) -> None:
    config = {**make_unet().config, "cross_attention_dim": 48, "projection_class_embeddings_input_dim": 5 * 8 + 24}
    torch.manual_seed(5)
    parts = {
        "vae": components["vae"],
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": make_text_encoder(48, projection_dim=24, seed=2),
        "tokenizer_2": make_tokenizer(pad_token="!"),
        "unet": type(make_unet()).from_config(config).eval(),
        "scheduler": components["scheduler"],
        "requires_aesthetics_score": True,
        "force_zeros_for_empty_prompt": False,
    }
    refiner = (FineLIPSDXLImg2ImgPipeline if stretched else StableDiffusionXLImg2ImgPipeline)(**parts)
    if stretched:
        refiner.swap_text_encoders()
    half = {"num_inference_steps": 4, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(prompt, denoising_end=0.5, **half).images
    assert draw(refiner, prompt, image=latents, denoising_start=0.5, num_inference_steps=4).shape == (16, 16, 3)


# One pipeline from another


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pipelines_are_made_of_one_another_and_lose_neither_positions_nor_dtype(components, dtype) -> None:
    pipe = FineLIPSDXLPipeline(
        **{n: p.to(dtype) if isinstance(p, torch.nn.Module) else p for n, p in components.items()}
    )
    pipe.swap_text_encoders()
    for auto in (AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image):
        pipe = auto.from_pipe(pipe, dtype=dtype)
        assert type(pipe).__name__.startswith("FineLIPSDXL")
        assert (num_positions(pipe.text_encoder), pipe.tokenizer_2.model_max_length) == (248, 248)
        assert {part.dtype for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.unet, pipe.vae)} == {dtype}


def test_a_stock_pipeline_becomes_ours_and_back(components) -> None:
    stock = StableDiffusionXLPipeline(**components)
    pipe = FineLIPSDXLPipeline.from_pipe(stock)
    pipe.swap_text_encoders()
    assert num_positions(pipe.text_encoder) == 248
    assert num_positions(stock.text_encoder) == 77
    assert num_positions(StableDiffusionXLPipeline.from_pipe(pipe).text_encoder) == 248
