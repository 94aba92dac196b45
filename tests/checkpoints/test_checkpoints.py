"""Loading a FineLIP: every layout gives the same model, and everything else is refused in one sentence."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import huggingface_hub.errors
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finelip_sdxl import (
    FineLIPConfig,
    FineLIPModel,
    FineLIPSDXLPipeline,
    load_finelip,
    miniature_clip,
    miniature_finelip,
    save_openai_layout,
    stretch_positions,
)
from finelip_sdxl.checkpoints.load import convert_weights
from finelip_sdxl.text_encoders import POSITION_TABLE, num_positions, stretch_text_encoder, text_encoder_tensors
from tests.helpers.reference import REFERENCE, reference_tensors
from tests.helpers.tiny_sdxl import make_tokenizer

PUBLISHED = REFERENCE / "finelip_checkpoint.safetensors"
TEXT_IDS = torch.tensor([[97, 5, 6, 7, 98]])
PIXELS = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def published() -> FineLIPModel:
    return load_finelip(PUBLISHED)


def refinement_tensors() -> dict[str, Tensor]:
    weights = reference_tensors("late_interaction")
    return {key.replace("weight.", "cross_net.", 1): w for key, w in weights.items() if key.startswith("weight.")}


def tiny_clip(text_width: int = 128, activation: str = "quick_gelu", positions: int = 77, **vision) -> CLIPModel:
    text = {"hidden_size": text_width, "intermediate_size": 2 * text_width, "num_attention_heads": text_width // 64}
    text |= {"vocab_size": 99, "bos_token_id": 97, "eos_token_id": 98, "max_position_embeddings": positions}
    vision = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 80, **vision}
    shared = {"hidden_act": activation, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**text, **shared},
        vision_config={**vision, **shared, "image_size": 16, "patch_size": 8},
        projection_dim=48,
    )
    return CLIPModel(config).eval()


def to_openai_layout(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a transformers CLIP under the keys of OpenAI's and open_clip's code."""
    names = {
        "text_model.embeddings.token_embedding.": "token_embedding.",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.encoder.layers.": "transformer.resblocks.",
        "text_model.final_layer_norm.": "ln_final.",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.": "visual.conv1.",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.encoder.layers.": "visual.transformer.resblocks.",
        "vision_model.pre_layrnorm.": "visual.ln_pre.",
        "vision_model.post_layernorm.": "visual.ln_post.",
        "text_projection.weight": "text_projection",
        "visual_projection.weight": "visual.proj",
        ".self_attn.": ".attn.",
        ".layer_norm": ".ln_",
        ".mlp.fc1.": ".mlp.c_fc.",
        ".mlp.fc2.": ".mlp.c_proj.",
    }
    renamed = {}
    for key, tensor in tensors.items():
        for old, new in names.items():
            key = key.replace(old, new)
        if "k_proj" in key or "v_proj" in key:
            continue
        if "q_proj" in key:
            renamed[key.replace("q_proj.", "in_proj_")] = None
        else:
            renamed[key] = tensor.T.contiguous() if key in ("text_projection", "visual.proj") else tensor
    for key in [key for key, tensor in renamed.items() if tensor is None]:
        original = key.replace("visual.transformer.resblocks.", "vision_model.encoder.layers.")
        original = original.replace("transformer.resblocks.", "text_model.encoder.layers.").replace(
            ".attn.", ".self_attn."
        )
        renamed[key] = torch.cat([tensors[original.replace("in_proj_", f"{part}_proj.")] for part in "qkv"])
    return renamed


def same_weights(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    weights, others = model.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights)


# Published checkpoints.


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_file_of_a_published_checkpoint_gives_the_same_model(published, suffix, prefix, tmp_path) -> None:
    tensors = {prefix + key: tensor for key, tensor in load_file(PUBLISHED).items()}
    path = tmp_path / f"finelip{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    assert same_weights(load_finelip(path), published)
    assert same_weights(load_finelip(str(path)), published)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_reads_what_training_scripts_nest(published, key, tmp_path) -> None:
    torch.save({"epoch": 3, key: load_file(PUBLISHED), "optimizer": {"state": {}}}, tmp_path / "last.pt")
    assert same_weights(load_finelip(tmp_path / "last.pt"), published)


def test_merges_the_two_positional_tables(published) -> None:
    tensors = load_file(PUBLISHED)
    table = published.text_model.embeddings.position_embedding.weight
    assert torch.equal(table[:20], tensors["positional_embedding"][:20])
    assert torch.equal(table[20:], tensors["positional_embedding_res"][20:])
    assert not torch.equal(table, tensors["positional_embedding"])
    assert not hasattr(published.config.text_config, "stretched_from")


def test_derives_the_config_of_a_published_checkpoint(published) -> None:
    text, vision = published.config.text_config, published.config.vision_config
    assert (text.hidden_size, text.num_attention_heads, text.num_hidden_layers, text.hidden_act) == (
        128,
        2,
        3,
        "quick_gelu",
    )
    assert (text.vocab_size, text.bos_token_id, text.eos_token_id) == (600, 598, 599)
    assert text.max_position_embeddings == 248
    assert (vision.hidden_size, vision.num_attention_heads, vision.num_hidden_layers) == (64, 1, 2)
    assert (vision.patch_size, vision.image_size, vision.hidden_act) == (8, 32, "quick_gelu")
    assert published.config.projection_dim == 64


def test_keeps_the_weights_of_the_token_refinement(published, tmp_path) -> None:
    refinement = refinement_tensors()
    model = load_finelip({**load_file(PUBLISHED), **refinement})
    model.save_pretrained(tmp_path)
    reloaded = load_finelip(tmp_path)
    assert (reloaded.config.refined_image_tokens, reloaded.config.refined_text_tokens) == (3, 3)
    names = {"cross_net.aggr_net.": "image_refinement.", "cross_net.cap_aggr_net.": "text_refinement."}
    for key, tensor in refinement.items():
        for old, new in names.items():
            key = key.replace(old, new)
        assert torch.equal(reloaded.state_dict()[key], tensor), key
    assert published.image_refinement is None


def test_half_precision_stays_half_and_mixed_precision_widens() -> None:
    half = {key: tensor.half() for key, tensor in load_file(PUBLISHED).items()}
    assert load_finelip(half).dtype == torch.float16
    assert load_finelip({**half, "ln_final.bias": half["ln_final.bias"].float()}).dtype == torch.float32
    assert load_finelip(half, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_half_precision_checkpoint_still_matches_the_reference() -> None:
    half = {key: tensor.half() for key, tensor in load_file(PUBLISHED).items()}
    case = reference_tensors("encoders")
    with torch.no_grad():
        embeds = load_finelip(half, dtype=torch.float32).encode_text(case["input_ids"]).embeds
    assert torch.cosine_similarity(embeds, case["text_embeds"]).min() > 0.9999


def test_leaves_a_state_dict_in_memory_alone() -> None:
    tensors = load_file(PUBLISHED)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    load_finelip(tensors)
    assert tensors.keys() == before.keys()
    assert all(torch.equal(tensors[key], before[key]) for key in before)


# Writing published checkpoints.


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_published_checkpoint_read_and_written_is_the_same_file(suffix, tmp_path) -> None:
    original = load_file(PUBLISHED) | refinement_tensors()
    path = tmp_path / "folder" / f"finelip{suffix}"
    save_openai_layout(load_finelip(original), path)
    written = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert written.keys() == original.keys()
    # Training leaves rows in either table that nobody reads.
    used = {"positional_embedding": slice(20), "positional_embedding_res": slice(20, 248)}
    for key, tensor in original.items():
        assert written[key].shape == tensor.shape
        rows = used.get(key, ...)
        assert torch.equal(written[key][rows], tensor[rows]), key
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_written_and_read_is_the_same_model(dtype, tmp_path) -> None:
    model = load_finelip(tiny_clip(), dtype=dtype)
    model.add_token_refinement()
    save_openai_layout(model, str(tmp_path / "finelip.safetensors"))
    reloaded = load_finelip(tmp_path / "finelip.safetensors")
    assert same_weights(reloaded, model)
    assert reloaded.dtype == dtype
    assert torch.equal(reloaded.encode_text(TEXT_IDS).refined_tokens, model.encode_text(TEXT_IDS).refined_tokens)
    assert torch.equal(reloaded.encode_image(PIXELS.to(dtype)).tokens, model.encode_image(PIXELS.to(dtype)).tokens)


@pytest.mark.parametrize("encoder_class", [CLIPTextModel, CLIPTextModelWithProjection])
def test_a_text_tower_alone_has_less_to_write(encoder_class, tmp_path) -> None:
    model = load_finelip(encoder_class(tiny_clip().config.text_config))
    save_openai_layout(model, tmp_path / "text.pt")
    assert not any(key.startswith(("visual.", "cross_net.")) for key in torch.load(tmp_path / "text.pt"))
    assert same_weights(load_finelip(tmp_path / "text.pt"), model)


def test_an_old_config_s_end_token_is_no_hindrance(published, tmp_path) -> None:
    text = tiny_clip().config.text_config
    text.eos_token_id = 2
    save_openai_layout(load_finelip(CLIPTextModel(text)), tmp_path / "text.pt")
    assert load_finelip(tmp_path / "text.pt").config.text_config.eos_token_id == 98


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"activation": "gelu"}, r"text_config has hidden_act 'gelu', and x\.pt would be loaded with 'quick_gelu'"),
        ({"num_attention_heads": 4}, "vision_config has num_attention_heads 4.*loaded with 1"),
        ({"hidden_size": 80}, "vision_model 80 wide, which does not split into heads of 64"),
        ("miniature-clip-1", "use save_pretrained"),
    ],
)
def test_refuses_to_write_what_would_be_read_as_another_model(source, message, tmp_path) -> None:
    model = load_finelip(source if isinstance(source, str) else tiny_clip(**source))
    with pytest.raises(ValueError, match=message):
        save_openai_layout(model, tmp_path / "x.pt")
    assert not any(tmp_path.iterdir())


def test_refuses_to_write_positions_that_would_be_stretched_again(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"max_position_embeddings 77, and x\.pt would be loaded with 248"):
        save_openai_layout(FineLIPModel(FineLIPConfig(text_config=tiny_clip().config.text_config)), tmp_path / "x.pt")


def test_refuses_to_write_adapters_and_other_suffixes(published, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"x\.ckpt has another suffix than \.safetensors or \.pt"):
        save_openai_layout(published, tmp_path / "x.ckpt")
    adapted = load_finelip(published)
    adapted.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge or unload the LoRA first"):
        save_openai_layout(adapted, tmp_path / "x.pt")


def test_a_failed_write_leaves_the_old_file(published, monkeypatch, tmp_path) -> None:
    path = tmp_path / "finelip.safetensors"
    path.write_bytes(b"old")

    def fail(tensors: dict[str, Tensor], file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("finelip_sdxl.checkpoints.load.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_openai_layout(published, path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


# The miniature's encoders by name.


@pytest.mark.parametrize("pair", [1, 2])
def test_the_miniature_s_clips_have_names(pair) -> None:
    model = load_finelip(f"miniature-clip-{pair}")
    assert model.config.text_config.max_position_embeddings == 248
    assert model.config.text_config.stretched_from == 77
    assert same_weights(model, load_finelip(miniature_clip(pair)))


@pytest.mark.parametrize("pair", [1, 2])
def test_the_miniature_s_finelips_have_names(pair) -> None:
    model = load_finelip(f"miniature-finelip-{pair}")
    assert model.dtype == torch.float32
    assert same_weights(model, miniature_finelip(pair))
    assert model.text_refinement is not None
    assert not hasattr(model.config.text_config, "stretched_from")  # what is trained is no stock


# OpenAI's and open_clip's weights.


@pytest.mark.parametrize("prefix", ["", "text."])
def test_an_openai_layout_gives_the_outputs_of_its_clip(prefix) -> None:
    clip = tiny_clip()
    tensors = to_openai_layout(clip.state_dict()) | {
        "context_length": torch.tensor(77),
        "attn_mask": torch.ones(77, 77),
    }
    text_keys = ("token_embedding", "positional", "transformer", "ln_final", "text_projection", "attn_mask")
    model = load_finelip({(prefix if key.startswith(text_keys) else "") + key: t for key, t in tensors.items()})
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(PIXELS).embeds, clip.get_image_features(PIXELS).pooler_output)
        # Up to position 19 the stretched table is the original one.
        expected = clip.get_text_features(TEXT_IDS)
        text = model.encode_text(TEXT_IDS)
        torch.testing.assert_close(text.embeds, expected.pooler_output)
        torch.testing.assert_close(text.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(model.logit_scale, clip.logit_scale)


def test_open_clips_large_towers_give_the_outputs_of_their_clip() -> None:
    clip = tiny_clip(text_width=1024, activation="gelu")
    model = load_finelip(to_openai_layout(clip.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(TEXT_IDS).embeds, clip.get_text_features(TEXT_IDS).pooler_output)


@pytest.mark.parametrize(("width", "heads"), [(1280, 16), (1408, 16), (1664, 16), (1024, 16), (768, 12)])
def test_heads_of_image_towers(width, heads) -> None:
    with torch.device("meta"):
        clip = tiny_clip(hidden_size=width, num_attention_heads=heads)
    config, _ = convert_weights(to_openai_layout(clip.state_dict()))
    assert config.vision_config.num_attention_heads == heads


def test_the_activation_is_as_the_evidence_says_and_can_be_given() -> None:
    def activation(text_width: int, *more_keys: str, **options) -> str:
        with torch.device("meta"):
            tensors = to_openai_layout(tiny_clip(text_width).state_dict())
            tensors |= dict.fromkeys(more_keys, tensors["positional_embedding"])
        config, _ = convert_weights(tensors, **options)
        assert config.text_config.hidden_act == config.vision_config.hidden_act
        return config.text_config.hidden_act

    assert activation(768) == "quick_gelu"
    assert activation(768, activation="gelu") == "gelu"
    assert activation(1024) == activation(1280) == "gelu"
    assert activation(1280, activation="quick_gelu") == "quick_gelu"
    assert activation(1280, "positional_embedding_res") == "quick_gelu"
    assert activation(1280, "input_resolution") == "quick_gelu"
    assert load_finelip(tiny_clip(), activation="gelu").config.text_config.hidden_act == "gelu"


def test_a_text_tower_alone_gives_a_model_of_texts() -> None:
    tensors = to_openai_layout(tiny_clip().state_dict())
    model = load_finelip({key: tensor for key, tensor in tensors.items() if not key.startswith("visual.")})
    assert model.vision_model is None
    assert model.encode_text(TEXT_IDS).embeds.shape == (1, 48)


def test_a_transformers_file_without_config_is_read_too(tmp_path) -> None:
    encoder = stretch_text_encoder(CLIPTextModelWithProjection(tiny_clip().config.text_config))
    encoder.save_pretrained(tmp_path)
    model = load_finelip(tmp_path / "model.safetensors")
    assert same_weights(model.to_text_encoder(projection=True), encoder)


# Directories and loaded models of transformers.


def test_a_clip_directory_is_stretched_and_says_so(tmp_path) -> None:
    clip = tiny_clip()
    clip.save_pretrained(tmp_path)
    model = load_finelip(tmp_path)
    text = model.config.text_config
    assert (text.stretched_from, text.stretch_keep, text.stretch_factor) == (77, 20, 4)
    original = clip.text_model.embeddings.position_embedding.weight
    assert torch.equal(model.text_model.embeddings.position_embedding.weight, stretch_positions(original))
    assert model.to_text_encoder(projection=True).config.stretched_from == 77
    assert same_weights(load_finelip(clip), model)


@pytest.mark.parametrize("encoder_class", [CLIPTextModel, CLIPTextModelWithProjection])
@pytest.mark.parametrize("is_flat", [True, False])
def test_a_text_encoder_directory_with_old_and_new_keys(encoder_class, is_flat, tmp_path) -> None:
    encoder = encoder_class(tiny_clip().config.text_config).eval()
    encoder.save_pretrained(tmp_path)
    if not is_flat:
        save_file(text_encoder_tensors(encoder), tmp_path / "model.safetensors")
    for source in (tmp_path, encoder):
        model = load_finelip(source)
        assert model.vision_model is None
        has_projection = encoder_class is CLIPTextModelWithProjection
        assert (model.text_projection is not None) == has_projection
        assert same_weights(model.to_text_encoder(has_projection), stretch_text_encoder(encoder))


def test_stretches_as_asked() -> None:
    model = load_finelip(tiny_clip(), keep=10, factor=2)
    assert model.text_model.embeddings.position_embedding.weight.shape[0] == 10 + 2 * 67
    assert model.config.text_config.stretch_factor == 2


def test_the_positions_are_the_tensors_whatever_the_config_says(tmp_path) -> None:
    encoder = CLIPTextModel(tiny_clip(positions=248).config.text_config)
    encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 77}))
    model = load_finelip(tmp_path)
    assert not hasattr(model.config.text_config, "stretched_from")
    assert same_weights(model.text_model, encoder)
    assert (
        num_positions(model.to_text_encoder(projection=False))
        == model.config.text_config.max_position_embeddings
        == 248
    )


@pytest.mark.parametrize("tower", ["text_model.", "text_model.text_model."])
@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_a_second_table_of_a_hub_conversion_is_merged(tower, suffix, tmp_path) -> None:
    encoder = CLIPTextModel(tiny_clip(positions=248).config.text_config)
    encoder.save_pretrained(tmp_path)
    tensors = {key.replace("text_model.", tower, 1): t for key, t in text_encoder_tensors(encoder).items()}
    second = torch.randn(248, 128, generator=torch.Generator().manual_seed(2))
    tensors |= {
        f"{tower}embeddings.position_embedding_res{suffix}": second,
        f"{tower}embeddings.position_ids": torch.arange(248),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    table = load_finelip(tmp_path).text_model.embeddings.position_embedding.weight
    assert torch.equal(table[:20], encoder.embeddings.position_embedding.weight[:20])
    assert torch.equal(table[20:], second[20:])


def test_a_saved_finelip_loads_again_and_keeps_its_record(tmp_path) -> None:
    model = load_finelip(tiny_clip())
    model.save_pretrained(tmp_path)
    for source in (tmp_path, model):
        reloaded = load_finelip(source)
        assert same_weights(reloaded, model)
        assert reloaded.config.text_config.stretched_from == 77


def test_does_not_modify_the_model_it_is_given() -> None:
    clip = tiny_clip()
    load_finelip(clip, activation="gelu", dtype=torch.float16)
    assert clip.config.text_config.hidden_act == "quick_gelu"
    assert clip.text_model.embeddings.position_embedding.weight.shape[0] == 77
    assert clip.dtype == torch.float32


def test_subfolder_variant_and_shards(tmp_path) -> None:
    clip = tiny_clip()
    clip.save_pretrained(tmp_path / "text_encoder", variant="fp16", max_shard_size="400KB")
    assert not (tmp_path / "text_encoder" / "model.fp16.safetensors").exists()
    assert same_weights(load_finelip(tmp_path, subfolder="text_encoder", variant="fp16"), load_finelip(clip))


def test_the_only_variant_is_taken_and_said(tmp_path, caplog) -> None:
    clip = tiny_clip()
    for folder, size in (("whole", "5GB"), ("shards", "400KB")):
        clip.save_pretrained(tmp_path / folder, variant="bf16", max_shard_size=size)
        caplog.clear()
        assert same_weights(load_finelip(tmp_path / folder), load_finelip(clip))
        assert [record.getMessage() for record in caplog.records if "variant" in record.getMessage()] == [
            f"{tmp_path / folder} holds only weights of variant bf16, so these are loaded."
        ]
    clip.save_pretrained(tmp_path / "whole", variant="fp16")
    with pytest.raises(ValueError, match="weights of variants bf16, fp16: pass one of these as variant="):
        load_finelip(tmp_path / "whole")
    clip.save_pretrained(tmp_path / "whole")
    caplog.clear()
    load_finelip(tmp_path / "whole")
    assert "variant" not in caplog.text, "the plain ones are there"
    with pytest.raises(FileNotFoundError, match=r"holds no model\.ema\.safetensors"):
        load_finelip(tmp_path / "whole", variant="ema")


def test_the_only_variant_of_a_hub_repository_is_taken(monkeypatch, tmp_path) -> None:
    clip = tiny_clip()
    clip.save_pretrained(tmp_path / "text", variant="fp16")

    def download(repo: str, filename: str, subfolder: str | None) -> str:
        if not (path := tmp_path / subfolder / filename).exists():
            raise hub_error("EntryNotFoundError")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    names = ["model.bf16.safetensors", *(f"text/{path.name}" for path in (tmp_path / "text").iterdir())]
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repo: names)
    assert same_weights(load_finelip("somebody/something", subfolder="text"), load_finelip(clip))


def test_a_bin_directory(tmp_path) -> None:
    clip = tiny_clip()
    clip.config.save_pretrained(tmp_path)
    torch.save(clip.state_dict(), tmp_path / "pytorch_model.bin")
    assert same_weights(load_finelip(tmp_path), load_finelip(clip))


# Other CLIPs of 248 positions, each in the layout that it is published in.


def published_tables() -> tuple[CLIPModel, Tensor, Tensor]:
    """A CLIP of 64 wide heads that knows the tokenizer's words, and two tables of 248 rows as Long-CLIP trains them."""
    clip = tiny_clip(text_width=64)
    tokenizer = make_tokenizer()
    clip.config.text_config.update(
        {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
    )
    clip = CLIPModel(clip.config).eval()
    generator = torch.Generator().manual_seed(5)
    first, second = (torch.randn(248, 64, generator=generator) for _ in range(2))
    return clip, first, second


def reference_encoder(
    clip: CLIPModel, first: Tensor, second: Tensor, projection: Tensor
) -> CLIPTextModelWithProjection:
    """What the published code of all of them computes: rows up to 20 from one table, the others from the second."""
    config = CLIPTextConfig(**{**clip.config.text_config.to_dict(), "max_position_embeddings": 248})
    config.projection_dim = projection.shape[0]
    encoder = CLIPTextModelWithProjection(config).eval()
    weights = {key: tensor for key, tensor in clip.state_dict().items() if key.startswith("text_model.")}
    weights[POSITION_TABLE] = torch.cat([first[:20], second[20:]])
    encoder.load_state_dict({**weights, "text_projection.weight": projection})
    return encoder


def long_clip(folder: Path) -> tuple[Path, CLIPTextModelWithProjection]:
    """As its authors publish it."""
    clip, first, second = published_tables()
    tensors = to_openai_layout(clip.state_dict())
    tensors |= {"positional_embedding": first, "positional_embedding_res": second}
    torch.save(tensors, folder / "longclip.pt")
    return folder / "longclip.pt", reference_encoder(clip, first, second, clip.text_projection.weight)


def smart_clip(folder: Path) -> tuple[Path, CLIPTextModelWithProjection]:
    """A Long-CLIP, and the network that masks images by what a text says, which training alone needs."""
    path, encoder = long_clip(folder)
    mask_network = {
        "mask_transformer.resblocks.0.ln_1.weight": torch.ones(64),
        "mask_transformer.resblocks.0.attn.in_proj_weight": torch.zeros(192, 64),
        "text_mask_net.proj.weight": torch.zeros(48, 64),
        "mask1": torch.ones(248, 1),
        "mask2": torch.zeros(248, 1),
    }
    torch.save({**torch.load(path), **mask_network}, folder / "smartclip.pt")
    return folder / "smartclip.pt", encoder


def long_clip_port(folder: Path) -> tuple[Path, CLIPTextModelWithProjection]:
    """A Long-CLIP for transformers: both tables in the embeddings, and each tower within a model of its own."""
    clip, first, second = published_tables()
    nested = {"text_model.": "text_model.text_model.", "vision_model.": "vision_model.vision_model."}
    tensors = {}
    for key, tensor in clip.state_dict().items():
        for tower, inner in nested.items():
            key = inner + key.removeprefix(tower) if key.startswith(tower) else key
        tensors[key] = tensor
    embeddings = "text_model.text_model.embeddings.position_embedding"
    tensors |= {f"{embeddings}.weight": first, f"{embeddings}_res": second}
    config = clip.config.to_dict() | {"model_type": "longclip"}
    config["text_config"] |= {"max_position_embeddings": 248, "interpolation_keep_length": 20}
    config["text_config"]["model_type"] = "longclip_text_model"
    config["vision_config"]["model_type"] = "longclip_vision_model"
    return save_folder(folder, tensors, config), reference_encoder(clip, first, second, clip.text_projection.weight)


def long_clip_text_port(folder: Path) -> tuple[Path, CLIPTextModelWithProjection]:
    """The same, its text tower alone."""
    clip, first, second = published_tables()
    tensors = {key: tensor for key, tensor in clip.state_dict().items() if key.startswith(("text_model.", "text_proj"))}
    tensors |= {POSITION_TABLE: first, POSITION_TABLE.replace("embedding.weight", "embedding_res.weight"): second}
    config = clip.config.text_config.to_dict() | {"model_type": "longclip_text_model", "max_position_embeddings": 248}
    return save_folder(folder, tensors, config), reference_encoder(clip, first, second, clip.text_projection.weight)


def fg_clip(folder: Path) -> tuple[Path, CLIPTextModelWithProjection]:
    """FG-CLIP v1: beside what reads short texts (77 rows, `text_projection`), its own for long ones."""
    clip, first, second = published_tables()
    long_projection = torch.randn(48, 64, generator=torch.Generator().manual_seed(6))
    embeddings = "text_model.embeddings.position_embedding"
    tensors = clip.state_dict() | {
        f"{embeddings}_ori.weight": first,
        f"{embeddings}_res.weight": second,
        "text_filip_projection.weight": long_projection,
        "logit_scale_finegraind": torch.tensor(2.0),
        "logit_scale_hardneg": torch.tensor(3.0),
    }
    return save_folder(folder, tensors, clip.config.to_dict()), reference_encoder(clip, first, second, long_projection)


def himo_clip(folder: Path) -> tuple[Path, CLIPTextModelWithProjection]:
    """HiMo-CLIP (`himo-clip_L.pt`): Long-CLIP's layout with both tables, as its code stores it, in two precisions."""
    clip, first, second = published_tables()
    # Its `convert_weights` halves linear and convolution layers and the projections, not tables and norms.
    halved = {key: tensor.half() if is_linear(key) else tensor for key, tensor in clip.state_dict().items()}
    tensors = to_openai_layout(halved) | {"positional_embedding": first, "positional_embedding_res": second}
    torch.save(tensors, folder / "himo-clip_L.pt")
    clip.load_state_dict(halved)
    return folder / "himo-clip_L.pt", reference_encoder(clip, first, second, clip.text_projection.weight)


def is_linear(key: str) -> bool:
    """Whether a key is one of a linear or convolution layer, by transformers' names."""
    return bool(re.search(r"self_attn\.|\.mlp\.|patch_embedding|^(text|visual)_projection", key))


def longer_clip_l(folder: Path) -> tuple[Path, CLIPTextModelWithProjection]:
    """One file of the text tower and its projection under transformers' names, with one table of 248 rows, as ComfyUI
    takes it (`Anzhc/SDXL-Text-Encoder-Longer-CLIP-L`; its 495 MB are these in float32)."""
    clip, first, _ = published_tables()
    tensors = {key: tensor for key, tensor in clip.state_dict().items() if key.startswith(("text_model.", "text_proj"))}
    tensors |= {POSITION_TABLE: first, "text_model.embeddings.position_ids": torch.arange(248)[None]}
    save_file(tensors, folder / "longer_clip_l.safetensors")
    expected = reference_encoder(clip, first, first, clip.text_projection.weight)
    return folder / "longer_clip_l.safetensors", expected


def long_clip_text_file(folder: Path) -> tuple[Path, CLIPTextModelWithProjection]:
    """The text tower without its projection in one file (`LongCLIP-L-Text-Encoder-HF-only.safetensors`)."""
    clip, first, _ = published_tables()
    tensors = {key: tensor for key, tensor in clip.state_dict().items() if key.startswith("text_model.")}
    save_file({**tensors, POSITION_TABLE: first}, folder / "HF-only.safetensors")
    return folder / "HF-only.safetensors", reference_encoder(clip, first, first, clip.text_projection.weight)


def long_clip_diffusers(folder: Path) -> tuple[Path, CLIPTextModelWithProjection]:
    """A `CLIPTextModel` whose config says 248 (`zer0int/LongCLIP-L-Diffusers`)."""
    clip, first, _ = published_tables()
    tensors = {key: tensor for key, tensor in clip.state_dict().items() if key.startswith("text_model.")}
    config = clip.config.text_config.to_dict() | {"architectures": ["CLIPTextModel"], "max_position_embeddings": 248}
    expected = reference_encoder(clip, first, first, clip.text_projection.weight)
    return save_folder(folder, {**tensors, POSITION_TABLE: first}, config), expected


def save_folder(folder: Path, tensors: dict[str, Tensor], config: dict) -> Path:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


OtherClip = Callable[[Path], tuple[Path, CLIPTextModelWithProjection]]
TEXT_ALONE = (long_clip_text_port, longer_clip_l, long_clip_text_file, long_clip_diffusers)
other_clips = pytest.mark.parametrize(
    "publish", [long_clip, smart_clip, long_clip_port, fg_clip, himo_clip, *TEXT_ALONE]
)


@other_clips
def test_other_clips_of_248_positions_give_the_outputs_of_their_published_code(publish: OtherClip, tmp_path) -> None:
    source, expected = publish(tmp_path)
    model = load_finelip(source)
    config = model.config.text_config
    assert (config.max_position_embeddings, config.num_hidden_layers) == (248, 2)
    assert not hasattr(config, "stretched_from")
    ids = torch.randint(3, 90, (1, 248), generator=torch.Generator().manual_seed(0))
    ids[0, -1] = config.eos_token_id
    with torch.no_grad():
        found, wanted = model.encode_text(ids), expected(ids)
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state)
    if publish in (long_clip_text_file, long_clip_diffusers):  # published without the projection
        assert found.embeds is None
    else:
        torch.testing.assert_close(found.embeds, wanted.text_embeds)
    assert (model.vision_model is None) == (publish in TEXT_ALONE)


@other_clips
def test_other_clips_take_the_place_of_an_encoder_of_sdxl(publish: OtherClip, components, tmp_path) -> None:
    source, expected = publish(tmp_path)
    torch.manual_seed(0)
    components["text_encoder"] = CLIPTextModel(published_tables()[0].config.text_config).eval()
    components["unet"] = UNet2DConditionModel.from_config({**components["unet"].config, "cross_attention_dim": 64 + 48})
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders(finelip=source)
    pipe.set_progress_bar_config(disable=True)
    readers = {
        "fox " * 20: (components["text_encoder"], 77),
        "fox " * 200: (expected, 248),
        "fox. " * 200: (expected, 496),
    }
    for prompt, (encoder, length) in readers.items():
        states = pipe.encode_prompt(prompt)[0]
        ids = pipe.tokenizer(prompt, truncation=True, max_length=min(length, 248), padding="max_length").input_ids
        with torch.no_grad():
            wanted = encoder(torch.tensor([ids]), output_hidden_states=True).hidden_states[-2]
        assert states.shape[1] == length
        # Of two windows, the first ends at a sentence's end and is padded from there.
        rows = min(length, 240)
        torch.testing.assert_close(states[:, :rows, :64], wanted[:, :rows], rtol=1e-4, atol=1e-4)
    image = pipe("fox " * 200, num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 16, 16, 3)
    pipe.save_pretrained(tmp_path / "saved")
    assert (
        json.loads((tmp_path / "saved" / "text_encoder" / "config.json").read_text())["model_type"] == "clip_text_model"
    )
    assert same_weights(FineLIPSDXLPipeline.from_pretrained(tmp_path / "saved").text_encoder, pipe.text_encoder)


def test_fg_clip_s_parts_for_short_texts_are_not_read(tmp_path) -> None:
    source, _ = fg_clip(tmp_path)
    tensors = load_file(source / "model.safetensors")
    expected = load_finelip(source)
    for key in ("text_model.embeddings.position_embedding.weight", "text_projection.weight"):
        tensors[key] = torch.full_like(tensors[key], torch.nan)
    assert same_weights(load_finelip(tensors, activation="quick_gelu"), expected)


def test_what_is_no_mask_network_is_not_ignored(tmp_path) -> None:
    path, _ = smart_clip(tmp_path)
    with pytest.raises(
        ValueError, match=r"no place in a FineLIPModel, among them 'text_model\.encoder\.layers\.0\.mask_me"
    ):
        load_finelip({**torch.load(path), "transformer.resblocks.0.mask_me.weight": torch.zeros(2)})


# Full size, without weights.


SDXL_TEXT_CONFIGS = {
    "clip_l": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"hidden_act": "quick_gelu", "projection_dim": 768},
    "bigg": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    | {"hidden_act": "gelu", "projection_dim": 1280},
}


@pytest.mark.parametrize(
    ("encoder", "vision", "text_parameters"),
    [
        ("clip_l", {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}, 123_060_480),
        ("bigg", {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48}, 693_021_440),
    ],
)
def test_full_size_checkpoints_are_accounted_for(encoder, vision, text_parameters) -> None:
    text = SDXL_TEXT_CONFIGS[encoder]
    patch_size = 14
    vision = {**vision, "num_attention_heads": 16, "image_size": 224, "patch_size": patch_size}
    vision["hidden_act"] = text["hidden_act"]
    with torch.device("meta"):
        stock = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=text["projection_dim"]))
        assert sum(parameter.numel() for parameter in stock.text_model.parameters()) == text_parameters
        config, tensors = convert_weights(to_openai_layout(stock.state_dict()))
        model = FineLIPModel(config)
        long_config = CLIPTextConfig(**text, max_position_embeddings=248)
        expected = CLIPTextModelWithProjection(long_config)
    # Strict: every weight of the checkpoint has its place and its shape, and no parameter is left without one.
    model.load_state_dict(tensors, strict=True, assign=True)
    assert (
        sum(p.numel() for p in model.parameters())
        == sum(p.numel() for p in stock.parameters()) + 171 * text["hidden_size"]
    )

    found = text_encoder_tensors(model.text_model) | {"text_projection.weight": model.text_projection.weight}
    assert {key: t.shape for key, t in found.items()} == {key: t.shape for key, t in expected.state_dict().items()}
    for field in ("hidden_act", "num_attention_heads", "vocab_size", "max_position_embeddings", "layer_norm_eps"):
        assert getattr(config.text_config, field) == getattr(long_config, field), field
    assert config.vision_config.num_attention_heads == 16


def test_the_parts_of_a_fused_weight_do_not_keep_it_alive() -> None:
    _, tensors = convert_weights(to_openai_layout(tiny_clip().state_dict()))
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors.values())


# Refusals.


@pytest.mark.parametrize(
    ("keys", "looks_like"),
    [
        (["down_blocks.0.resnets.0.conv1.weight", "add_embedding.linear_1.weight"], "the UNet of an SDXL"),
        (["down_blocks.0.resnets.0.conv1.weight", "mid_block.x.weight"], "a UNet"),
        (["encoder.down_blocks.0.weight", "quant_conv.weight"], "a VAE"),
        (
            ["model.diffusion_model.out.0.weight", "conditioner.embedders.0.transformer.x"],
            "a single-file Stable Diffusion",
        ),
        (["unet.down_blocks.0.attn.to_q.lora_A.weight"], "a LoRA"),
        (["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"], "a LoRA"),
        (["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"], "a T5"),
        (["text_model.embeddings.token_embedding.weight", "text_model.head.weight"], "a SigLIP"),
        (["token_embedding.weight", "transformer.resblocks.0.attn.rotary_emb.freqs"], "a CLIP with rotary positions"),
        (["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"], "a language model"),
        (["text_adapter.linear.weight", "vision_model.embeddings.class_embedding"], "an LLM2CLIP"),
        (["token_embedding.weight", "visual.layer1.0.conv1.weight"], "a CLIP with a ResNet"),
        (
            ["text.token_embedding.weight", "visual.trunk.blocks.0.weight"],
            "an open_clip with a tower of another library",
        ),
        (
            ["token_embedding.weight", "transformer.resblocks.0.mlp.c_fc.theta", "transformer.resblocks.0.mlp.c_fc.r"],
            "a CLIP in geometric parametrization .GmP.",
        ),
        (
            ["text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.mlp.fc1.theta"],
            "a CLIP in geometric parametrization .GmP., .* pass its author's file of plain weights",
        ),
        (["vision_model.embeddings.class_embedding"], "the image tower of a CLIP"),
        (["bert.embeddings.word_embeddings.weight"], "a BERT"),
        (["clip_l", "clip_g"], "a textual inversion"),
        (["a.weight", "b.weight"], "2 weights with keys such as 'a.weight', 'b.weight'"),
    ],
)
def test_says_what_other_weights_look_like(keys, looks_like, tmp_path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(2, 2) for key in keys}, path)
    with pytest.raises(ValueError, match=f"other.safetensors is no checkpoint of a CLIP.*looks like {looks_like}"):
        load_finelip(path)


def refusal(tensors: dict[str, Tensor], **options) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]*\.$") as error:
        load_finelip(tensors, **options)
    return str(error.value)


def test_refuses_tables_it_cannot_merge_or_stretch() -> None:
    tensors = load_file(PUBLISHED)
    stock = {**tensors, "positional_embedding": tensors["positional_embedding"][:77]}
    assert "two positional tables of different shapes, (77, 128) and (248, 128)" in refusal(stock)
    short = {**tensors, "positional_embedding": tensors["positional_embedding"][:64]}
    del short["positional_embedding_res"]
    assert "has 64 text positions" in refusal(short)
    del short["positional_embedding"]
    assert "lacks the positional table of its text tower: it is incomplete, or has rotary" in refusal(short)


def test_refuses_incomplete_unknown_and_unfit_weights() -> None:
    tensors = load_file(PUBLISHED)
    missing = {key: tensor for key, tensor in tensors.items() if key != "ln_final.bias"}
    assert "missing, among them 'text_model.final_layer_norm.bias'" in refusal(missing)
    assert "no place in a FineLIPModel, among them 'cross_net.other.weight'" in refusal(
        {**tensors, "cross_net.other.weight": torch.zeros(2)}
    )
    no_layers = {key: tensor for key, tensor in tensors.items() if not key.startswith("transformer.")}
    assert "lacks the first layer of its text_model" in refusal(no_layers)
    narrow = {**tensors, "token_embedding.weight": torch.zeros(600, 96)}
    assert "96 wide, which does not split into heads of 64" in refusal(narrow)
    quantised = {**tensors, "ln_final.bias": torch.zeros(128, dtype=torch.int8)}
    assert "torch.int8 weights" in refusal(quantised)


def test_refuses_bad_arguments() -> None:
    assert "activation is 'relu'; expected" in refusal(load_file(PUBLISHED), activation="relu")
    assert "keep is 77" in refusal(to_openai_layout(tiny_clip().state_dict()), keep=77)
    for arguments in (
        *({"keep": keep} for keep in (-1, 0.5, "20", True, None, [20], 248)),
        *({"factor": factor} for factor in (-1, 0, 4.0, "4", True, None, 10**9)),
    ):  # also where nothing is stretched
        for source in (load_file(PUBLISHED), to_openai_layout(tiny_clip().state_dict()), load_file(PUBLISHED).copy()):
            assert "expected a whole number from" in refusal(source, **arguments)
    with pytest.raises(ValueError, match="is of type int; expected a path"):
        load_finelip(3)


@pytest.mark.parametrize("source", ["no/such/dir/at/all", "missing.safetensors", "here/missing.pt", Path("nowhere")])
def test_a_path_that_does_not_exist(source) -> None:
    with pytest.raises(
        FileNotFoundError, match="does not exist: pass a checkpoint file, a model directory or a hub id"
    ):
        load_finelip(source)


def test_a_hub_id_that_cannot_be_reached(tmp_path) -> None:
    with pytest.raises(OSError, match=r"^nobody/nothing is no path here, and the hub cannot be reached[^\n]*\.$"):
        load_finelip("nobody/nothing", local_files_only=True, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("RepositoryNotFoundError", r"the hub refuses it \(404: no such repository\)\.$"),
        ("EntryNotFoundError", r"holds no config\.json"),
    ],
)
def test_what_the_hub_answers_becomes_one_sentence(error, message, monkeypatch) -> None:
    def answer(*args, **kwargs) -> None:
        raise hub_error(error)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", answer)
    with pytest.raises(OSError, match=message):
        load_finelip("somebody/something")


def hub_error(name: str) -> Exception:
    error_class = getattr(huggingface_hub.errors, name)
    if issubclass(error_class, huggingface_hub.errors.HfHubHTTPError):
        return error_class("404: no such repository.\nMore words.", response=MagicMock())
    return error_class("no such file")


def test_a_hub_id_is_read_like_a_directory(monkeypatch, tmp_path) -> None:
    clip = tiny_clip()
    clip.save_pretrained(tmp_path / "text")

    def download(repo: str, filename: str, subfolder: str | None, revision: str) -> str:
        assert (repo, subfolder, revision) == ("somebody/something", "text", "v2")
        path = tmp_path / subfolder / filename
        if not path.exists():
            raise hub_error("EntryNotFoundError")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = load_finelip("somebody/something", subfolder="text", revision="v2")
    assert same_weights(model, load_finelip(clip))


@pytest.mark.parametrize("inner", ["last", "last/text_encoder", "text_encoder"])
def test_the_folder_of_a_run_leads_to_the_model_in_it(inner, tmp_path) -> None:
    tiny_clip().save_pretrained(tmp_path / inner)
    (tmp_path / "checkpoints").mkdir()
    hint = rf"holds no config\.json: pass {tmp_path / inner}, which holds one\.$"
    with pytest.raises(FileNotFoundError, match=hint):
        load_finelip(tmp_path)


def test_fields_that_a_finelip_s_config_does_not_know_are_left_out_and_named(tmp_path, caplog) -> None:
    model = load_finelip(tiny_clip())
    model.save_pretrained(tmp_path)
    load_finelip(tmp_path)
    assert not caplog.records, "nothing is unknown of what we save"
    config = json.loads((tmp_path / "config.json").read_text())
    own = {
        "_name_or_path": "x",
        "transformers_version": "4.57",
        "output_hidden_states": False,
        "torch_dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps({**config, **own, "evil": [1], "refined_tokens": 3}))
    for load in (load_finelip, FineLIPModel.from_pretrained):
        caplog.clear()
        again = load(tmp_path)
        assert "has no fields evil, refined_tokens: they are left out" in caplog.text
        assert not {"evil", "refined_tokens"} & again.config.to_dict().keys()
        assert same_weights(again, model)


def test_directories_that_hold_no_clip(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_finelip(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"whole pipeline.*subfolder='text_encoder'"):
        load_finelip(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip_text_model"}')
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        load_finelip(tmp_path)
    save_file(to_openai_layout(tiny_clip().state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match="its config says model_type 't5'"):
        load_finelip(tmp_path)


@pytest.mark.parametrize("model_type", ["siglip", "t5", "qwen2", "jina_clip", "clip_vision_model", None])
def test_other_models_are_refused_by_their_configs_before_their_weights_are_fetched(model_type, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=f"config says model_type {model_type!r}, and SDXL's text encoders can be"):
        load_finelip(tmp_path)


class Opaque:
    """Something that a checkpoint should not hold."""


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_files_that_cannot_be_read_safely_or_at_all(tmp_path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    with pytest.raises(ValueError, match="TorchScript archive"):
        load_finelip(path)
    torch.save({"args": Opaque()}, path)
    with pytest.raises(ValueError, match="Python objects besides tensors"):
        load_finelip(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match="looks like a file without weights"):
        load_finelip(path)
    torch.save(load_file(PUBLISHED), path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(OSError, match="not a whole PyTorch file"):
        load_finelip(path)
    path.write_text("<html>not found</html>")
    with pytest.raises(OSError, match="neither a PyTorch file nor"):
        load_finelip(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(OSError, match="Git LFS pointer"):
        load_finelip(path)
    truncated = tmp_path / "model.safetensors"
    truncated.write_bytes(PUBLISHED.read_bytes()[:100_000])
    with pytest.raises(OSError, match="not a whole safetensors file"):
        load_finelip(truncated)


def test_never_runs_code_from_a_pickle(tmp_path) -> None:
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple:
            return (open, (str(marker), "w"))

    torch.save({"x": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="could run code"):
        load_finelip(tmp_path / "evil.pt")
    assert not marker.exists()
