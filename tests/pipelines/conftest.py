"""Components that single pipelines need beside the tiny SDXL."""

import inspect

import pytest
import torch
from diffusers import ControlNetUnionModel, ControlNetXSAdapter, MotionAdapter, T2IAdapter, UNet2DConditionModel

from tests.helpers.tiny_sdxl import make_unet


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


@pytest.fixture
def motion_adapter() -> MotionAdapter:
    torch.manual_seed(3)
    return MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        use_motion_mid_block=False,
    ).eval()


@pytest.fixture
def editing_unet() -> UNet2DConditionModel:
    """A UNet that takes the picture to edit beside the noise, as InstructPix2Pix's."""
    return make_unet(in_channels=8)


@pytest.fixture
def deep_unet() -> UNet2DConditionModel:
    """A UNet of as many layers as ControlNet-XS takes for granted."""
    return make_unet(layers_per_block=2)


@pytest.fixture
def controlnet_xs(deep_unet) -> ControlNetXSAdapter:
    torch.manual_seed(3)
    return ControlNetXSAdapter.from_unet(
        deep_unet, size_ratio=0.5, num_attention_heads=2, conditioning_embedding_out_channels=(16, 32)
    ).eval()
