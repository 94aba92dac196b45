"""The benchmark of speed at real size: operations are counted exactly, and its tables are printed, at tiny size."""

import pytest
import torch

from benchmarks import sdxl
from finelip_sdxl import FineLIPSDXLPipeline
from tests.helpers.tiny_benchmarks import make_tiny


@pytest.mark.parametrize("length", sdxl.LENGTHS)
def test_a_text_fills_its_positions(length) -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained("miniature")
    text = sdxl.text_of(pipe.tokenizer, length)
    assert pipe.encode_prompt(text)[0].shape[1] == length
    windows = pipe.describe_prompt(text).plans[0].windows
    assert len({window.text for window in windows}) == len(windows)  # equal ones would be encoded once


@pytest.mark.slow
def test_operations_at_real_size() -> None:
    stock = sdxl.operations(77, has_cache=False)
    assert stock == pytest.approx(13.52e12, rel=1e-3)  # design: counted before
    assert sdxl.operations(248, has_cache=False) / stock == pytest.approx(1.0278, abs=1e-4)
    # Keys, and values, are 83,200 channels from 2,048 each: what a longer text costs then is attention to it.
    saved = sdxl.operations(248, has_cache=False) - sdxl.operations(248, has_cache=True)
    assert saved == 2 * (2 * 2 * 248 * 2048 * 83_200)  # both halves of guidance; a product is two operations


@pytest.mark.slow
def test_the_tables_are_printed(monkeypatch, capsys) -> None:
    make_tiny(monkeypatch)
    arguments = ["--device", "cpu", "--resolution", "64", "--only", "encoding", "pictures"]
    monkeypatch.setattr("sys.argv", ["sdxl.py", *arguments])
    sdxl.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[0].startswith("| encoding |")
    assert [line.split(" | ")[0] for line in lines[2:6]] == [f"| {length} positions" for length in sdxl.LENGTHS]
    stock = next(line for line in lines if line.startswith("| stock, 77"))
    assert stock.split(" | ")[2] == stock.split(" | ")[4] == "1.000"
    assert len(lines) == 6 + 2 + 1 + 3 * len(sdxl.LENGTHS) - 1


def test_loading_is_measured(monkeypatch, tmp_path) -> None:
    make_tiny(monkeypatch)
    sdxl.write_models(tmp_path)
    for has_finelip in (False, True):
        seconds, grown = sdxl.loaded(tmp_path, has_finelip)
        assert seconds > 0 <= grown


def test_a_page_keeps_the_tables_of_the_other_device(tmp_path, capsys) -> None:
    file = tmp_path / "results" / "speed.md"
    for device in ("cpu", "cuda", "cpu"):
        if device == "cuda":
            assert "## GPU\n\nNot measured: run `python benchmarks/sdxl.py --device cuda" in file.read_text()
        with sdxl.also_written(file, device):
            sdxl.print_title("encoding", f"of {device}")
    text = file.read_text()
    cpu, gpu = text.index("## CPU\n\n| encoding | of cpu |"), text.index("## GPU\n\n| encoding | of cuda |")
    assert cpu < gpu
    assert text.count("| encoding |") == 2
    assert "| encoding | of cuda |" in capsys.readouterr().out


def test_a_page_keeps_its_beginning(tmp_path) -> None:
    file = tmp_path / "speed.md"
    file.write_text("# Speed\n\nLong prompts are cheap. They were not before.\n\n## CPU\n\nold\n")
    with sdxl.also_written(file, "cpu"):
        print("new")
    assert file.read_text().startswith("# Speed\n\nLong prompts are cheap. They were not before.\n\n## CPU\n\nnew\n")


def test_an_unfinished_run_leaves_the_page_alone(tmp_path) -> None:
    file = tmp_path / "speed.md"
    file.write_text("# Before\n")
    with pytest.raises(KeyboardInterrupt), sdxl.also_written(file, "cpu"):
        raise KeyboardInterrupt
    assert file.read_text() == "# Before\n"


@pytest.mark.parametrize("arguments", [["--steps", "1"], ["--turns", "0"], ["--resolution", "1"], ["--only", "all"]])
def test_flags_out_of_range_are_refused(capsys, arguments) -> None:
    with pytest.raises(SystemExit):
        sdxl.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_offloading_is_measured_on_a_gpu_alone(monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["sdxl.py", "--device", "cpu", "--offload"])
    with pytest.raises(SystemExit, match="use --device cuda"):
        sdxl.main()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured(monkeypatch, capsys) -> None:
    make_tiny(monkeypatch)
    arguments = ["--device", "cuda", "--resolution", "64", "--steps", "2", "--compile", "--offload"]
    monkeypatch.setattr("sys.argv", ["sdxl.py", *arguments, "--only", "pictures"])
    sdxl.main()
    assert "UNet compiled by blocks" in capsys.readouterr().out
