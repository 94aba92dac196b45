"""The record of where an encoder came from."""

import pytest
from transformers import CLIPTextConfig

from finelip_sdxl.provenance import Provenance, base_of, forget_stretch

STRETCH = {"stretched_from": 77, "stretch_keep": 20, "stretch_factor": 4}


def test_a_trained_encoder_promises_nothing_of_its_base() -> None:
    config = CLIPTextConfig(**STRETCH)
    for _ in range(2):
        forget_stretch(config)
        assert not STRETCH.keys() & config.to_dict().keys()


def test_the_record_survives_a_config_s_file(tmp_path) -> None:
    config, record = CLIPTextConfig(), Provenance(**STRETCH, made_from="me/clip", merged_with="me/finelip")
    record.write(config)
    config.save_pretrained(tmp_path)
    assert Provenance.of(CLIPTextConfig.from_pretrained(tmp_path)) == record
    Provenance(made_from="me/clip").write(config)
    assert Provenance.of(config) == Provenance(made_from="me/clip")
    assert not {*STRETCH, "merged_with"} & config.to_dict().keys()


@pytest.mark.parametrize(("record", "positions", "expected"), [({}, 77, True), ({}, 248, False), (STRETCH, 248, True)])
def test_says_whose_weights_an_encoder_has(record, positions, expected) -> None:
    assert Provenance(**record).is_stock(positions) is expected


def test_knows_the_rows_of_stock() -> None:
    assert Provenance().original_row_indices() is None
    rows = Provenance(**STRETCH).original_row_indices()
    assert rows is not None
    assert rows[[0, 19, 20, 76]].tolist() == [0, 19, 20, 244]


@pytest.mark.parametrize("change", [{}, {"stretch_keep": 19}, {"stretch_factor": "4"}, {"stretch_keep": None}])
def test_refuses_a_stretch_that_does_not_make_the_rows(change) -> None:
    record = Provenance(**{**STRETCH, **change})
    if not change:
        record.check_rows(248, "clip")
        return
    with pytest.raises(ValueError, match="which does not make its 248 positions"):
        record.check_rows(248, "clip")


def test_a_pipeline_without_a_record_has_no_base() -> None:
    assert base_of({}) is None
