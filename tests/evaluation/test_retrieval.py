"""Retrieval: ranks against whole matrices written as loops, and what happens to the images, texts and modes."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTokenizer

from finelip_sdxl import FineLIPConfig, FineLIPModel
from finelip_sdxl.data import CaptionDataset, UnreadableImageError
from finelip_sdxl.evaluation import EncodedPairs, encode_pairs, evaluate_retrieval, retrieval_ranks
from finelip_sdxl.model import GLOBAL_WEIGHT
from tests.helpers.tiny_sdxl import make_tokenizer

WORDS = ["red fox", "blue hare", "small square", "quiet fox", "large hare", "red square", "the fox", "a blue fox"]


class Noise(CaptionDataset):
    """Noise with captions; those in `broken` cannot be read."""

    def __init__(self, size: int, captions: int = 1, broken: tuple[int, ...] = (), words: int = 6) -> None:
        self.size, self.number, self.broken, self.words = size, captions, broken, words

    def __len__(self) -> int:
        return self.size

    def image(self, index: int) -> Image.Image:
        if index in self.broken:
            raise UnreadableImageError(f"image {index} is broken")
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8))

    def captions(self, index: int) -> tuple[str, ...]:
        rng = np.random.default_rng(index)
        return tuple(" of ".join(rng.choice(WORDS, self.words)) for _ in range(self.number))


def image_processor(images: list[Image.Image], return_tensors: str) -> dict[str, torch.Tensor]:
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return {"pixel_values": pixels.permute(0, 3, 1, 2) / 127.5 - 1}


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return make_tokenizer()


@pytest.fixture
def model(tokenizer) -> FineLIPModel:
    return make_model(tokenizer, refined=3)


def make_model(tokenizer, refined: int | None = None) -> FineLIPModel:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 60, **ids}
    config = FineLIPConfig(
        text_config={**small, **text, "initializer_factor": 20.0},
        vision_config={**small, "image_size": 16, "patch_size": 8, "initializer_factor": 20.0},
        projection_dim=10,
        refined_image_tokens=refined,
        refined_text_tokens=refined,
    )
    return FineLIPModel(config).eval()


def random_pairs(images: int, captions: int, tokens: int = 3, dim: int = 6, seed: int = 0) -> EncodedPairs:
    """Random pairs that agree a little, so that ranks are spread."""
    generator = torch.Generator().manual_seed(seed)
    of = torch.arange(images).repeat_interleave(captions)

    def related(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = torch.randn(images, *shape, dim, generator=generator)
        text = image[of] + torch.randn(len(of), *shape, dim, generator=generator)
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    (image_embeds, text_embeds), (image_tokens, text_tokens) = related(), related(tokens)
    return EncodedPairs(image_embeds, text_embeds, of, image_tokens, text_tokens)


def naive_ranks(pairs: EncodedPairs, weight: float) -> tuple[list[int], list[int]]:
    """Whole matrices, and one comparison at a time."""
    cosine = (pairs.image_embeds @ pairs.text_embeds.T).numpy()
    fine = np.zeros_like(cosine)
    for i, image in enumerate(pairs.image_tokens):
        for j, text in enumerate(pairs.text_tokens):
            s = F.leaky_relu(text @ image.T, 0.1)
            fine[i, j] = s.max(dim=1).values.mean() + s.max(dim=0).values.mean()
    similarity = weight * cosine + (1 - weight) * fine
    of = pairs.image_of_text.tolist()
    of_images, of_texts = [], []
    for i, row in enumerate(similarity):
        best = max(row[j] for j in range(len(of)) if of[j] == i)
        of_images.append(sum(row[j] >= best for j in range(len(of)) if of[j] != i))
    for j, column in enumerate(similarity.T):
        of_texts.append(sum(column[i] >= column[of[j]] for i in range(len(column)) if i != of[j]))
    return of_images, of_texts


@pytest.mark.parametrize("captions", [1, 5])
def test_ranks_are_those_of_whole_matrices(captions) -> None:
    pairs = random_pairs(24, captions)
    weights = (1.0, 0.0, GLOBAL_WEIGHT, 0.3)
    of_images, of_texts = retrieval_ranks(pairs, weights)
    assert of_images.shape == (4, 24)
    assert of_texts.shape == (4, 24 * captions)
    for number, weight in enumerate(weights):
        expected = naive_ranks(pairs, weight)
        assert (of_images[number].tolist(), of_texts[number].tolist()) == expected
        assert 0 < np.mean(expected[1]) < 12, "neither perfect nor chance, so that the comparison says something"


@pytest.mark.parametrize("block_size", [1, 7, 40, 1000])
def test_ranks_do_not_depend_on_the_block_size(block_size) -> None:
    pairs = random_pairs(40, 2)
    for ranks, expected in zip(
        retrieval_ranks(pairs, (0.8, 0.0), block_size=block_size), retrieval_ranks(pairs, (0.8, 0.0)), strict=True
    ):
        assert torch.equal(ranks, expected)


def test_captions_may_stand_in_any_order() -> None:
    pairs = random_pairs(20, 3)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    mixed = EncodedPairs(
        pairs.image_embeds, pairs.text_embeds[order], pairs.image_of_text[order], pairs.image_tokens,
        pairs.text_tokens[order],
    )  # fmt: skip
    of_images, of_texts = retrieval_ranks(pairs)
    mixed_images, mixed_texts = retrieval_ranks(mixed)
    assert torch.equal(mixed_images, of_images)
    assert torch.equal(mixed_texts, of_texts[:, order])


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_model_that_tells_nothing_apart_finds_nothing(value) -> None:
    """Ties count against it, and so does what is not a number."""
    same = torch.full((12, 4), value) / 2
    of_images, of_texts = retrieval_ranks(EncodedPairs(same, same, torch.arange(12)))
    assert of_images.eq(11).all()
    assert of_texts.eq(11).all()


def test_a_difference_in_the_last_bits_is_a_tie() -> None:
    text = F.normalize(torch.randn(1, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    nearly = text * (1 - 1e-7)
    pairs = EncodedPairs(torch.cat([text, -text]), torch.cat([text, nearly]), torch.arange(2))
    assert retrieval_ranks(pairs)[0][0].tolist() == [1, 1]


def test_half_precision_tokens_are_compared_in_full() -> None:
    pairs = random_pairs(50, 1)
    rounded = EncodedPairs(
        pairs.image_embeds, pairs.text_embeds, pairs.image_of_text, pairs.image_tokens.bfloat16(),
        pairs.text_tokens.bfloat16(),
    )  # fmt: skip
    exact = EncodedPairs(
        pairs.image_embeds, pairs.text_embeds, pairs.image_of_text, rounded.image_tokens.float(),
        rounded.text_tokens.float(),
    )  # fmt: skip
    for ranks, expected in zip(retrieval_ranks(rounded, [0.0]), retrieval_ranks(exact, [0.0]), strict=True):
        assert torch.equal(ranks, expected)


@pytest.mark.parametrize("captions", [1, 3])
def test_recall_is_that_of_the_models_own_similarities(model, tokenizer, captions) -> None:
    data = Noise(12, captions)
    result = evaluate_retrieval(model, data, tokenizer, image_processor, fusion_sweep=True, batch_size=5)
    texts = [text for index in range(12) for text in data.captions(index)]
    input_ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    pixel_values = image_processor([data.image(index) for index in range(12)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = model(input_ids, pixel_values)
    own = torch.arange(12).repeat_interleave(captions) == torch.arange(12)[:, None]
    similarities = {"global": out.global_similarity, "fine": out.fine_similarity, "fused": out.similarity}
    for name, similarity in similarities.items():
        for k in (1, 5, 10):
            top = similarity.topk(k, dim=1).indices
            assert result.recall[name].image_to_text[k] == pytest.approx(own.gather(1, top).any(1).double().mean())
            top = similarity.topk(min(k, 12), dim=0).indices
            assert result.recall[name].text_to_image[k] == pytest.approx(own.gather(0, top).any(0).double().mean())
    assert list(result.fusion_sweep) == [step / 10 for step in range(11)]
    for weight, name in {0.0: "fine", 0.8: "fused", 1.0: "global"}.items():
        assert result.fusion_sweep[weight] == result.recall[name]
    assert (result.images, result.texts) == (12, 12 * captions)


def test_the_batch_size_changes_nothing(model, tokenizer) -> None:
    results = [
        evaluate_retrieval(model, Noise(9, 2), tokenizer, image_processor, batch_size=size) for size in (1, 4, 64)
    ]
    assert results[0] == results[1] == results[2]


def test_without_token_refinement_there_is_global_only(tokenizer) -> None:
    result = evaluate_retrieval(make_model(tokenizer), Noise(6), tokenizer, image_processor, fusion_sweep=True)
    assert list(result.recall) == ["global"]
    assert result.fusion_sweep == {}


def test_an_unreadable_image_is_left_out_with_its_captions_and_named(model, tokenizer) -> None:
    data = Noise(6, captions=2, broken=(1, 5))
    encoded = encode_pairs(model, data, tokenizer, image_processor, batch_size=2)
    assert encoded.unreadable == ("image 1 is broken", "image 5 is broken")
    assert encoded.image_of_text.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    whole = encode_pairs(model, Noise(6, captions=2), tokenizer, image_processor)
    torch.testing.assert_close(encoded.image_embeds, whole.image_embeds[[0, 2, 3, 4]])
    torch.testing.assert_close(encoded.text_tokens, whole.text_tokens[[0, 1, 4, 5, 6, 7, 8, 9]])
    result = evaluate_retrieval(model, data, tokenizer, image_processor)
    assert (result.images, result.texts, len(result.unreadable)) == (4, 8, 2)


def test_texts_are_cut_with_their_end_token_kept(model, tokenizer) -> None:
    def encode(words: int, max_tokens: int | None = None) -> EncodedPairs:
        return encode_pairs(model, Noise(3, words=words), tokenizer, image_processor, max_tokens=max_tokens)

    assert encode(40).text_embeds.isfinite().all(), "cut at the 60 positions of the model"
    cut = encode(40, max_tokens=9)
    ids = tokenizer([Noise(3, words=40).captions(index)[0] for index in range(3)])["input_ids"]
    with torch.no_grad():
        expected = model.encode_text(torch.tensor([[*row[:8], tokenizer.eos_token_id] for row in ids]))
    torch.testing.assert_close(cut.text_embeds, F.normalize(expected.embeds, dim=-1))
    torch.testing.assert_close(cut.text_tokens, F.normalize(expected.refined_tokens, dim=-1))


@pytest.mark.parametrize("max_tokens", [2, 61])
def test_max_tokens_must_fit_the_model(model, tokenizer, max_tokens) -> None:
    with pytest.raises(ValueError, match=f"max_tokens is {max_tokens}; expected from 3 to 60"):
        evaluate_retrieval(model, Noise(3), tokenizer, image_processor, max_tokens=max_tokens)


def test_a_tokenizer_of_another_model_is_refused(model) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=f"has {len(tokenizer)} tokens, but this model knows {len(tokenizer) - 1}"):
        evaluate_retrieval(model, Noise(3), tokenizer, image_processor)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Noise(2, broken=(0, 1)), "None of 2 images can be read.*the first: image 0 is broken"),
        (Noise(0), "None of 0 images"),
        (Noise(2, captions=0), "no captions"),
    ],
)
def test_nothing_to_evaluate_is_an_error(model, tokenizer, data, message) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_retrieval(model, data, tokenizer, image_processor)


def test_each_module_is_left_in_its_mode_also_after_an_error(model, tokenizer) -> None:
    model.train()
    model.vision_model.eval()
    evaluate_retrieval(model, Noise(3), tokenizer, image_processor)
    with pytest.raises(ValueError, match="None of"):
        evaluate_retrieval(model, Noise(0), tokenizer, image_processor)
    assert model.training
    assert model.text_model.training
    assert not model.vision_model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_agrees_roughly(model, tokenizer, autocast) -> None:
    exact = encode_pairs(model, Noise(6), tokenizer, image_processor)
    if autocast:
        half = encode_pairs(model, Noise(6), tokenizer, image_processor, autocast=torch.bfloat16)
    else:
        half = encode_pairs(model.bfloat16(), Noise(6), tokenizer, image_processor)
    assert half.text_embeds.dtype == torch.float32
    assert half.text_tokens.dtype == torch.bfloat16, "half the memory of full precision"
    for name in ("image_embeds", "text_embeds", "image_tokens", "text_tokens"):
        assert F.cosine_similarity(getattr(half, name), getattr(exact, name), dim=-1).min() > 0.98


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(model, tokenizer) -> None:
    data = Noise(20, captions=2)
    expected = evaluate_retrieval(model, data, tokenizer, image_processor, fusion_sweep=True)
    assert evaluate_retrieval(model.cuda(), data, tokenizer, image_processor, fusion_sweep=True) == expected


def test_the_result_prints_a_table_in_percent_and_goes_into_json(model, tokenizer) -> None:
    result = evaluate_retrieval(model, Noise(8, broken=(3,)), tokenizer, image_processor, fusion_sweep=True)
    lines = str(result).splitlines()
    assert lines[0].split() == ["image", "to", "text", "text", "to", "image"]
    assert lines[1].split() == ["R@1", "R@5", "R@10"] * 2
    assert [line.split()[0] for line in lines[2:5]] == ["global", "fine", "fused"]
    fused = result.recall["fused"]
    shares = [recall[k] for recall in (fused.image_to_text, fused.text_to_image) for k in (1, 5, 10)]
    assert lines[4].split()[1:] == [f"{100 * share:.1f}" for share in shares]
    assert lines[5] == "weight of global:"
    assert [line.split()[0] for line in lines[6:]] == [f"{step / 10}" for step in range(11)]

    found = json.loads(json.dumps(result.to_dict()))
    assert found["recall"]["fused"]["text_to_image"]["R@5"] == fused.text_to_image[5]
    assert found["fusion_sweep"]["0.8"] == found["recall"]["fused"]
    assert (found["images"], found["texts"], found["unreadable"]) == (7, 7, ["image 3 is broken"])


class LargestTensor(TorchDispatchMode):
    """The largest tensor that any operation gives, in MiB."""

    mib = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() * leaf.element_size() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.mib = max([self.mib, *(size / 2**20 for size in sizes)])
        return out


def test_memory_does_not_grow_with_images_times_texts() -> None:
    pairs = random_pairs(1000, 5, tokens=2, dim=4)
    with LargestTensor() as largest:
        retrieval_ranks(pairs, [0.0, 0.8, 1.0], block_size=128)
    assert largest.mib < 1, "all similarities of embeddings alone would be 20 MiB, of tokens 80 MiB"
