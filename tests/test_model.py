"""FineLIPModel: parity with the published code, saving, and its plain text encoder."""

import pytest
import torch
from reference import REFERENCE, reference_tensors
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from finelip_sdxl import FineLIPConfig, FineLIPModel, load_finelip
from finelip_sdxl.text_encoders import num_positions

TOLERANCE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def model() -> FineLIPModel:
    return load_finelip(REFERENCE / "finelip_checkpoint.safetensors")


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


def test_what_a_file_lacks_is_initialised_not_garbage(tmp_path) -> None:
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
    with pytest.raises(ValueError, match=f"{part} needs a projection_dim"):
        random_model(projection_dim=None, **vision)
