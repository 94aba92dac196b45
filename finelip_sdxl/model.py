"""FineLIP: CLIP with a text encoder of 248 positions, token refinement and late interaction."""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    CLIPPreTrainedModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
)
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec
from transformers.utils.generic import ModelOutput

from finelip_sdxl.interaction import late_interaction
from finelip_sdxl.losses import triplet_margin_loss
from finelip_sdxl.options import NEGATIVE_SLOPE, POOLING, REFINED_SHARE, Pooling
from finelip_sdxl.text_encoders import TextEncoder, fill_model, text_encoder_tensors
from finelip_sdxl.token_refinement import TokenRefinement

logger = logging.getLogger(__name__)

GLOBAL_WEIGHT = 0.8  # weight of the embeddings' cosine in the fused similarity; late interaction has the rest


@strict
class FineLIPConfig(PreTrainedConfig):
    """The config of a `FineLIPModel`. Unknown fields are left out, with a warning.

    Args:
        text_config: config of the text tower, a `CLIPTextConfig` or a dict of its fields.
        vision_config: config of the image tower, a `CLIPVisionConfig` or a dict of its fields; None for a model that
            encodes texts only.
        projection_dim: width of the common embeddings of texts and images; None for a text tower without a projection,
            such as SDXL's first text encoder.
        refined_image_tokens: number of refined tokens of an image (K in the paper); None without a refinement.
        refined_text_tokens: number of refined tokens of a text; None without a refinement.
        interaction_slope: slope of the late interaction, see `late_interaction`.
        interaction_pooling: pooling of the late interaction, `"max"` or `"mean"`.
        logit_scale_init_value: initial logarithm of the scale of similarities.
        initializer_factor: scale of the random weights of a new model, as in CLIP.
        initializer_range: standard deviation of the random weights of new refinement layers.

    Examples:
        >>> config = FineLIPConfig(text_config={"hidden_size": 128, "max_position_embeddings": 248})
        >>> config.text_config.max_position_embeddings, config.vision_config
        (248, None)
    """

    model_type = "finelip"
    sub_configs_defaults = {  # noqa: RUF012 (transformers' own way to declare them)
        "text_config": SubConfigSpec(config_class=CLIPTextConfig),
        "vision_config": SubConfigSpec(config_class=CLIPVisionConfig, optional=True),
    }

    text_config: Any = None
    vision_config: Any = None
    projection_dim: int | None = 512
    refined_image_tokens: int | None = None
    refined_text_tokens: int | None = None
    interaction_slope: float = NEGATIVE_SLOPE
    interaction_pooling: str = "max"
    logit_scale_init_value: float = 2.6592
    initializer_factor: float = 1.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]  # transformers has no types for it
        if self.interaction_pooling not in POOLING or not 0 <= self.interaction_slope <= 1:
            raise ValueError(
                f"interaction_slope is {self.interaction_slope} and interaction_pooling {self.interaction_pooling!r};"
                f" expected 0 to 1, and one of {', '.join(POOLING)}."
            )
        # Other names than fields and transformers' own have become attributes, and would be saved again and again.
        own = vars(PreTrainedConfig()).keys() | {"model_type"}
        if unknown := sorted(kwargs.keys() & vars(self).keys() - own - {field.name for field in fields(self)}):
            logger.warning("A FineLIP's config has no fields %s: they are left out.", ", ".join(unknown))
            for name in unknown:
                delattr(self, name)


@dataclass
class FineLIPTextOutput(ModelOutput):
    """The result of `FineLIPModel.encode_text`; n is the number of positions of the input, C the embedding size.

    Attributes:
        embeds: (batch, C), the projected state of the end token, not normalized; None without a projection.
        tokens: (batch, n, C), the projected states of all positions; None without a projection.
        refined_tokens: (batch, K + 1, C), the text's refined tokens and its end token; None without a refinement.
        mask: (batch, n), True from the start token to the end token.
        last_hidden_state: (batch, n, width), after the final norm.
        hidden_states: layers + 1 tensors (batch, n, width), before the final norm; None unless they were asked for.
            SDXL's UNet was trained on `hidden_states[-2]`.
    """

    embeds: Tensor | None = None
    tokens: Tensor | None = None
    refined_tokens: Tensor | None = None
    mask: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class FineLIPImageOutput(ModelOutput):
    """The result of `FineLIPModel.encode_image`; C is the embedding size.

    Attributes:
        embeds: (batch, C), the projected class token, not normalized.
        tokens: (batch, 1 + patches, C), projected, class token first.
        refined_tokens: (batch, 1 + K, C), the class token and the patches' refined tokens; None without a refinement.
        last_hidden_state: (batch, 1 + patches, width), after the post-norm.
        hidden_states: layers + 1 tensors (batch, 1 + patches, width), before the post-norm; None unless asked for.
    """

    embeds: Tensor | None = None
    tokens: Tensor | None = None
    refined_tokens: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class FineLIPOutput(ModelOutput):
    """The result of `FineLIPModel.forward`; a part is None where its input was not passed.

    Attributes:
        loss: the paper's triplet margin loss of the late interaction (of the cosine, without a token refinement); None
            without `ids`.
        similarity: (images, texts), FineLIP's retrieval score: 0.8 · global + 0.2 · fine, or global alone.
        global_similarity: (images, texts), the cosine of the embeddings.
        fine_similarity: (images, texts), late interaction of the refined tokens, or of all tokens on a side without a
            refinement; None without a token refinement on either side.
        text, image: the results of `encode_text` and `encode_image`.
    """

    loss: Tensor | None = None
    similarity: Tensor | None = None
    global_similarity: Tensor | None = None
    fine_similarity: Tensor | None = None
    text: FineLIPTextOutput | None = None
    image: FineLIPImageOutput | None = None


class FineLIPModel(CLIPPreTrainedModel):
    """CLIP's two towers with a long text encoder (FineLIP, arXiv 2504.01916).

    Weights come from `finelip_sdxl.load_finelip`, or from `from_pretrained` for a directory that `save_pretrained`
    wrote. Its keys are transformers' `CLIPModel`'s, plus `image_refinement.*` and `text_refinement.*`.

    Examples:
        >>> config = FineLIPConfig(
        ...     text_config={"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1,
        ...                  "max_position_embeddings": 248},
        ...     projection_dim=32,
        ... )
        >>> model = FineLIPModel(config).eval()
        >>> text = model.encode_text(torch.tensor([[49406, 320, 2368, 49407]]))
        >>> text.embeds.shape, text.tokens.shape
        (torch.Size([1, 32]), torch.Size([1, 4, 32]))
        >>> model.to_text_encoder(projection=True).config.max_position_embeddings
        248
    """

    config: FineLIPConfig  # type: ignore[assignment]
    config_class = FineLIPConfig
    base_model_prefix = "finelip"
    main_input_name = "input_ids"

    def __init__(self, config: FineLIPConfig) -> None:
        super().__init__(config)
        dim, text_config, vision_config = config.projection_dim, config.text_config, config.vision_config
        self.text_model = CLIPTextModel._from_config(text_config)
        self.text_projection = None if dim is None else nn.Linear(text_config.hidden_size, dim, bias=False)
        self.vision_model = None
        self.visual_projection = None
        if vision_config is not None:
            if dim is None:
                raise ValueError("projection_dim is None; expected a width, which an image tower needs.")
            self.vision_model = CLIPVisionModel._from_config(vision_config)
            self.visual_projection = nn.Linear(vision_config.hidden_size, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.image_refinement = _refinement(dim, config.refined_image_tokens)
        self.text_refinement = _refinement(dim, config.refined_text_tokens)
        self.post_init()  # type: ignore[no-untyped-call]  # transformers has no types for it

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # All parameters that a state dict may lack are set here: loading builds on the meta device.
        super()._init_weights(module)  # type: ignore[no-untyped-call]  # transformers has no types for it
        if isinstance(module, TokenRefinement):
            init.ones_(module.scale)
        elif isinstance(module, FineLIPModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            for projection in (module.text_projection, module.visual_projection):
                if projection is not None:
                    init.normal_(projection.weight, std=projection.in_features**-0.5 * self.config.initializer_factor)

    def get_input_embeddings(self) -> nn.Module:
        table: nn.Module = self.text_model.embeddings.token_embedding
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.embeddings.token_embedding = value

    def encode_text(self, input_ids: Tensor, output_hidden_states: bool = False) -> FineLIPTextOutput:
        """Encode texts.

        Args:
            input_ids: (batch, n), start token first, with an end token in each row; n is at most the number of
                positions. Attention is causal, so tokens after the end token change nothing before it.
            output_hidden_states: whether to return the states of every layer.

        Raises:
            ValueError: n exceeds the number of positions.
        """
        positions = self.text_model.embeddings.position_embedding.weight.shape[0]
        if input_ids.shape[-1] > positions:
            raise ValueError(f"The text has {input_ids.shape[-1]} tokens; expected at most {positions}: shorten it.")
        out = self.text_model(input_ids=input_ids, output_hidden_states=output_hidden_states)
        project = self.text_projection
        tokens = None if project is None else project(out.last_hidden_state)
        at = torch.arange(input_ids.shape[-1], device=input_ids.device)
        end = end_positions(input_ids, self.config.text_config.eos_token_id)[:, None]
        refined = None
        if self.text_refinement is not None and tokens is not None:
            # In a text without any other token, the end token itself is refined.
            few = self.text_refinement(tokens, mask=at < end.clamp(min=1))
            refined = torch.cat([few, tokens.gather(1, end[..., None].expand(-1, -1, tokens.shape[-1]))], dim=1)
        return FineLIPTextOutput(
            embeds=None if project is None else project(out.pooler_output),
            tokens=tokens,
            refined_tokens=refined,
            mask=at <= end,
            last_hidden_state=out.last_hidden_state,
            hidden_states=out.hidden_states,
        )

    def encode_image(self, pixel_values: Tensor, output_hidden_states: bool = False) -> FineLIPImageOutput:
        """Encode images.

        Args:
            pixel_values: (batch, 3, height, width), normalized as for CLIP, of the size in the vision config.
            output_hidden_states: whether to return the states of every layer.

        Raises:
            ValueError: the model has no image tower, or the images have another size.
        """
        if self.vision_model is None or self.visual_projection is None:
            raise ValueError("This FineLIP has no image tower: load it from a whole CLIP, not from a text encoder.")
        out = self.vision_model(pixel_values=pixel_values, output_hidden_states=output_hidden_states)
        states = self.vision_model.post_layernorm(out.last_hidden_state)
        tokens = self.visual_projection(states)
        refined = None
        if self.image_refinement is not None:
            refined = torch.cat([tokens[:, :1], self.image_refinement(tokens[:, 1:])], dim=1)
        return FineLIPImageOutput(
            embeds=tokens[:, 0],
            tokens=tokens,
            refined_tokens=refined,
            last_hidden_state=states,
            hidden_states=out.hidden_states,
        )

    def forward(
        self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, ids: Tensor | None = None
    ) -> FineLIPOutput:
        """Encode texts, images or both, and compare each image with each text if both are passed.

        Args:
            input_ids: (texts, n), see `encode_text`.
            pixel_values: (images, 3, height, width), see `encode_image`.
            ids: (pairs,), ids of the images, for the loss: text i then belongs to image i, and pairs of equal id are no
                negatives of each other.

        Raises:
            ValueError: as in `encode_text` and `encode_image`; or `ids` come without equally many texts and images.
        """
        text = None if input_ids is None else self.encode_text(input_ids)
        image = None if pixel_values is None else self.encode_image(pixel_values)
        out = FineLIPOutput(text=text, image=image)
        if text and image and text.embeds is not None and image.embeds is not None:
            trained = out.global_similarity = F.normalize(image.embeds, dim=-1) @ F.normalize(text.embeds, dim=-1).T
            out.similarity = out.global_similarity
            if self.has_token_refinement:
                trained = out.fine_similarity = self.compare(fine_tokens(image)[0], *fine_tokens(text))
                out.similarity = GLOBAL_WEIGHT * out.global_similarity + (1 - GLOBAL_WEIGHT) * out.fine_similarity
            if ids is not None:
                out.loss = triplet_margin_loss(trained, ids)
        elif ids is not None:
            raise ValueError("ids were passed without texts and images to compare: pass input_ids and pixel_values.")
        return out

    @property
    def has_token_refinement(self) -> bool:
        """Whether the tokens of images, of texts or of both are refined."""
        return self.image_refinement is not None or self.text_refinement is not None

    def compare(self, image_tokens: Tensor, text_tokens: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """Late interaction as the config says, of the tokens that `fine_tokens` returns: (images, texts)."""
        slope, pooling = self.config.interaction_slope, cast(Pooling, self.config.interaction_pooling)
        return late_interaction(image_tokens, text_tokens, text_mask=text_mask, slope=slope, pooling=pooling)

    def add_token_refinement(self, num_tokens: int | None = None, *, images: bool = True, texts: bool = True) -> None:
        """Add a new token refinement to a model without one, for example to a plain CLIP.

        Args:
            num_tokens: number K of refined tokens of an image and of a text; by default ⌊patches · 0.4 · 0.5⌋, as
                published, and at least one.
            images: whether the tokens of images are refined.
            texts: whether those of texts are.

        Raises:
            ValueError: the model has a token refinement, or lacks an image tower or the text projection.
        """
        vision, dim = self.config.vision_config, self.config.projection_dim
        if self.image_refinement is not None or self.text_refinement is not None:
            raise ValueError("This FineLIP has a token refinement already: train that one, or load another model.")
        if vision is None or dim is None:
            raise ValueError("This model lacks an image tower or a text projection, and token refinement needs both.")
        if num_tokens is None:
            num_tokens = self.refined_tokens_of(REFINED_SHARE)
        for side, is_refined in (("image", images), ("text", texts)):
            if is_refined:
                refinement = TokenRefinement(dim, num_tokens).to(self.logit_scale)
                refinement.apply(self._init_weights)
                setattr(self, f"{side}_refinement", refinement.train(self.training))
                setattr(self.config, f"refined_{side}_tokens", num_tokens)

    def refined_tokens_of(self, share: float) -> int:
        """Number K of refined tokens that is a share of an image's patches, at least one."""
        vision = self.config.vision_config
        # The share of 0.3 is a little less than that: 3 of 10 are 3.
        return max(1, int(share * (vision.image_size // vision.patch_size) ** 2 + 1e-9))

    def to_text_encoder(self, projection: bool) -> TextEncoder:
        """The text tower as a plain transformers model, for SDXL.

        Args:
            projection: True for a `CLIPTextModelWithProjection` (SDXL's second encoder), False for a
                `CLIPTextModel` (its first).

        Returns:
            A text encoder in evaluation mode with this model's positions, device and dtype. On the CPU it shares the
            memory of this model's weights: `copy.deepcopy` it to train one without the other.

        Raises:
            ValueError: `projection` is True, and the model has no projection.
        """
        tensors = text_encoder_tensors(self.text_model)
        if self.text_projection is not None:
            tensors["text_projection.weight"] = self.text_projection.weight.detach()
        return text_encoder_of(self.config, tensors, projection)


def text_encoder_of(config: FineLIPConfig, tensors: Mapping[str, Tensor], projection: bool) -> TextEncoder:
    """`FineLIPModel.to_text_encoder` for a config and weights that match it, without a model.

    Args:
        config: config of the FineLIP.
        tensors: weights of the FineLIP. Only the text tower and its projection are used.
        projection: whether the encoder has a projection.

    Raises:
        ValueError: `projection` is True, and the weights have no projection.
    """
    text_config = copy.deepcopy(config.text_config)
    if config.projection_dim is not None:
        text_config.projection_dim = config.projection_dim
    tower = {key: tensor for key, tensor in tensors.items() if key.startswith("text_model.")}
    if not projection:
        return fill_model(CLIPTextModel, text_config, tower)
    if "text_projection.weight" not in tensors:
        raise ValueError(
            "This FineLIP was loaded from a text encoder without a projection (such as SDXL's first): "
            "use projection=False."
        )
    tower["text_projection.weight"] = tensors["text_projection.weight"]
    return fill_model(CLIPTextModelWithProjection, text_config, tower)


def fine_tokens(out: FineLIPTextOutput | FineLIPImageOutput) -> tuple[Tensor, Tensor | None]:
    """The tokens of images or texts that late interaction compares: the refined ones, or all without a refinement.

    Returns:
        (batch, tokens, C), and for all tokens of texts their mask, (batch, tokens), which leaves out the padding.

    Raises:
        ValueError: they have no tokens, since the model has no projection.
    """
    if out.refined_tokens is not None:
        return out.refined_tokens, None
    if out.tokens is None:
        raise ValueError("This FineLIP has no projection, so there are no tokens to compare: load a whole CLIP.")
    return out.tokens, out.mask if isinstance(out, FineLIPTextOutput) else None


def end_positions(input_ids: Tensor, end_token: int) -> Tensor:
    """The position of each text's end token, (batch,), by the rule of transformers' `CLIPTextModel`.

    Configs with an end token of 2 are older than textual inversion: there the largest id is the end token.

    Args:
        input_ids: (batch, n), with an end token in each row.
        end_token: `eos_token_id` of the text config.

    Examples:
        >>> end_positions(torch.tensor([[7, 3, 8, 8], [7, 3, 4, 8]]), end_token=8)
        tensor([2, 3])
    """
    if end_token == 2:
        return input_ids.argmax(dim=-1)
    return (input_ids == end_token).int().argmax(dim=-1)


def _refinement(dim: int | None, num_tokens: int | None) -> TokenRefinement | None:
    if num_tokens is None:
        return None
    if dim is None:
        raise ValueError("projection_dim is None; expected a width, which token refinement needs.")
    return TokenRefinement(dim, num_tokens)
