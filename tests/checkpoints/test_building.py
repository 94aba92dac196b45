"""How often a model is built of a checkpoint on its way into a pipeline."""

from collections import Counter

import pytest
import torch
from transformers.models.clip import modeling_clip

from finelip_sdxl import FineLIPSDXLPipeline, load_finelip
from tests.helpers.tiny_sdxl import make_text_encoder


@pytest.fixture
def built(monkeypatch) -> Counter:
    """Text towers that are built, by their width: transformers fills what is begun on the meta device."""
    counts: Counter = Counter()
    init = modeling_clip.CLIPTextEmbeddings.__init__

    def count(self, config) -> None:
        counts[config.hidden_size] += 1
        init(self, config)

    monkeypatch.setattr(modeling_clip.CLIPTextEmbeddings, "__init__", count)
    return counts


@pytest.mark.parametrize("source", ["folder", "model", "encoder"])
def test_a_checkpoint_becomes_a_text_encoder_at_once(components, tmp_path, source, built) -> None:
    encoder = make_text_encoder(32, positions=248, seed=7)
    model = load_finelip(encoder)
    model.save_pretrained(tmp_path)
    sources = {"folder": tmp_path, "model": model, "encoder": encoder}
    pipe = FineLIPSDXLPipeline(**components)
    built.clear()
    pipe.swap_text_encoders(sources[source])
    assert built[32] == 2, "one that is checked, without memory, and the encoder"
    ids = torch.arange(248)[None]
    assert torch.equal(pipe.text_encoder(ids)[0], encoder(ids)[0])
