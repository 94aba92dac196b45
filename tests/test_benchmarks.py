"""The benchmark of late interaction runs, compares, and prints tables that Markdown reads."""

import re
import subprocess
import sys
from pathlib import Path

import clim
import miniature_retrieval
import pytest
from clim import Measured

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "clim.py"
COLUMNS = ["batch", "loop, s", "ours, s", "times faster", "loop, MiB", "ours, MiB", "times smaller"]


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each line of each table, without the line below the head."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert all(set(block[1]) <= set("|- ") for block in blocks)
    return [[[cell.strip() for cell in line[1:-1].split("|")] for line in [block[0], *block[2:]]] for block in blocks]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--tokens", "all", "--dtype", "bfloat16"]])
def test_measures_the_loop_and_ours_and_finds_them_equal(more) -> None:
    flags = ["--batch-sizes", "2", "--ours-only", "3", "--repeats", "1", "--threads", "1", *more]
    done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.match(r"\d{4}-\d\d-\d\d, .* cores, 1 threads, torch \S+: `python benchmarks/clim.py --batch", done.stdout)
    (head, values), ours = tables(done.stdout)
    assert head == COLUMNS
    assert all(float(value) >= 0 for value in values + ours[1])


def run_with(monkeypatch, results: dict[tuple[str, int], Measured | None], *flags: str) -> None:
    """Run the script with these measurements in place of its own."""
    monkeypatch.setattr(clim, "measure_apart", lambda way, batch, flags: results[way, batch])
    monkeypatch.setattr(sys, "argv", ["clim.py", *flags])
    clim.main()


def test_prints_ratios_and_what_does_not_fit(monkeypatch, capsys) -> None:
    results = {
        ("loop", 16): Measured(3, 600, loss=7, gradient=2),
        ("ours", 16): Measured(0.25, 120, loss=7.0001, gradient=2),
        ("loop", 32): None,
        ("ours", 32): Measured(0.5, 240, loss=9, gradient=3),
        ("ours", 64): None,
    }
    run_with(monkeypatch, results, "--batch-sizes", "16", "32", "--ours-only", "32", "64")
    assert tables(capsys.readouterr().out) == [
        [
            COLUMNS,
            ["16", "3", "0.25", "12.0", "600", "120", "5.0"],
            ["32", "does not fit", "0.5", "–", "–", "240", "–"],
        ],
        [
            ["batch", "ours, s", "ours, MiB", "KiB a pair"],
            ["32", "0.5", "240", "7680"],
            ["64", "does not fit", "–", "–"],
        ],
    ]


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (Measured(1, 1, loss=7.1, gradient=3), r"The loss of the loop is 7 and ours 7\.1: they should be equal"),
        (Measured(1, 1, loss=7, gradient=3.1), r"The gradient of the loop is 3 and ours 3\.1"),
        (Measured(1, 1, loss=float("nan"), gradient=3), "ours nan"),
    ],
)
def test_a_difference_from_the_loop_is_an_error(ours, message, monkeypatch) -> None:
    results = {("loop", 16): Measured(9, 9, loss=7, gradient=3), ("ours", 16): ours}
    with pytest.raises(SystemExit, match=message):  # a text as exit status is printed, and the status 1
        run_with(monkeypatch, results, "--batch-sizes", "16")


@pytest.mark.parametrize("flags", [("--batch-sizes", "1"), ("--ours-only", "0"), ("--repeats", "0")])
def test_refuses_sizes_that_measure_nothing(flags, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_with(monkeypatch, {}, *flags)
    assert "batch sizes begin at 2, repeats and threads at 1" in capsys.readouterr().err


@pytest.mark.slow
def test_retrieval_trains_its_rows_once_and_prints_them_beside_stock(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(miniature_retrieval, "TRAINED", {"tried": "--region-weight 0 --pull-weight 0"})
    flags = ["--runs", str(tmp_path), "--seeds", "1", "--scenes", "10"]
    flags += ["--train-flags", "--data miniature:10 --batch-size 10 --max-steps 1"]
    monkeypatch.setattr(sys, "argv", ["miniature_retrieval.py", *flags])
    miniature_retrieval.main()
    (table,) = tables(capsys.readouterr().out)
    names = [line[0] for line in table[1:]]
    assert names == [
        "stock, cut at 77",
        "stretched, not trained",
        "tried",
        "FineLIP that ships, 1",
        "FineLIP that ships, 2",
    ]
    assert table[1][-2:] == ["–", "–"]  # stock has no states past token 77
    monkeypatch.setattr(miniature_retrieval, "train", None)  # what is there is not trained again
    miniature_retrieval.main()
    (again,) = tables(capsys.readouterr().out)
    # All but the probe: of so few sentences, the last bit of a state may decide one.
    assert [line[:-2] for line in again] == [line[:-2] for line in table]
