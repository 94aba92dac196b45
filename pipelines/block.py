"""The text-encoder block of this folder for Modular Diffusers. It is the installed package's.

A script in a clone of the repository puts it in place of Diffusers' own::

    from diffusers import ModularPipelineBlocks, StableDiffusionXLAutoBlocks

    blocks = StableDiffusionXLAutoBlocks().get_workflow("text2image")
    blocks.sub_blocks["text_encoder"] = ModularPipelineBlocks.from_pretrained("pipelines", trust_remote_code=True)
"""

try:
    from finelip_sdxl.pipelines.modular import FineLIPSDXLTextEncoderStep
except ImportError as error:
    raise ImportError("This block needs FineLIP-SDXL: run `pip install .` in a clone of its repository.") from error

__all__ = ["FineLIPSDXLTextEncoderStep"]
