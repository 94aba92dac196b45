"""`regional_prompts`: which places of the UNet read which text, and with what it does not go."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLInstructPix2PixPipeline, StableDiffusionXLPAGPipeline, StableDiffusionXLPipeline
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image

from finelip_sdxl import (
    FineLIPSDXLAdapterPipeline,
    FineLIPSDXLControlNetPipeline,
    FineLIPSDXLImg2ImgPipeline,
    FineLIPSDXLInpaintPipeline,
    FineLIPSDXLPipeline,
    long_prompts,
    regional_prompts,
    trace_attention,
)
from tests.helpers.drawing import draw
from tests.helpers.prompts import ALL_LENGTHS, ENDLESS, LONG, SHORT
from tests.pipelines.test_ecosystem import save_ip_adapter

WHOLE, LEFT = np.ones((2, 2)), np.array([[1.0, 0.0]])
RIGHT = 1 - LEFT
BASE = "a large hare"
IMAGE = Image.fromarray(np.full((16, 16, 3), 90, dtype=np.uint8))
MASK = Image.fromarray(np.full((16, 16), 255, dtype=np.uint8))
ROUNDING = 1e-4  # texts of other lengths go through other kernels


def drawn(pipe: Any, regions: Any, prompt: Any = BASE, **arguments: Any) -> np.ndarray:
    with regional_prompts(pipe, regions):
        return draw(pipe, prompt, **arguments)


def drawn_from(pipe: Any, prompt: str, **arguments: Any) -> np.ndarray:
    """From a text's states with the pooled vector of another, which a region over the whole picture amounts to."""
    states, pooled = pipe.encode_prompt(prompt)[0], pipe.encode_prompt(BASE)[2]
    return draw(pipe, None, prompt_embeds=states, pooled_prompt_embeds=pooled, **arguments)


def differ(one: np.ndarray, other: np.ndarray) -> bool:
    return float(np.abs(one - other).max()) > 1e-3


# Which places read which text


@ALL_LENGTHS
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_region_of_the_whole_picture_is_the_picture_of_its_text(pipe, prompt, guidance) -> None:
    found = drawn(pipe, [(WHOLE, prompt)], guidance_scale=guidance)
    np.testing.assert_allclose(found, drawn_from(pipe, prompt, guidance_scale=guidance), atol=ROUNDING)
    assert differ(found, draw(pipe, BASE, guidance_scale=guidance))


def test_each_half_reads_its_text_and_the_rest_the_picture_s(pipe) -> None:
    """The output of a cross-attention layer is what is added between its block's norms."""
    block = next(module for module in pipe.unet.modules() if isinstance(module, BasicTransformerBlock))
    states: dict[str, torch.Tensor] = {}
    for name in ("norm2", "norm3"):
        getattr(block, name).register_forward_pre_hook(lambda _, args, name=name: states.update({name: args[0]}))
    third = np.array([[1.0, 0.0, 0.0, 0.0]])
    drawn(pipe, [(third, LONG), (RIGHT, ENDLESS)], num_inference_steps=1, negative_prompt=SHORT)
    added = states["norm3"] - states["norm2"]
    with torch.no_grad():
        negative, base, left, right = (
            block.attn2(block.norm2(states["norm2"])[[row]], pipe.encode_prompt(text)[0])[0].unflatten(0, (4, 4))
            for row, text in ((0, SHORT), (1, BASE), (1, LONG), (1, ENDLESS))
        )
    found = added.unflatten(1, (4, 4))
    torch.testing.assert_close(found[0], negative, atol=1e-4, rtol=1e-4)
    expected = torch.cat([left[:, :1], base[:, 1:2], right[:, 2:]], dim=1)
    torch.testing.assert_close(found[1], expected, atol=1e-4, rtol=1e-4)


def test_regions_that_overlap_share_and_gray_masks_blend(pipe) -> None:
    one = drawn(pipe, [(WHOLE, LONG), (WHOLE, ENDLESS)])
    np.testing.assert_allclose(one, drawn(pipe, [(WHOLE, ENDLESS), (WHOLE, LONG)]), atol=ROUNDING)
    half = drawn(pipe, [(WHOLE / 2, LONG), (WHOLE / 2, ENDLESS)])
    np.testing.assert_allclose(one, half, atol=ROUNDING)
    assert differ(one, drawn(pipe, [(WHOLE, LONG)]))
    np.testing.assert_allclose(drawn(pipe, [(WHOLE / 2, BASE)]), draw(pipe, BASE), atol=ROUNDING)


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(np.repeat(np.array([[255, 0]], dtype=np.uint8), 2, axis=0)),
        Image.fromarray(np.array([[[255] * 3, [0] * 3]], dtype=np.uint8)),
        torch.tensor([[1.0, 0.0]]),
        np.array([[True, False]]),
        np.array([[1, 0]]),
    ],
    ids=["L", "RGB", "tensor", "bool", "int"],
)
def test_a_mask_is_an_image_or_an_array(pipe, mask) -> None:
    assert np.array_equal(drawn(pipe, [(mask, LONG)]), drawn(pipe, [(LEFT, LONG)]))


def test_batches_have_the_same_regions(pipe) -> None:
    def seeds() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (0, 1)]

    found = drawn(pipe, [(LEFT, LONG)], [BASE, BASE], generator=seeds())
    np.testing.assert_allclose(found[:1], drawn(pipe, [(LEFT, LONG)]), atol=ROUNDING)
    two = drawn(pipe, [(LEFT, LONG)], BASE, num_images_per_prompt=2, generator=seeds())
    np.testing.assert_allclose(two, found, atol=ROUNDING)


def test_options_of_the_call_hold_for_texts_of_regions(pipe) -> None:
    text = f"{LONG} (quiet:1.4)"
    found = drawn(pipe, [(WHOLE, text)], weighting="a1111", clip_skip=1)
    with_options = pipe.encode_prompt(text, weighting="a1111", clip_skip=1)[0]
    pooled = pipe.encode_prompt(BASE)[2]
    expected = draw(pipe, None, prompt_embeds=with_options, pooled_prompt_embeds=pooled)
    np.testing.assert_allclose(found, expected, atol=ROUNDING)
    with pytest.raises(ValueError, match="has 422 tokens"):
        drawn(pipe, [(LEFT, ENDLESS)], overflow="error")


# Other pipelines and features


def test_other_pipelines_draw_with_regions(pipe, controlnet, t2i_adapter) -> None:
    cases: list[tuple[Any, dict[str, Any]]] = [
        (FineLIPSDXLImg2ImgPipeline.from_pipe(pipe), {"image": IMAGE, "strength": 0.9}),
        (FineLIPSDXLInpaintPipeline.from_pipe(pipe), {"image": IMAGE, "mask_image": MASK, "strength": 0.9}),
        (FineLIPSDXLControlNetPipeline.from_pipe(pipe, controlnet=controlnet), {"image": IMAGE}),
        (FineLIPSDXLAdapterPipeline.from_pipe(pipe, adapter=t2i_adapter), {"image": IMAGE}),
        (long_prompts(StableDiffusionXLPAGPipeline).from_pipe(pipe), {"pag_scale": 2.0}),
    ]
    for other, arguments in cases:
        found = drawn(other, [(WHOLE, LONG)], **arguments)
        if not isinstance(other, FineLIPSDXLControlNetPipeline):  # a ControlNet reads the picture's prompt
            np.testing.assert_allclose(found, drawn_from(other, LONG, **arguments), atol=ROUNDING)
        assert differ(found, draw(other, BASE, **arguments))


def test_only_calls_of_this_pipeline_have_regions_and_nothing_is_left(pipe) -> None:
    other = FineLIPSDXLPipeline.from_pipe(pipe)
    plain, regional = draw(pipe, BASE), drawn(pipe, [(LEFT, LONG)])
    within = []
    with regional_prompts(pipe, [(LEFT, LONG)]):

        def draw_another(*_: Any) -> dict[str, Any]:
            within.append(draw(FineLIPSDXLPipeline.from_pipe(pipe, scheduler=type(pipe.scheduler)()), BASE))
            return {}

        assert np.array_equal(draw(other, BASE), plain)
        assert np.array_equal(draw(pipe, BASE, callback_on_step_end=draw_another), regional)
    assert all(np.array_equal(one, plain) for one in within)
    assert np.array_equal(draw(pipe, BASE), plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())


def test_nested_contexts_have_their_own_regions(pipe) -> None:
    outer = drawn(pipe, [(LEFT, LONG)])
    with regional_prompts(pipe, [(LEFT, LONG)]):
        inner = drawn(pipe, [(RIGHT, LONG)])
        assert np.array_equal(draw(pipe, BASE), outer)
    assert differ(inner, outer)


def test_nothing_is_left_after_an_error(pipe) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise KeyError("in the middle")

    with pytest.raises(KeyError):
        drawn(pipe, [(LEFT, LONG)], callback_on_step_end=fail)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())
    assert differ(drawn(pipe, [(LEFT, LONG)]), draw(pipe, BASE))


def test_heat_maps_are_of_the_picture_s_prompt_and_the_cache_changes_nothing(pipe) -> None:
    expected = drawn(pipe, [(LEFT, LONG)])
    with trace_attention(pipe) as trace:
        assert np.array_equal(drawn(pipe, [(LEFT, LONG)]), expected)
    assert trace.text() == BASE
    assert trace.heat_map(BASE).any()
    pipe.enable_text_projection_cache()
    assert np.array_equal(drawn(pipe, [(LEFT, LONG)]), expected)


def test_fused_projections_change_only_the_last_bits(pipe) -> None:
    expected = drawn(pipe, [(LEFT, LONG)])
    pipe.fuse_qkv_projections(vae=False)
    np.testing.assert_allclose(drawn(pipe, [(LEFT, LONG)]), expected, atol=ROUNDING)


# What is refused


@pytest.mark.parametrize(
    ("regions", "error", "message"),
    [
        ([], ValueError, r"^`regions` is empty; pass at least one pair"),
        (None, TypeError, r"^`regions` is None; expected a list of pairs"),
        ([LEFT], TypeError, r"^`regions\[0\]` is array.*; expected a pair of a mask and a text"),
        ([(LEFT, None)], TypeError, r"^`regions\[0\]` is .*; expected a pair of a mask and a text"),
        ([(LEFT, "a"), (LEFT, "a" * 20_001)], ValueError, r"^`regions\[1\]\[1\]` has 20,001 characters"),
        ([(0 * LEFT, "a")], ValueError, r"^`regions\[0\]\[0\]` is empty: paint the region white"),
        ([("left", "a")], ValueError, r"^`regions\[0\]\[0\]` is 'left'; expected an image, or an array"),
        ([(255 * LEFT, "a")], ValueError, r"is an array \(1, 2\) of float64 from 0 to 255; expected an image"),
        ([(np.nan * LEFT, "a")], ValueError, r"from nan to nan; expected an image"),
        ([(np.ones(3), "a")], ValueError, r"is an array \(3,\) of float64"),
        ([(np.ones((0, 2)), "a")], ValueError, r"is an array \(0, 2\) of float64; expected"),
        ([(np.array([["a"]]), "a")], ValueError, r"is an array \(1, 1\) of <U1; expected"),
    ],
    ids=str,
)
def test_wrong_regions_are_refused_in_one_sentence(pipe, regions, error, message) -> None:
    with pytest.raises(error, match=message):
        drawn(pipe, regions)


def test_another_pipeline_is_refused(components) -> None:
    with pytest.raises(TypeError, match="takes a pipeline of this package, but got StableDiffusionXLPipeline"):
        drawn(StableDiffusionXLPipeline(**components), [(LEFT, LONG)])


def test_what_does_not_go_with_regions_says_so(pipe, editing_unet) -> None:
    editing = long_prompts(StableDiffusionXLInstructPix2PixPipeline).from_pipe(pipe, unet=editing_unet)
    with pytest.raises(ValueError, match="do not go with FineLIPSDXLInstructPix2PixPipeline: use a FineLIPSDXLPipe"):
        drawn(editing, [(LEFT, LONG)], image=IMAGE)
    without = FineLIPSDXLPipeline.from_pipe(pipe, text_encoder=None, text_encoder_2=None)
    given = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), pipe.encode_prompt(BASE)[::2], strict=True))
    with pytest.raises(ValueError, match="no text encoders to encode a region's text"):
        drawn(without, [(LEFT, LONG)], None, **given)
    pipe.unet.mid_block.compile(backend="eager")
    with pytest.raises(ValueError, match="need a UNet that is not compiled"):
        drawn(pipe, [(LEFT, LONG)])


def test_an_ip_adapter_is_refused(pipe, tmp_path) -> None:
    save_ip_adapter(pipe.unet, tmp_path)
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name="ip-adapter.safetensors")
    with pytest.raises(ValueError, match="do not go with an IP-Adapter: call unload_ip_adapter"):
        drawn(pipe, [(LEFT, LONG)], ip_adapter_image=IMAGE)
    pipe.unload_ip_adapter()
    assert differ(drawn(pipe, [(LEFT, LONG)]), draw(pipe, BASE))
