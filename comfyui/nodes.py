"""The nodes as ComfyUI sees them: names, inputs and outputs. What they do is in the modules beside this one.

Heavy imports are left to the first use of a node, so that ComfyUI starts as fast as without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finelip_sdxl.options import EMPHASIS, WEIGHTING

if TYPE_CHECKING:
    from .text_encoders import TextEncoders

_CATEGORY = "FineLIP-SDXL"
_TEXT_ENCODERS = "FINELIP_TEXT_ENCODERS"
_PLAIN_TEXT = "none"
_MOST_PIXELS = 16384  # ComfyUI's own limit of its sizes


class LoadTextEncoders:
    """SDXL's text encoders with 248 positions and their conditioning adapter, from a CLIP or from names."""

    CATEGORY = _CATEGORY
    DESCRIPTION = (
        "SDXL's text encoders with 248 positions, and a conditioning adapter. Connect the CLIP of an SDXL checkpoint,"
        " or name an SDXL in Diffusers' layout; FineLIPs replace its encoders."
    )
    FUNCTION = "load"
    RETURN_TYPES = (_TEXT_ENCODERS,)
    RETURN_NAMES = ("text_encoders",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {},
            "optional": {
                "clip": ("CLIP", {"tooltip": "The CLIP of an SDXL checkpoint, in place of `sdxl`."}),
                "sdxl": _text_input("Folder or hub id of an SDXL in Diffusers' layout, or `miniature`."),
                "finelip": _text_input(
                    "Replacement of the first encoder: file (of models/text_encoders, or a path), folder or hub id of a"
                    " FineLIP or Long-CLIP. Empty: the encoder is stretched."
                ),
                "finelip_2": _text_input("Replacement of the second encoder, likewise."),
                "conditioning_adapter": _text_input(
                    "Folder or hub id of a conditioning adapter, or `miniature`. Empty: the SDXL's own, if there is one"
                    " and no FineLIP is named."
                ),
            },
        }

    def load(
        self, clip: Any = None, sdxl: str = "", finelip: str = "", finelip_2: str = "", conditioning_adapter: str = ""
    ) -> tuple[TextEncoders]:
        """The text encoders.

        Raises:
            OSError, ValueError: see `load_text_encoders`.
        """
        from .text_encoders import load_text_encoders

        return (load_text_encoders(clip, sdxl, finelip, finelip_2, conditioning_adapter),)


class EncodePrompt:
    """A prompt and its negative prompt, of any length, to conditionings of equal length, with the report as text."""

    CATEGORY = _CATEGORY
    DESCRIPTION = "Encodes a prompt and a negative prompt of any length. The report says what was encoded, and how."
    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "STRING")
    RETURN_NAMES = ("positive", "negative", "report")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = {"multiline": True, "dynamicPrompts": True}
        return {
            "required": {
                "text_encoders": (_TEXT_ENCODERS,),
                "text": ("STRING", {**text, "tooltip": "The prompt."}),
            },
            "optional": {
                "negative_text": (
                    "STRING",
                    {**text, "default": "", "tooltip": "The negative prompt; it may be empty."},
                ),
                "weighting": (
                    [_PLAIN_TEXT if syntax is None else syntax for syntax in WEIGHTING],
                    {"default": "a1111", "tooltip": "Syntax of weights, such as (word:1.3); none: all of it is text."},
                ),
                "emphasis": (
                    list(EMPHASIS),
                    {"default": "comfyui", "tooltip": "Effect of a weight, as the tool of this name computes it."},
                ),
                "conditioning_adapter_scale": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.05, "tooltip": "Share of the adapter."},
                ),
                "width": _size_input("Width of the original picture, for SDXL. 0: that of the picture."),
                "height": _size_input("Height of the original picture, for SDXL. 0: that of the picture."),
                "crop_w": _size_input("Left edge of the original picture's crop."),
                "crop_h": _size_input("Upper edge of the original picture's crop."),
                "target_width": _size_input("Width after the crop, for SDXL. 0: as `width`."),
                "target_height": _size_input("Height after the crop, for SDXL. 0: as `height`."),
            },
        }

    def encode(
        self,
        text_encoders: TextEncoders,
        text: str,
        negative_text: str = "",
        weighting: str = "a1111",
        emphasis: str = "comfyui",
        conditioning_adapter_scale: float = 1.0,
        **sizes: int,
    ) -> tuple[Any, Any, str]:
        """Positive and negative conditioning, and the report.

        Args:
            text_encoders: as `LoadTextEncoders` returns them.
            text, negative_text: the texts; an empty one is encoded as such.
            weighting, emphasis, conditioning_adapter_scale: as in a call of the pipeline.
            **sizes: SDXL's sizes by ComfyUI's names; 0 leaves one to ComfyUI.

        Raises:
            ValueError: see `encode_prompt` of the pipelines.
        """
        return text_encoders.encode(
            text,
            negative_text,
            weighting=None if weighting == _PLAIN_TEXT else weighting,
            emphasis=emphasis,
            conditioning_adapter_scale=conditioning_adapter_scale,
            sizes={name: size for name, size in sizes.items() if size},
        )


class LoadMiniature:
    """The small SDXL that ships with the package, for trying the nodes without a download."""

    CATEGORY = _CATEGORY
    DESCRIPTION = "The small SDXL that ships with FineLIP-SDXL: its UNet, its VAE, and an empty latent of its size."
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "VAE", "LATENT")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def load(self) -> tuple[Any, Any, dict[str, Any]]:
        """The model, the VAE and the latent."""
        from .miniature import load_miniature

        return load_miniature()


def _text_input(tooltip: str) -> tuple[str, dict[str, Any]]:
    return "STRING", {"default": "", "tooltip": tooltip}


def _size_input(tooltip: str) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": 0, "min": 0, "max": _MOST_PIXELS, "tooltip": tooltip}


NODE_CLASS_MAPPINGS = {
    "FineLIPLoadTextEncoders": LoadTextEncoders,
    "FineLIPEncodePrompt": EncodePrompt,
    "FineLIPLoadMiniature": LoadMiniature,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FineLIPLoadTextEncoders": "Load Text Encoders (FineLIP)",
    "FineLIPEncodePrompt": "Encode Long Prompt (FineLIP)",
    "FineLIPLoadMiniature": "Load Miniature SDXL (FineLIP)",
}
