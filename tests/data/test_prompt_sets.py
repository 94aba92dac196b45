"""Sets of prompts: published benchmarks, and captions read whole."""

import json

import pytest

from finelip_sdxl.data import open_dataset, open_prompts
from tests.data.test_data import urban1k, write_lines
from tests.helpers import prompt_sets
from tests.helpers.prompt_sets import PROMPTS


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (prompt_sets.dpg_bench, ["COCOval2014000000000042", "diffusiondb", "whoops12"]),
        (prompt_sets.longbench_t2i, ["00000", "00001", "00002"]),
        (prompt_sets.detailmaster, ["docci_00000.jpg", "ln_coco_00001.jpg", "ln_flickr_00002.jpg"]),
        (prompt_sets.txt, ["00000", "00001", "00002"]),
    ],
)
def test_a_benchmark_holds_its_prompts_by_their_names(build, names, tmp_path) -> None:
    opened = open_prompts(build(tmp_path))
    assert [prompt.text for prompt in opened.prompts] == PROMPTS
    assert [prompt.name for prompt in opened.prompts] == names
    assert opened.images is None


def test_a_line_of_tiif_holds_a_short_and_a_long_prompt(tmp_path) -> None:
    found = [(prompt.group, prompt.name) for prompt in open_prompts(prompt_sets.tiif(tmp_path)).prompts]
    lengths = ("short_description", "long_description")
    places = [("action+2d", "0"), ("action+2d", "1"), ("style", "0")]
    assert found == [((kind, length), name) for kind, name in places for length in lengths]


def test_captions_to_draw_are_read_whole_and_those_to_retrieve_by_their_first_line(tmp_path) -> None:
    spec = urban1k(tmp_path)
    (tmp_path / "caption" / "1.txt").write_text("Urban 1.\n\nA second  line.\n")
    assert open_prompts(spec).prompts[1].text == "Urban 1. A second line."
    assert open_dataset(spec).captions(1) == ("Urban 1.",)


def test_prompts_of_a_data_set_are_its_first_captions_in_its_order(tmp_path) -> None:
    opened = open_prompts("miniature:6")
    data = open_dataset("miniature:6")
    assert [prompt.text for prompt in opened.prompts] == [data.captions(index)[0] for index in range(6)]
    assert len(opened.images) == 6


def test_a_digest_is_of_the_texts_and_their_order(tmp_path) -> None:
    one = write_lines(tmp_path / "one.txt", "a", "b")
    other = write_lines(tmp_path / "other.txt", "b", "a")
    same = write_lines(tmp_path / "same.txt", "", "a", "b")
    assert open_prompts(f"txt:{one}").digest == open_prompts(f"txt:{same}").digest
    assert open_prompts(f"txt:{one}").digest != open_prompts(f"txt:{other}").digest


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("imagenet:X", r"imagenet:X is no set of prompts: pass miniature, or one of .*dpg-bench, .*urban1k"),
        ("dpg-bench", "dpg-bench names no path: pass dpg-bench:PATH"),
        ("dpg-bench:{}/gone", "gone does not exist, or is no folder"),
        ("dpg-bench:{}", "holds no prompt: pass the folder of its text files"),
        ("tiif:{}", "holds no prompt: pass the folder of its JSONL files"),
        ("longbench-t2i:{}/gone", "gone does not exist, or is no file"),
        ("longbench-t2i:{}/empty", "holds no prompt: pass its instruction.jsonl"),
        ("txt:{}/empty", "holds no prompt: pass a file with a prompt in each line"),
        ("detailmaster:{}/empty", "is not JSON"),
        ("detailmaster:{}/list", "holds no prompt: pass its JSON"),
    ],
)
def test_what_holds_no_prompts_is_refused(spec, message, tmp_path) -> None:
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "list").write_text("[]")
    with pytest.raises((OSError, ValueError), match=message):
        open_prompts(spec.format(tmp_path))


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("longbench-t2i", "a", [{"label": []}], r"Line 1 of .*a lacks 'instruction'"),
        ("longbench-t2i", "a", [{"instruction": 7}], "The prompt of Line 1 of .* is 7, where text was expected"),
        ("longbench-t2i", "a", [["A fox."]], "Line 1 of .* does not have the layout of its data set"),
        ("tiif", "", [{"type": "a", "short_description": "x"}], "lacks 'long_description'"),
        ("tiif", "", [{"type": 3, "short_description": "x", "long_description": "x"}], "has the type 3"),
        ("detailmaster", "a", {"image_id": 1}, "holds a dict, where a list was expected"),
        ("detailmaster", "a", [{"dataset_target": "docci", "image_id": "1", "polished_prompt": ""}], "is empty"),
        (
            "detailmaster",
            "a",
            [{"dataset_target": "d", "image_id": "1", "polished_prompt": text} for text in "ab"],
            "Entry 2 of .* has the image d_1 of an earlier entry, but another prompt",
        ),
    ],
)
def test_a_faulty_entry_is_refused_with_its_place(kind, name, content, message, tmp_path) -> None:
    text = json.dumps(content) if kind == "detailmaster" else "\n".join(map(json.dumps, content))
    (tmp_path / (name or "x.jsonl")).write_text(text)
    with pytest.raises(ValueError, match=message):
        open_prompts(f"{kind}:{tmp_path / name}")


def test_prompts_alone_have_neither_split_nor_images(tmp_path) -> None:
    spec = prompt_sets.txt(tmp_path)
    for refused in ({"split": "train"}, {"images": tmp_path}):
        with pytest.raises(ValueError, match="holds prompts only: pass no split and no folder of images with it"):
            open_prompts(spec, **refused)


def test_two_prompts_of_one_name_are_not_made_one(tmp_path) -> None:
    for name in ("fox.1.txt", "fox.2.txt"):
        (tmp_path / name).write_text("A fox.")
    with pytest.raises(ValueError, match="share the name fox before the first dot"):
        open_prompts(f"dpg-bench:{tmp_path}")
