"""The facts of text encoders without a model: those that a pipeline finds in its own."""

import pytest

from finelip_sdxl.pipelines import FineLIPSDXLPipeline
from finelip_sdxl.prompts.specs import read_specs, sdxl_specs


@pytest.mark.parametrize("base", ["stock", "saved", "miniature"])
def test_specs_are_those_of_the_pipeline(stock_folder, tmp_path, base) -> None:
    name = {"stock": stock_folder, "saved": str(tmp_path), "miniature": "miniature"}[base]
    if base == "saved":
        FineLIPSDXLPipeline.from_pretrained(stock_folder).save_pretrained(tmp_path)
    own = [encoder.spec for encoder in FineLIPSDXLPipeline.from_pretrained(name)._call_encoders()]
    specs, _ = read_specs(name)
    for spec, expected in zip(specs, own, strict=True):
        assert (spec.encoder, spec.positions, spec.has_stock) == (
            expected.encoder,
            expected.positions,
            expected.has_stock,
        )
        assert spec.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
        assert spec.tokenizer.pad_token_id == expected.tokenizer.pad_token_id


def test_specs_of_a_real_sdxl_have_its_tokenizers() -> None:
    first, second = sdxl_specs()
    assert (first.positions, second.positions) == (248, 248)
    assert (first.tokenizer.pad_token_id, second.tokenizer.pad_token_id) == (49407, 0)
