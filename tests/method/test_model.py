"""FineLIPModel: parity with the published code, saving, and its plain text encoder."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.clim import refined_similarity
from benchmarks.naive_clim import refined_similarity_loop
from finelip_sdxl import FineLIPConfig, FineLIPModel, late_interaction, load_finelip, triplet_margin_loss
from finelip_sdxl.model import end_positions
from finelip_sdxl.text_encoders import num_positions
from tests.helpers.reference import REFERENCE, reference_tensors

TOLERANCE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def model() -> FineLIPModel:
    return load_finelip(REFERENCE / "finelip_checkpoint.safetensors")


@pytest.fixture(scope="module")
def whole_model() -> FineLIPModel:
    """The published checkpoint with its token refinement."""
    weights = reference_tensors("late_interaction")
    refinement = {key.replace("weight.", "cross_net.", 1): w for key, w in weights.items() if key.startswith("weight.")}
    return load_finelip(load_file(REFERENCE / "finelip_checkpoint.safetensors") | refinement)


@pytest.fixture(scope="module")
def case() -> dict[str, torch.Tensor]:
    return reference_tensors("encoders")


def tiny_config(**overrides) -> FineLIPConfig:
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49, "max_position_embeddings": 248}
    defaults = {
        "text_config": {**tower, **text},
        "vision_config": {**tower, "image_size": 16, "patch_size": 8},
        "projection_dim": 20,
        "refined_image_tokens": 3,
        "refined_text_tokens": 5,
    }
    return FineLIPConfig(**{**defaults, **overrides})


def random_model(**overrides) -> FineLIPModel:
    torch.manual_seed(0)
    return FineLIPModel(tiny_config(**overrides)).eval()


def test_texts_match_the_published_implementation(model, case) -> None:
    with torch.no_grad():
        text = model.encode_text(case["input_ids"], output_hidden_states=True)
    torch.testing.assert_close(text.last_hidden_state, case["text_last_hidden_state"], **TOLERANCE)
    torch.testing.assert_close(text.hidden_states[-2], case["text_penultimate_hidden_state"], **TOLERANCE)
    torch.testing.assert_close(text.embeds, case["text_embeds"], **TOLERANCE)
    torch.testing.assert_close(text.tokens, case["text_tokens"], **TOLERANCE)


def test_images_match_the_published_implementation(model, case) -> None:
    with torch.no_grad():
        image = model.encode_image(case["pixel_values"])
    torch.testing.assert_close(image.embeds, case["image_embeds"], **TOLERANCE)
    torch.testing.assert_close(image.tokens, case["image_tokens"], **TOLERANCE)


def test_global_similarity_matches_the_published_implementation(model, case) -> None:
    with torch.no_grad():
        out = model(input_ids=case["input_ids"], pixel_values=case["pixel_values"])
    cosine = torch.cosine_similarity(out.image.embeds[:, None], out.text.embeds[None], dim=-1)
    torch.testing.assert_close(cosine, reference_tensors("late_interaction")["global_similarity"], **TOLERANCE)


def test_all_similarities_and_the_loss_match_the_published_implementation(whole_model, case, monkeypatch) -> None:
    expected = reference_tensors("late_interaction")
    refinements = whole_model.image_refinement, whole_model.text_refinement

    def compare_the_case(images: torch.Tensor, texts: torch.Tensor, **options) -> torch.Tensor:
        """The reference has other tokens for late interaction than those of its encoders."""
        assert images.shape == texts.shape == (6, 4, 64)
        return refined_similarity(*refinements, *(expected[key] for key in ("image_tokens", "text_tokens", "lengths")))

    monkeypatch.setattr("finelip_sdxl.model.late_interaction", compare_the_case)
    with torch.no_grad():
        out = whole_model(case["input_ids"], case["pixel_values"], ids=expected["image_ids"])
    torch.testing.assert_close(out.global_similarity, expected["global_similarity"], **TOLERANCE)
    torch.testing.assert_close(out.fine_similarity, expected["fine_similarity"], **TOLERANCE)
    torch.testing.assert_close(out.similarity, expected["fused_similarity_0.8_0.2"], **TOLERANCE)
    torch.testing.assert_close(out.loss, expected["loss_sum"].squeeze(), **TOLERANCE)


def test_the_fine_similarity_equals_the_loop_over_captions(whole_model, case) -> None:
    with torch.no_grad():
        out = whole_model(case["input_ids"], case["pixel_values"])
        loop = refined_similarity_loop(
            whole_model.image_refinement,
            whole_model.text_refinement,
            case["image_tokens"],
            case["text_tokens"],
            case["lengths"],
        )
    torch.testing.assert_close(out.fine_similarity, loop, **TOLERANCE)


@pytest.mark.parametrize("projection", [False, True])
def test_its_text_encoder_is_plain_and_matches_too(model, case, projection) -> None:
    encoder = model.to_text_encoder(projection=projection)
    assert type(encoder) is (CLIPTextModelWithProjection if projection else CLIPTextModel)
    assert not encoder.training
    assert num_positions(encoder) == encoder.config.max_position_embeddings == 248
    assert encoder.config.projection_dim == 64
    with torch.no_grad():
        out = encoder(case["input_ids"], output_hidden_states=True)
    torch.testing.assert_close(out.last_hidden_state, case["text_last_hidden_state"], **TOLERANCE)
    torch.testing.assert_close(out.hidden_states[-2], case["text_penultimate_hidden_state"], **TOLERANCE)
    if projection:
        torch.testing.assert_close(out.text_embeds, case["text_embeds"], **TOLERANCE)


@pytest.mark.parametrize("projection", [False, True])
def test_its_text_encoder_saves_prefixed_keys(model, projection, tmp_path) -> None:
    model.to_text_encoder(projection=projection).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert all(key.startswith("text_model.") for key in keys - {"text_projection.weight"})


def test_what_follows_the_end_token_changes_no_embedding(model, case) -> None:
    ids, length = case["input_ids"][1:2], int(case["lengths"][1])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(ids[:, :length]).embeds, model.encode_text(ids).embeds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saving_and_loading_loses_nothing(dtype, tmp_path) -> None:
    model = random_model().to(dtype)
    model.save_pretrained(tmp_path)
    reloaded = FineLIPModel.from_pretrained(tmp_path, dtype=dtype)
    assert reloaded.config.to_diff_dict() == FineLIPModel.from_pretrained(tmp_path).config.to_diff_dict()
    before, after = model.state_dict(), reloaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and after[key].dtype == dtype for key in before)
    assert {key.split(".")[0] for key in after} >= {"image_refinement", "text_refinement", "logit_scale"}
    pixels = torch.zeros(1, 3, 16, 16, dtype=dtype)
    assert torch.equal(reloaded.encode_image(pixels).embeds, model.encode_image(pixels).embeds)


def test_a_model_of_texts_alone_survives_saving(tmp_path) -> None:
    random_model(vision_config=None, refined_image_tokens=None).save_pretrained(tmp_path)
    reloaded = FineLIPModel.from_pretrained(tmp_path)
    assert reloaded.config.vision_config is None
    assert reloaded.vision_model is None
    with pytest.raises(ValueError, match="no image tower"):
        reloaded.encode_image(torch.zeros(1, 3, 16, 16))


def test_what_a_file_lacks_is_initialized_not_garbage(tmp_path) -> None:
    random_model(refined_image_tokens=None, refined_text_tokens=None).save_pretrained(tmp_path)
    reloaded = FineLIPModel.from_pretrained(tmp_path, config=tiny_config())
    for refinement in (reloaded.image_refinement, reloaded.text_refinement):
        assert torch.equal(refinement.scale, torch.ones(1, 1, 1))
        assert 0 < refinement.weight[1].weight.std() < 0.1


def test_parameters_of_its_text_encoder_share_its_memory() -> None:
    model = random_model()
    encoder = model.to_text_encoder(projection=True)
    assert encoder.text_projection.weight.data_ptr() == model.text_projection.weight.data_ptr()


def test_learns_through_every_tower() -> None:
    model = random_model(refined_image_tokens=None, refined_text_tokens=None)
    ids = torch.tensor([[48, 1, 2, 49]])
    out = model(input_ids=ids, pixel_values=torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    (out.text.embeds.sum() + out.image.embeds.sum() + model.logit_scale).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_text_tower_without_projection_gives_states_only() -> None:
    model = random_model(projection_dim=None, vision_config=None, refined_image_tokens=None, refined_text_tokens=None)
    text = model.encode_text(torch.tensor([[48, 1, 49]]))
    assert text.last_hidden_state.shape == (1, 3, 32)
    assert text.embeds is None
    assert text.tokens is None
    assert type(model.to_text_encoder(projection=False)) is CLIPTextModel
    with pytest.raises(ValueError, match="without a projection"):
        model.to_text_encoder(projection=True)


def test_refuses_a_text_longer_than_its_positions() -> None:
    with pytest.raises(ValueError, match=r"249 tokens.*at most 248"):
        random_model().encode_text(torch.zeros(1, 249, dtype=torch.int64))


@pytest.mark.parametrize("part", ["image tower", "token refinement"])
def test_refuses_parts_that_need_a_projection(part) -> None:
    vision = {"vision_config": None} if part == "token refinement" else {}
    with pytest.raises(ValueError, match=f"projection_dim is None; expected a width, which (an )?{part} needs"):
        random_model(projection_dim=None, **vision)


# Comparing texts with images.


PIXELS = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEXTS = torch.tensor([[48, 49, 49, 49], [48, 1, 2, 49], [48, 3, 49, 49]])  # the first is a start and an end token


def test_refined_tokens_end_in_the_end_token_and_begin_with_the_class_token() -> None:
    model = random_model()
    text, image = model.encode_text(TEXTS), model.encode_image(PIXELS)
    assert text.refined_tokens.shape == (3, 5 + 1, 20)
    assert image.refined_tokens.shape == (3, 1 + 3, 20)
    torch.testing.assert_close(text.refined_tokens[:, -1], text.embeds)
    assert torch.equal(image.refined_tokens[:, 0], image.embeds)
    torch.testing.assert_close(image.refined_tokens[:, 1:], model.image_refinement(image.tokens[:, 1:]))
    for row, end in enumerate((1, 3, 2)):  # all before the end token, and nothing after it
        alone = model.text_refinement(text.tokens[row : row + 1, :end])
        torch.testing.assert_close(text.refined_tokens[row : row + 1, :-1], alone)


def test_padding_of_texts_changes_no_similarity() -> None:
    model = random_model()
    short, padded = TEXTS[2:, :3], torch.cat([TEXTS[2:], torch.full((1, 200), 7)], dim=1)
    one, other = (model(input_ids=ids, pixel_values=PIXELS).similarity for ids in (short, padded))
    torch.testing.assert_close(one, other)


def test_fuses_global_and_fine_similarity() -> None:
    out = random_model()(input_ids=TEXTS[:2], pixel_values=PIXELS)
    assert out.similarity.shape == out.global_similarity.shape == out.fine_similarity.shape == (3, 2)
    torch.testing.assert_close(out.similarity, 0.8 * out.global_similarity + 0.2 * out.fine_similarity)
    torch.testing.assert_close(out.fine_similarity, late_interaction(out.image.refined_tokens, out.text.refined_tokens))
    assert out.loss is None


def test_without_refinement_the_cosine_is_all() -> None:
    model = random_model(refined_image_tokens=None, refined_text_tokens=None)
    out = model(input_ids=TEXTS, pixel_values=PIXELS, ids=torch.arange(3))
    assert out.fine_similarity is None
    assert torch.equal(out.similarity, out.global_similarity)
    assert torch.equal(out.loss, triplet_margin_loss(out.global_similarity, torch.arange(3)))


def test_texts_or_images_alone_are_encoded_and_not_compared() -> None:
    model = random_model()
    for inputs, encoded, other in (
        ({"input_ids": TEXTS}, "text", "image"),
        ({"pixel_values": PIXELS}, "image", "text"),
    ):
        out = model(**inputs)
        assert out[encoded].embeds.shape == (3, 20)
        assert out.get(other) is out.similarity is out.loss is None
        with pytest.raises(
            ValueError, match=r"ids were passed without texts and images.*pass input_ids and pixel_values"
        ):
            model(**inputs, ids=torch.arange(3))
    assert not model().keys()


def test_the_loss_needs_a_pair_for_each_id() -> None:
    with pytest.raises(ValueError, match=r"similarity is \(3, 2\); expected \(pairs, pairs\)"):
        random_model()(input_ids=TEXTS[:2], pixel_values=PIXELS, ids=torch.arange(3))


def test_the_loss_teaches_every_tower_and_the_refinement() -> None:
    model = random_model()
    model(input_ids=TEXTS, pixel_values=PIXELS, ids=torch.arange(3)).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"logit_scale"}  # of the contrastive loss
    for name in ("image_refinement.weight.1.weight", "text_refinement.weight.3.weight", "visual_projection.weight"):
        assert model.get_parameter(name).grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near(dtype) -> None:
    inputs = {"input_ids": TEXTS, "pixel_values": PIXELS, "ids": torch.arange(3)}
    exact = random_model()(**inputs)
    half = random_model().to(dtype)(**{**inputs, "pixel_values": PIXELS.to(dtype)})
    torch.testing.assert_close(half.similarity.float(), exact.similarity, atol=3e-2, rtol=0)
    torch.testing.assert_close(half.loss, exact.loss, atol=0.2, rtol=0)


@pytest.mark.parametrize("end_token", [2, 8])
def test_the_end_of_a_text_is_where_transformers_finds_it(end_token) -> None:
    # Old configs say 2 where they mean the largest id; a token added later is larger, and is no end.
    ids = torch.tensor([[7, 3, 8, 8], [7, 3, 4, 8], [7, 8, 2, 2]])
    assert end_positions(ids, end_token).tolist() == [2, 3, 1]
    added = torch.tensor([[7, 9, 8, 8]])
    assert end_positions(added, end_token).tolist() == ([1] if end_token == 2 else [2])
    config = tiny_config().text_config
    config.eos_token_id = end_token
    model = random_model(text_config=config)
    text = model.encode_text(ids)
    torch.testing.assert_close(text.refined_tokens[:, -1], text.embeds)


# A new token refinement.


def test_a_plain_clip_gets_a_token_refinement_of_the_published_size() -> None:
    vision = {**tiny_config().vision_config.to_dict(), "image_size": 112}  # 14 × 14 patches of 8
    model = random_model(vision_config=vision, refined_image_tokens=None, refined_text_tokens=None)
    model.to(torch.float16).add_token_refinement()
    assert model.config.refined_image_tokens == model.config.refined_text_tokens == 39
    assert model.encode_text(TEXTS).refined_tokens.shape == (3, 40, 20)
    for refinement in (model.image_refinement, model.text_refinement):
        assert torch.equal(refinement.scale, torch.ones(1, 1, 1))
        assert 0.01 < refinement.weight[1].weight.float().std() < 0.03
        assert refinement.weight[1].weight.dtype == torch.float16
        assert not refinement.training


def test_a_new_token_refinement_survives_saving(tmp_path) -> None:
    model = random_model(refined_image_tokens=None, refined_text_tokens=None)
    model.add_token_refinement(num_tokens=2)
    model.save_pretrained(tmp_path)
    reloaded = FineLIPModel.from_pretrained(tmp_path)
    assert reloaded.config.refined_text_tokens == 2
    before, after = (m(input_ids=TEXTS, pixel_values=PIXELS).fine_similarity for m in (model, reloaded))
    assert torch.equal(before, after)


def test_few_patches_give_one_refined_token() -> None:
    model = random_model(refined_image_tokens=None, refined_text_tokens=None)  # 4 patches
    model.add_token_refinement()
    assert model.config.refined_image_tokens == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, "has a token refinement already: train that one"),
        ({"vision_config": None, "refined_image_tokens": None}, "has a token refinement"),
        (
            {"vision_config": None, "refined_image_tokens": None, "refined_text_tokens": None},
            "lacks an image tower or a text projection",
        ),
    ],
)
def test_refuses_a_token_refinement_that_has_no_place(overrides, message) -> None:
    with pytest.raises(ValueError, match=message):
        random_model(**overrides).add_token_refinement()


def test_a_refused_number_of_tokens_leaves_the_model_as_it_was() -> None:
    model = random_model(refined_image_tokens=None, refined_text_tokens=None)
    with pytest.raises(ValueError, match="num_tokens=0"):
        model.add_token_refinement(num_tokens=0)
    assert model.config.refined_image_tokens is model.image_refinement is None
