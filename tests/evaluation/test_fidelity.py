"""Fidelity to long texts: whole ones by a judge of 248 positions, and sentences by one of 77."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessor, CLIPTextModel

from finelip_sdxl.data import load_tokenizer, open_dataset
from finelip_sdxl.evaluation.fidelity import (
    PARTS,
    Judge,
    Sentence,
    count_tokens,
    image_embeddings,
    open_judge,
    part_of,
    sentence_fidelity,
    sentences_of,
    text_fidelity,
)
from finelip_sdxl.miniature import miniature_clip, miniature_finelip, miniature_path
from finelip_sdxl.prompts.vocabulary import clip_tokenizer
from finelip_sdxl.text_encoders import stretch_text_encoder

SCENES = open_dataset("miniature:4")
CAPTIONS = [SCENES.captions(index)[0] for index in range(4)]
IMAGES = [SCENES.image(index) for index in range(4)]


@pytest.fixture(scope="module")
def long_judge() -> Judge:
    return open_judge("miniature-finelip-1", "judge")


@pytest.fixture(scope="module")
def sentence_judge() -> Judge:
    return open_judge("miniature-clip-1", "sentence_judge")


def test_embeddings_do_not_depend_on_the_batch(long_judge) -> None:
    whole = image_embeddings(long_judge, iter(IMAGES))
    assert whole.shape == (4, long_judge.dim)
    # Kernels of another batch size add in another order.
    torch.testing.assert_close(image_embeddings(long_judge, IMAGES, batch_size=3), whole, atol=1e-5, rtol=1e-4)


def test_fidelity_is_the_cosine_and_the_right_picture_has_the_most(long_judge) -> None:
    images = image_embeddings(long_judge, IMAGES)[:, None]
    right = text_fidelity(long_judge, CAPTIONS, images)
    wrong = text_fidelity(long_judge, CAPTIONS, images.roll(1, 0))
    assert sum(right) > sum(wrong)
    ids = long_judge.tokenizer([CAPTIONS[2]], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = F.cosine_similarity(long_judge.model.encode_text(ids).embeds, images[2])
    assert right[2] == pytest.approx(float(expected), abs=1e-5)
    both = text_fidelity(long_judge, CAPTIONS, torch.cat([images, images.roll(1, 0)], dim=1))
    assert both == pytest.approx([(one + other) / 2 for one, other in zip(right, wrong, strict=True)], abs=1e-5)


def test_a_text_that_the_judge_would_cut_has_no_fidelity(long_judge) -> None:
    images = image_embeddings(long_judge, IMAGES[:2])[:, None]
    found = text_fidelity(long_judge, [CAPTIONS[0], "a red star " * 90], images)
    assert found[0] is not None
    assert found[1] is None
    assert text_fidelity(long_judge, ["a red star " * 90] * 2, images) == [None, None]


@pytest.mark.parametrize(("count", "fits"), [(246, True), (247, False)])
def test_a_text_of_248_tokens_is_judged_and_one_of_249_is_not(long_judge, count, fits) -> None:
    text = " ".join(["red"] * count)
    assert count_tokens(long_judge.tokenizer, [text]) == [count]
    found = text_fidelity(long_judge, [text], image_embeddings(long_judge, IMAGES[:1])[:, None])
    assert (found[0] is not None) == fits


def test_sentences_are_parted_at_token_77() -> None:
    tokenizer = load_tokenizer("miniature-clip-1", 77)
    sentences, too_long = sentences_of(tokenizer, CAPTIONS[0])
    assert too_long == 0
    assert " ".join(sentence.text for sentence in sentences) == CAPTIONS[0]
    parts = [sentence.part for sentence in sentences]
    assert parts == sorted(parts, key=["before", None, "after"].index)
    read = tokenizer([CAPTIONS[0]], truncation=True, max_length=77).input_ids[0][1:-1]
    last = parts.count("before")
    counts = count_tokens(tokenizer, [sentence.text for sentence in sentences])
    assert sum(counts[:last]) <= len(read) == 75 < sum(counts[: last + 1])


@pytest.mark.parametrize(
    ("start", "end", "part"), [(0, 75, "before"), (70, 76, None), (74, 76, None), (75, 76, "after"), (0, 300, None)]
)
def test_what_lies_across_token_77_is_in_neither_part(start, end, part) -> None:
    assert part_of(start, end) == part


def test_a_sentence_that_stock_would_cut_is_left_out_and_counted() -> None:
    found, too_long = sentences_of(load_tokenizer("miniature-clip-1", 77), f"A red star. {'red ' * 80}. A blue ring.")
    assert [sentence.text for sentence in found] == ["A red star.", "A blue ring."]
    assert [sentence.part for sentence in found] == ["before", "after"]
    assert too_long == 1


def test_sentence_fidelity_averages_the_sentences_of_each_part(sentence_judge) -> None:
    images = image_embeddings(sentence_judge, IMAGES[:3])[:, None]
    texts = ["A red star is in the center.", "A blue ring is in the top left."]
    sentences = [[Sentence(texts[0], "before"), Sentence(texts[1], "after")], [Sentence(texts[1], None)], []]
    found = sentence_fidelity(sentence_judge, sentences, images)
    alone = sentence_fidelity(sentence_judge, [[Sentence(text, None)] for text in texts], images[:1].repeat(2, 1, 1))
    one, other = alone["all"]
    assert found["before"] == [pytest.approx(one, abs=1e-5), None, None]
    assert found["after"] == [pytest.approx(other, abs=1e-5), None, None]
    assert found["all"][0] == pytest.approx((one + other) / 2, abs=1e-5)
    assert found["all"][2] is None
    assert sentence_fidelity(sentence_judge, [[]], images[:1]) == {part: [None] for part in PARTS}


def test_the_sentences_of_a_right_picture_fit_better(sentence_judge) -> None:
    sentences = [sentences_of(sentence_judge.tokenizer, caption)[0] for caption in CAPTIONS]
    images = image_embeddings(sentence_judge, IMAGES)[:, None]
    blank = image_embeddings(sentence_judge, [Image.new("RGB", IMAGES[0].size, "white")] * 4)[:, None]
    right, wrong = (sentence_fidelity(sentence_judge, sentences, these) for these in (images, blank))
    for part in PARTS:
        assert sum(right[part]) > sum(wrong[part])


@pytest.mark.parametrize(
    ("name", "role", "message"),
    [
        ("miniature-clip-1", "judge", "`judge` miniature-clip-1 takes 77 tokens, and would judge a long prompt by its"),
        ("miniature-finelip-1", "sentence_judge", "takes 248 tokens; expected a stock CLIP of 77, so that the judge"),
        ("{encoder}", "features", "has no image tower: pass a whole CLIP, not a text encoder alone"),
        ("{encoder}", "judge", "has no image tower"),
    ],
)
def test_a_judge_of_the_wrong_kind_is_refused(stock_folder, name, role, message) -> None:
    with pytest.raises(ValueError, match=message):
        open_judge(name.format(encoder=f"{stock_folder}/text_encoder"), role)


def test_a_tokenizer_or_image_processor_of_another_model_is_refused_at_once(tmp_path) -> None:
    clip_tokenizer().save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match=r"of `judge` miniature-finelip-1 has 49,408 tokens, but the model knows"):
        open_judge("miniature-finelip-1", "judge", str(tmp_path / "words"))
    miniature_clip(1).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"size \(32\*32\) doesn't match model"):
        open_judge(str(tmp_path / "clip"), "features")


def test_a_judge_knows_its_own_text_encoder_in_any_precision_and_stretched(sentence_judge) -> None:
    own = miniature_clip(1).text_model
    encoder = CLIPTextModel.from_pretrained(miniature_path() / "text_encoder")
    assert sentence_judge.is_encoder(own)
    assert sentence_judge.is_encoder(own.half())
    assert sentence_judge.is_encoder(stretch_text_encoder(encoder))
    assert not sentence_judge.is_encoder(miniature_clip(2).text_model)
    assert not sentence_judge.is_encoder(miniature_finelip(1).text_model)
