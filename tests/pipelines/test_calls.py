"""What a call of the pipeline may be given, on long prompts: callbacks, schedulers, guidance, seeds, batches."""

import diffusers
import numpy as np
import pytest
import torch

from tests.helpers.drawing import draw
from tests.helpers.prompts import ALL_LENGTHS, ENDLESS, LONG, SHORT


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_every_scheduler_draws(pipe, name) -> None:
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    stock = diffusers.StableDiffusionXLPipeline.from_pipe(pipe)  # its encoders read 248
    one, other = draw(pipe, LONG, num_inference_steps=4), draw(pipe, ENDLESS, num_inference_steps=4)
    assert np.isfinite(one).all()
    assert not np.array_equal(one, other)
    pipe.length_buckets = ()
    np.testing.assert_allclose(
        draw(pipe, LONG, num_inference_steps=4), draw(stock, LONG, num_inference_steps=4), atol=1e-3
    )


@ALL_LENGTHS
def test_a_callback_sees_and_changes_what_the_unet_gets(pipe, prompt) -> None:
    shapes = []

    def forget_the_prompt(pipe, step, timestep, tensors) -> dict:
        shapes.append(tensors["prompt_embeds"].shape[1])
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    names = ["prompt_embeds", "add_text_embeds", "latents"]
    changed = draw(pipe, prompt, callback_on_step_end=forget_the_prompt, callback_on_step_end_tensor_inputs=names)
    assert shapes == [pipe.encode_prompt(prompt, device="cpu")[0].shape[1]] * 2
    assert not np.array_equal(changed, draw(pipe, prompt))


@ALL_LENGTHS
def test_a_callback_may_end_guidance_halfway(pipe, prompt) -> None:
    """As Diffusers' documentation does it."""
    shapes = []

    def end_guidance(pipe, step, timestep, tensors) -> dict:
        shapes.append(len(tensors["prompt_embeds"]))
        if step == 0:
            pipe._guidance_scale = 0.0
            return {name: tensor.chunk(2)[-1] for name, tensor in tensors.items()}
        return tensors

    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"]
    ended = draw(pipe, prompt, callback_on_step_end=end_guidance, callback_on_step_end_tensor_inputs=names)
    assert shapes == [2, 1]
    assert np.isfinite(ended).all()
    assert not np.array_equal(ended, draw(pipe, prompt))


@ALL_LENGTHS
def test_guidance_may_be_off_or_rescaled(pipe, prompt) -> None:
    usual = draw(pipe, prompt)
    off = draw(pipe, prompt, guidance_scale=1.0)
    rescaled = draw(pipe, prompt, guidance_rescale=0.7)
    assert not np.array_equal(off, usual)
    assert not np.array_equal(rescaled, usual)
    # Without guidance a negative prompt is not read, be it as long as it may.
    np.testing.assert_allclose(draw(pipe, prompt, guidance_scale=1.0, negative_prompt=ENDLESS), off, atol=1e-5)


@ALL_LENGTHS
def test_each_image_has_its_own_seed(pipe, prompt) -> None:
    both = draw(pipe, [prompt, prompt], generator=seeds(1, 2))
    again = draw(pipe, prompt, num_images_per_prompt=2, generator=seeds(1, 2))
    np.testing.assert_allclose(both, again, atol=1e-3)
    np.testing.assert_allclose(both[1], draw(pipe, prompt, generator=seeds(2)[0])[0], atol=1e-3)
    assert np.abs(both[0] - both[1]).max() > 1e-3


def test_a_batch_may_hold_prompts_of_every_length(pipe) -> None:
    # All are padded alike: a short prompt beside a long one is read in windows of the same length.
    images = draw(pipe, [SHORT, LONG, ENDLESS], generator=seeds(0, 0, 0))
    assert images.shape == (3, 16, 16, 3)
    alone = draw(pipe, ENDLESS)[0]
    np.testing.assert_allclose(images[2], alone, atol=1e-3)


def test_each_prompt_of_a_batch_may_give_several_images(pipe) -> None:
    found = draw(pipe, [SHORT, ENDLESS], num_images_per_prompt=2, generator=seeds(1, 2, 3, 4))
    expected = draw(pipe, [SHORT, SHORT, ENDLESS, ENDLESS], generator=seeds(1, 2, 3, 4))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(found[0] - found[2]).max() > 1e-3


def test_a_long_negative_prompt_counts(pipe) -> None:
    one = draw(pipe, SHORT, negative_prompt=f"{LONG} a small hare")
    other = draw(pipe, SHORT, negative_prompt=f"{LONG} a large hare")
    assert np.abs(one - other).max() > 1e-4


def test_the_two_encoders_may_get_different_prompts(pipe) -> None:
    one, other = draw(pipe, SHORT, prompt_2=LONG), draw(pipe, SHORT, prompt_2=f"{LONG} a quiet hare")
    assert np.abs(one - other).max() > 1e-4
