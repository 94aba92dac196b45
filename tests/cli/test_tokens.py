"""The command `tokens`: whose tokens it counts, and the modules that it imports."""

import subprocess
import sys

import pytest

from finelip_sdxl.cli.main import main
from finelip_sdxl.miniature import miniature_path
from finelip_sdxl.prompts.vocabulary import MINIATURE, OTHER, SDXL

PORTRAIT = (
    "Portrait of an elderly clockmaker at his cluttered bench, warm lamplight, brass gears everywhere, 85mm lens, "
    "shallow depth of field, photorealistic"
)
SCENE = "A red star is in the top left. The center holds a small blue ring."


@pytest.mark.parametrize(
    ("arguments", "count", "vocabulary"),
    [
        ([PORTRAIT], 34, SDXL),
        (["a photo of a cat on a sofa"], 10, SDXL),
        ([SCENE], 19, MINIATURE),
        ([f"{SCENE} A dragon sleeps."], 29, MINIATURE),
        (["a red star"], 5, MINIATURE),
        (["a photo of a cat on a sofa", "--base", "miniature"], 15, MINIATURE),
        (["a photo of a cat", "--base", str(miniature_path())], 10, MINIATURE),
        (["🦊"], 4, SDXL),
    ],
)
def test_the_report_says_whose_tokens_it_counts(capsys, arguments, count, vocabulary) -> None:
    assert main(["tokens", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f" {count} tokens in 1 window" in lines[0], lines
    assert lines[-1] == f"Counted in {vocabulary}."


def test_only_a_real_sdxl_s_report_speaks_of_stock_sdxl(capsys) -> None:
    for arguments, stock in (["a cat"], "stock SDXL"), (["a cat", "--base", "miniature"], "the stock miniature"):
        assert main(["tokens", *arguments]) == 0
        assert f", as {stock} encodes it;" in capsys.readouterr().out


def test_a_model_with_words_of_its_own_is_counted_by_them(stock_folder, capsys) -> None:
    assert main(["tokens", "a red fox", "--base", stock_folder]) == 0
    assert capsys.readouterr().out.endswith(f"Counted in {OTHER}.\n")


def test_a_negative_prompt_and_options_work_without_a_base(capsys) -> None:
    text = "a (cat:1.3) BREAK a dog"
    assert main(["tokens", text, "--weighting", "a1111", "--negative-prompt", "blurry"]) == 0
    printed = capsys.readouterr().out
    assert "negative prompt: 3 tokens" in printed
    assert "in 2 windows of 248 positions" in printed
    assert main(["tokens", f"{PORTRAIT} " * 9, "--overflow", "error"]) == 2


@pytest.mark.parametrize("prompt", ["a photo of a cat", SCENE])
def test_neither_torch_nor_diffusers_is_imported(prompt) -> None:
    code = (
        "import sys; from finelip_sdxl.cli.main import main; assert main(['tokens', sys.argv[1]]) == 0;"
        "print(sorted({'torch', 'diffusers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, prompt], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model_index.json", None, "has no model_index.json"),
        ("model_index.json", "{", "is no JSON"),
        ("model_index.json", '{"text_encoder": 3, "text_encoder_2": []}', "lacks the CLIP text encoders"),
        ("text_encoder/config.json", None, "has no text_encoder/config.json"),
        ("text_encoder_2/config.json", '{"max_position_embeddings": "77"}', "max_position_embeddings '77'"),
        ("tokenizer/tokenizer.json", "{", "tokenizer of"),
    ],
)
def test_a_faulty_base_is_refused_in_one_sentence(tmp_path, capsys, name, content, message) -> None:
    for file in miniature_path().rglob("*.json"):
        copy = tmp_path / file.relative_to(miniature_path())
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    assert main(["tokens", "a cat", "--base", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
