"""The losses of both stages of the alignment, and the texts of stage 1."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.data import CaptionDataset
from finelip_sdxl.data.caption_dataset import split_sentences
from finelip_sdxl.options import STOCK_POSITIONS
from finelip_sdxl.training.denoising import DenoisingLoss


@dataclass(frozen=True)
class TeacherContext:
    """A sentence of a long caption, within a text that stock's encoders can encode whole.

    Attributes:
        text: the sentence, after earlier sentences with words of its own, all within 77 tokens.
        end: position in `text` of the sentence's last token, or of the last token that fits.
        end_in_caption: position of the same token in the caption.
    """

    text: str
    end: int
    end_in_caption: int


def captions_of(data: CaptionDataset, index: int, tokenizer: CLIPTokenizer) -> dict[str, str]:
    """Returns the `long` and the `short` caption of an image, cut to 248 and 77 tokens."""
    long, short = data.captions(index)[0], data.short_caption(index)
    return {"long": fit(long, tokenizer, tokenizer.model_max_length), "short": fit(short, tokenizer, STOCK_POSITIONS)}


def fit(text: str, tokenizer: CLIPTokenizer, positions: int) -> str:
    """Returns as many first sentences of a text as fit, or, if none does, the beginning of the first one.

    Examples:
        >>> from finelip_sdxl.data import load_tokenizer
        >>> fit("A star is red. A ring is green.", load_tokenizer("miniature-clip-1"), positions=10)
        'A star is red.'
    """
    sentences = split_sentences(text)
    lengths = token_counts(sentences, tokenizer)
    held = sum(total <= positions - 2 for total in accumulate(lengths))
    if held:
        return " ".join(sentences[:held])
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    # A cut word, or a cut character of several tokens, may have more tokens than before.
    cuts = (text[:end] for _, end in reversed(offsets[: positions - 2]))
    return next(cut for cut in cuts if token_counts([cut], tokenizer)[0] <= positions - 2)


def token_counts(sentences: list[str], tokenizer: CLIPTokenizer) -> list[int]:
    """Returns the number of tokens of each sentence. Their sum is the text's: no token of CLIP crosses a space."""
    return [len(ids) for ids in tokenizer(sentences, add_special_tokens=False).input_ids]


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def word_rarity(captions: Collection[str]) -> dict[str, float]:
    """Returns the inverse document frequency of each word: 0 for a word in all captions.

    Examples:
        >>> word_rarity(["A red star.", "A star."])["star"], round(word_rarity(["A red star.", "A star."])["red"], 2)
        (0.0, 0.69)
    """
    frequency = Counter(word for caption in captions for word in words_of(caption))
    return {word: math.log(len(captions) / count) for word, count in frequency.items()}


def build_teacher_contexts(caption: str, tokenizer: CLIPTokenizer, rarity: Mapping[str, float]) -> list[TeacherContext]:
    """Returns a context for each sentence of a long caption, for stock's encoders to teach it.

    The meaning of a sentence may depend on another one more than 77 tokens back ("the star"). So its context holds the
    sentences that introduced its words, rare words first, and then as many others as fit.

    Args:
        caption: the text; the student encodes it whole.
        tokenizer: tokenizer of the student; SDXL's two have one vocabulary.
        rarity: rarity of each word, see `word_rarity`; a word that is not in it counts as the rarest.

    Examples:
        >>> from finelip_sdxl.data import load_tokenizer
        >>> caption = "A star is red. " + "A dull and gray line is here. " * 12 + "The ring is like the star."
        >>> build_teacher_contexts(caption, load_tokenizer("miniature-clip-1"), rarity={"a": 0, "is": 0})[-1].text[:38]
        'A star is red. A dull and gray line is'
    """
    sentences = split_sentences(caption)
    lengths = token_counts(sentences, tokenizer)
    rarest = max(rarity.values(), default=0) or 1.0
    introduced: dict[str, int] = {}  # the first sentence of each word

    contexts = []
    for number, sentence in enumerate(sentences):
        tokens = min(lengths[number], STOCK_POSITIONS - 2)
        room = STOCK_POSITIONS - 2 - tokens
        related = dict.fromkeys(range(number), 0.0)
        for word in words_of(sentence):
            if introduced.setdefault(word, number) < number:
                related[introduced[word]] += rarity.get(word, rarest)
        context: list[int] = []
        for other in sorted(related, key=lambda other: (-related[other], -other)):
            if lengths[other] <= room:
                context.append(other)
                room -= lengths[other]
        before = sorted(context)
        contexts.append(
            TeacherContext(
                text=" ".join([*(sentences[other] for other in before), sentence]),
                end=sum(lengths[other] for other in before) + tokens,
                end_in_caption=sum(lengths[:number]) + tokens,
            )
        )
    return contexts


class Alignment(nn.Module):
    """Both stages as one module, for training with several processes.

    Args:
        trained: the parameters to train: parts of the stages' pipelines.
        stages: functions from a batch to its losses, by name; the loss to minimize is under `loss`.
    """

    def __init__(self, trained: Iterable[nn.Parameter], stages: dict[str, Callable[..., dict[str, Tensor]]]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(trained)  # so a checkpoint holds these alone, and nothing of SDXL
        self.stages = stages

    def forward(self, stage: str, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.stages[stage](**batch)


class TextAlignment:
    """Stage 1: adapted states of the student, with states of stock's encoders as target. No images.

    Both encode short captions whole. Their states are compared position by position, padding included, since the UNet
    gets it too; pooled vectors are compared as well. For long captions, stock encodes each sentence in a context
    (`build_teacher_contexts`). States are compared at the sentence's end only: there a causal encoder has seen the
    whole sentence. Long captions' pooled vectors have no target: stock cannot encode a long text whole.

    Args:
        pipe: the student, with the parameters to train; it encodes as in a call.
        teacher: the stock pipeline.
        rarity: rarity of words, which decides the sentences of a context.
    """

    def __init__(
        self, pipe: FineLIPSDXLPipeline, teacher: StableDiffusionXLPipeline, rarity: Mapping[str, float]
    ) -> None:
        self.pipe, self.teacher, self.rarity = pipe, teacher, rarity

    def __call__(self, long: list[str], short: list[str]) -> dict[str, Tensor]:
        """Returns the loss and its parts: relative squared errors, of states as means over tokens."""
        contexts = [build_teacher_contexts(caption, self.pipe.tokenizer, self.rarity) for caption in long]
        flat = [context for of_caption in contexts for context in of_caption]
        with torch.no_grad():
            context_states, _ = encode(self.teacher, [context.text for context in flat])
            target_short, target_pooled = encode(self.teacher, short)
        states, _ = encode(self.pipe, long)
        student_short, student_pooled = encode(self.pipe, short)
        student = torch.cat(
            [
                of_text[[context.end_in_caption for context in of_caption]]
                for of_text, of_caption in zip(states, contexts, strict=True)
            ]
        )
        target = context_states[range(len(flat)), [context.end for context in flat]]
        dims = self.pipe.text_encoder.config.hidden_size, self.pipe.text_encoder_2.config.hidden_size
        losses = {
            "long": relative_error(student, target, dims),
            "short": relative_error(student_short[:, :STOCK_POSITIONS], target_short, dims),
            "pooled": relative_error(student_pooled, target_pooled, (student_pooled.shape[-1],)),
        }
        return {"loss": cast(Tensor, sum(losses.values())), **losses}


class ImageAlignment:
    """Stage 2: the denoising loss of pictures and their captions through SDXL's frozen UNet.

    Args:
        pipe: the pipeline with the parameters to train.
        snr_gamma: see `DenoisingLoss`.
    """

    def __init__(self, pipe: FineLIPSDXLPipeline, snr_gamma: float | None = None) -> None:
        self.pipe, self.losses = pipe, DenoisingLoss(pipe, snr_gamma)

    def __call__(self, groups: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns the mean loss of a batch.

        Args:
            groups: pictures with captions padded to one length: `latents` and `noise`, (batch, channels, height,
                width), `timesteps`, (batch,), `time_ids`, (batch, 6), and either `captions`, or `states`, (batch,
                tokens, dim), and `pooled`, (batch, dim), encoded and not adapted yet.
        """
        losses = torch.cat([self._losses(**group) for group in groups])
        return {"loss": losses.mean()}

    def _losses(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        time_ids: Tensor,
        captions: list[str] | None = None,
        states: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        if states is None:
            states, pooled = encode(self.pipe, captions or [])
        elif self.pipe.conditioning_adapter is not None:
            dims = self.pipe.conditioning_adapter.config.state_dims
            parts, pooled = self.pipe.conditioning_adapter(torch.split(states, dims, dim=-1), pooled)
            states = torch.cat(parts, dim=-1)
        assert pooled is not None  # it comes with the states
        return self.losses(latents, noise, timesteps, time_ids, states, pooled)


def encode(pipe: StableDiffusionXLPipeline, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Returns the UNet's input for texts: states of both encoders, (batch, tokens, dim), and pooled, (batch, dim)."""
    states, _, pooled, _ = cast(Any, pipe).encode_prompt(texts, do_classifier_free_guidance=False)
    return states, pooled


def relative_error(states: Tensor, target: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Returns the squared error over the target's squared norm, as a mean over vectors and a sum over encoders.

    Args:
        states: (…, dim), the concatenated states of the encoders.
        target: likewise.
        dims: the width of each encoder.

    Examples:
        >>> relative_error(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[1.0, 1.0, 2.0]]), (2, 1))
        tensor(0.7500)
    """
    error = torch.zeros((), device=states.device)
    for mine, wanted in zip(
        torch.split(states.float(), list(dims), -1), torch.split(target.float(), list(dims), -1), strict=True
    ):
        error = error + ((mine - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
    return error
