"""The miniature that ships: its files open in stock Diffusers, and it draws what it is told."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from transformers import CLIPTokenizer

from finelip_sdxl import FineLIPSDXLPipeline, load_finelip, miniature_clip, miniature_path
from finelip_sdxl.data import load_image_processor, load_tokenizer
from finelip_sdxl.evaluation import evaluate_retrieval
from finelip_sdxl.foreign_files import read_json
from finelip_sdxl.miniature.captions import long_caption, short_caption
from finelip_sdxl.miniature.dataset import MiniatureScenes
from finelip_sdxl.miniature.drawing import IMAGE_SIZE, draw_batch, draw_scene
from finelip_sdxl.miniature.scoring import score_picture
from finelip_sdxl.miniature.tokenizer import build_tokenizer
from finelip_sdxl.miniature.world import make_scene
from finelip_sdxl.recommended import recommended_of
from finelip_sdxl.text_encoders import num_positions

SCENES = [make_scene(f"test-{k}") for k in range(32)]
CAPTIONS = [short_caption(scene, f"test-{k}") for k, scene in enumerate(SCENES)]
GUIDANCE = recommended_of(read_json(miniature_path() / "model_index.json")).guidance_scale
COMPONENTS = ("vae", "unet", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def stock() -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(miniature_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: StableDiffusionXLPipeline, texts: list[str], steps: int = 20) -> list[Image.Image]:
    seeds = [torch.Generator().manual_seed(k) for k in range(len(texts))]
    return pipe(texts, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=seeds).images


def test_weights_are_small_half_precision_safetensors() -> None:
    files = list(miniature_path().parent.glob("**/*.safetensors"))
    finelips = [file for file in files if "finelip" in file.parent.name]
    assert len(finelips) == 2
    assert sum(file.stat().st_size for file in finelips) <= 12 * 10**6
    assert sum(file.stat().st_size for file in files) <= 36 * 10**6
    for file in files:
        with safe_open(file, "pt") as tensors:
            assert {tensors.get_slice(key).get_dtype() for key in tensors.keys()} <= {"F16", "I64"}  # noqa: SIM118


def test_text_encoder_files_have_the_keys_that_every_transformers_reads() -> None:
    with safe_open(miniature_path() / "text_encoder" / "model.safetensors", "pt") as tensors:
        assert all(key.startswith("text_model.") for key in tensors.keys())  # noqa: SIM118


def test_model_index_names_stock_classes() -> None:
    index = json.loads((miniature_path() / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_opens_in_stock_diffusers_in_one_dtype(dtype: torch.dtype | None) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(miniature_path(), **({"dtype": dtype} if dtype else {}))
    pipe.set_progress_bar_config(disable=True)
    assert {getattr(pipe, name).dtype for name in COMPONENTS} == {dtype or torch.float32}
    assert pipe("a red star", num_inference_steps=1).images[0].size == (IMAGE_SIZE, IMAGE_SIZE)


def test_shipped_tokenizers_are_the_ones_that_the_code_builds(stock: StableDiffusionXLPipeline) -> None:
    for shipped, built in ((stock.tokenizer, build_tokenizer()), (stock.tokenizer_2, build_tokenizer(pad_token="!"))):
        assert isinstance(shipped, CLIPTokenizer)
        texts = [caption.text for caption in CAPTIONS]
        assert shipped.get_vocab() == built.get_vocab()
        assert shipped(texts, padding="max_length").input_ids == built(texts, padding="max_length").input_ids


@pytest.mark.slow
def test_stock_draws_what_short_captions_describe(stock: StableDiffusionXLPipeline) -> None:
    images = draw(stock, [caption.text for caption in CAPTIONS])
    right = [
        score_picture(image, scene)[mention.index].right
        for image, scene, caption in zip(images, SCENES, CAPTIONS, strict=True)
        for mention in caption.described
    ]
    assert np.mean(right) >= 0.95


def test_default_pipeline_draws_short_captions_bit_for_bit_as_stock(stock: StableDiffusionXLPipeline) -> None:
    ours = FineLIPSDXLPipeline.from_pretrained("miniature")
    ours.set_progress_bar_config(disable=True)
    for caption in CAPTIONS[:3]:
        ((a,), (b,)) = (draw(pipe, [caption.text], steps=4) for pipe in (stock, ours))
        assert a.tobytes() == b.tobytes()


@pytest.mark.slow
def test_default_pipeline_draws_what_stock_cuts_off() -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained("miniature")
    pipe.set_progress_bar_config(disable=True)
    captions = [long_caption(scene, f"long {k}") for k, scene in enumerate(SCENES[:12])]
    images = draw(pipe, [caption.text for caption in captions])
    right = []
    for image, scene, caption in zip(images, SCENES, captions, strict=False):
        tokens = pipe.tokenizer(caption.text)
        scores = score_picture(image, scene)
        late = [mention for mention in caption.described if tokens.char_to_token(mention.end - 1) >= 77]
        right += [scores[mention.index].right for mention in late]
    assert len(right) > 50
    assert np.mean(right) >= 0.93


def test_the_adapter_comes_with_the_finelips_that_it_was_trained_on() -> None:
    assert FineLIPSDXLPipeline.from_pretrained("miniature").conditioning_adapter is not None
    others = FineLIPSDXLPipeline.from_pretrained("miniature", finelip="miniature-clip-1")
    assert others.conditioning_adapter is None
    assert FineLIPSDXLPipeline.from_pretrained("miniature", conditioning_adapter=None).conditioning_adapter is None


@torch.no_grad()
def test_scorer_reads_what_the_vae_makes_of_renderings(stock: StableDiffusionXLPipeline) -> None:
    decoded = stock.vae(draw_batch(SCENES)).sample
    images = stock.image_processor.postprocess(decoded)
    scores = [score for image, scene in zip(images, SCENES, strict=True) for score in score_picture(image, scene)]
    assert np.mean([score.right and score.size for score in scores]) >= 0.98


@pytest.mark.parametrize("pair", [1, 2])
@torch.no_grad()
def test_clips_are_whole(pair: int) -> None:
    """Each finds most of 32 unseen pictures by their captions, which needs both towers and both projections."""
    clip = miniature_clip(pair)
    tokens = build_tokenizer()([caption.text for caption in CAPTIONS], padding="max_length", return_tensors="pt")
    images = [draw_scene(scene) for scene in SCENES]
    processor = load_image_processor(f"miniature-clip-{pair}", clip.config.vision_config.image_size)
    pixels = processor(images, return_tensors="pt").pixel_values
    similarity = clip(input_ids=tokens.input_ids, pixel_values=pixels).logits_per_text
    assert (similarity.argmax(dim=1) == torch.arange(len(SCENES))).float().mean() >= 0.5


def test_an_unknown_pair_is_refused_with_what_is_known() -> None:
    with pytest.raises(ValueError, match="pair is 3; expected 1 or 2"):
        miniature_clip(3)


def test_finelip_tells_siblings_apart_that_stock_does_not() -> None:
    data = MiniatureScenes("test", size=50)
    recall = {}
    for name, factor in (("miniature-clip-1", 1), ("miniature-finelip-1", 4), ("miniature-finelip-2", 4)):
        model = load_finelip(name, factor=factor)
        tokenizer = load_tokenizer(name, positions=num_positions(model))
        result = evaluate_retrieval(model, data, tokenizer, load_image_processor(name, 96), progress=False)
        recall[name] = list(result.recall.values())[-1].text_to_image[1]  # by fused, or by all there is
    assert recall["miniature-clip-1"] < 0.4  # chance among five siblings is 0.2
    assert recall["miniature-finelip-1"] > 0.75
    assert recall["miniature-finelip-2"] > 0.75
