"""compel with its defaults: its windows of a prompt, and their embeddings."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate

from compel import Compel, CompelForSDXL, EmbeddingsProvider, ReturnedEmbeddingsType
from compel.convenience_wrappers import LabelledConditioning
from compel.prompt_parser import FlattenedPrompt, Fragment, PromptParser
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from pyparsing import ParseBaseException
from transformers import CLIPTokenizer

from finelip_sdxl.options import STOCK_POSITIONS
from finelip_sdxl.prompts.plan import PROMPT, EncoderPlan, Window, tokenize
from finelip_sdxl.prompts.vocabulary import name_tokens

# In characters; they take some two seconds.
MAX_PARSER_WORK = 6000

# Errors of compel's parser: its own, and Python's for unexpected texts.
_GIVING_UP = (
    ParseBaseException,
    PromptParser.ParsingException,
    ValueError,
    AttributeError,
    LookupError,
    AssertionError,
)


def open_compel(stock: DiffusionPipeline, device: str) -> Callable[[str, str | None], LabelledConditioning]:
    """Open compel with its defaults. It encodes prompts in windows of 77 tokens.

    Args:
        stock: a stock SDXL pipeline, or its refiner.
        device: the device of its encoders.

    Returns:
        A function of the prompt and the negative prompt. For a negative prompt of None it returns no negative
        embeddings.

    Examples:
        >>> from diffusers import StableDiffusionXLPipeline
        >>> from finelip_sdxl import miniature_path
        >>> encode = open_compel(StableDiffusionXLPipeline.from_pretrained(miniature_path()), "cpu")
        >>> encode("a red star", None).embeds.shape
        torch.Size([1, 77, 288])
    """
    if stock.text_encoder is not None:
        both = CompelForSDXL(stock, device=device)
        # By name: its second argument is the second encoder's prompt.
        return lambda prompt, negative: both(prompt, negative_prompt=negative)
    # compel has no class for the refiner, which has one text encoder.
    compel = Compel(
        stock.tokenizer_2,
        stock.text_encoder_2,
        truncate_long_prompts=False,
        returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        requires_pooled=True,
        device=device,
    )

    def encode(prompt: str, negative: str | None) -> LabelledConditioning:
        if negative is None:
            return LabelledConditioning(*compel(prompt))
        states, pooled = compel([prompt, negative])
        return LabelledConditioning(states[:1], pooled[:1], states[1:], pooled[1:])

    return encode


def plan_by_compel(tokenizer: CLIPTokenizer, prompt: str) -> EncoderPlan:
    """Plan a prompt as compel does. Where compel's syntax changes the text, the windows hold the changed text.

    Args:
        tokenizer: tokenizer of SDXL's first encoder, of any length.
        prompt: the text.

    Raises:
        ValueError: compel cannot parse the prompt.
    """
    with parsing(prompt):
        parsed = Compel.parse_prompt_string(prompt).prompts
    is_plain = len(parsed) == 1 and isinstance(parsed[0], FlattenedPrompt)
    fragments = [part.text for part in parsed[0].children if isinstance(part, Fragment)] if is_plain else [prompt]
    # Cuts without an encoder.
    provider = EmbeddingsProvider(tokenizer, None, truncate=False, model_max_length=STOCK_POSITIONS, device="cpu")
    rows = provider.get_token_ids_and_expand_weights(fragments, [1.0] * len(fragments), "cpu")[0]
    end = tokenizer.eos_token_id
    windows = [tuple(row[1 : row.index(end, 1)]) for row in rows.unflatten(0, (-1, STOCK_POSITIONS)).tolist()]
    # compel turns any white space into one space. Where nothing else changed, the text is shown as it was written.
    ids, _ = tokenize(tokenizer, prompt)
    text = prompt if ids == [token for window in windows for token in window] else " ".join(fragments)
    _, offsets = tokenize(tokenizer, text)
    ends = [*accumulate(map(len, windows))]
    starts = [0, *(offsets[end][0] if end < len(offsets) else len(text) for end in ends[:-1])]
    slices = [text[start:stop] for start, stop in zip(starts, [*starts[1:], len(text)], strict=True)]
    cut = tuple(Window(part, window) for part, window in zip(slices, windows, strict=True))
    return EncoderPlan("text_encoder", PROMPT, 0, cut, STOCK_POSITIONS, vocabulary=name_tokens(tokenizer))


@contextmanager
def parsing(*texts: str) -> Iterator[None]:
    """Turn errors of compel's parser, which takes brackets, + and - for weights, into one sentence.

    Args:
        *texts: texts for the parser. It parses everything in a bracket about four times, so a few nested brackets would
            take minutes: such texts are refused first.

    Raises:
        ValueError: brackets nest too deep, or the parser failed.

    Examples:
        >>> with parsing("(" * 10 + "a fox"):
        ...     pass
        Traceback (most recent call last):
        ValueError: compel would take minutes for so many nested brackets: take some out, or leave compel out.
    """
    if any(_parser_work(text) > MAX_PARSER_WORK for text in texts):
        raise ValueError("compel would take minutes for so many nested brackets: take some out, or leave compel out.")
    try:
        yield
    except RecursionError:
        reason = "brackets within brackets"
    except OverflowError:  # 1.1 to the power of that many plus signs
        reason = "a weight too large to be a number"
    except _GIVING_UP as error:
        reason = f"{str(error) or type(error).__name__:.300}"
    else:
        return
    raise ValueError(
        f"compel cannot parse this prompt ({reason}): take out its syntax (brackets, quotes, + and -), or leave compel"
        " out."
    )


def _parser_work(text: str) -> int:
    """Rough number of characters that compel's parser visits again."""
    depth, extra = 0, 0
    for match in re.finditer(r"\\.|.", text, re.DOTALL):
        depth = max(0, depth + {"(": 1, ")": -1}.get(match[0], 0))
        extra += len(match[0]) * (4 ** min(depth, 10) - 1)
    return extra
