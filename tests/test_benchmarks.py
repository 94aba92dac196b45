"""The benchmark of late interaction runs, compares, and prints tables that Markdown reads."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from clim import Measured, check_equal

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "clim.py"


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, check=False)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.slow
def test_prints_a_table_of_both_and_one_of_ours() -> None:
    done = run("--batch-sizes", "2", "3", "--ours-only", "4", "--repeats", "1", "--threads", "1")
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert re.match(r"\d{4}-\d\d-\d\d, .* cores, 1 threads?, torch \S+: `python benchmarks/clim.py --batch", head)
    both, ours = [line for line in lines if line][:4], [line for line in lines if line][4:]
    assert cells(both[0]) == [
        "batch",
        *("loop, s", "ours, s", "times faster"),
        *("loop, MiB", "ours, MiB", "times smaller"),
    ]
    assert [cells(line)[0] for line in both[2:]] == ["2", "3"]
    assert cells(ours[0]) == ["batch", "ours, s", "ours, MiB", "MiB a pair"]
    assert [cells(line)[0] for line in ours[2:]] == ["4"]
    for table in (both, ours):
        assert set(table[1]) == {"|", "-"}
        assert len({len(cells(line)) for line in table}) == 1
        assert all(float(cell) >= 0 for line in table[2:] for cell in cells(line))


@pytest.mark.slow
def test_compares_all_tokens_in_half_precision() -> None:
    done = run("--batch-sizes", "2", "--repeats", "1", "--threads", "1", "--tokens", "all", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert cells(done.stdout.splitlines()[-1])[0] == "2"


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (Measured(1, 1, loss=7.1, gradient=3), r"The loss of the loop is 7 and ours 7\.1"),
        (Measured(1, 1, loss=7, gradient=3.1), r"The gradient of the loop is 3 and ours 3\.1"),
        (Measured(1, 1, loss=math.nan, gradient=3), "ours nan"),
    ],
)
def test_a_difference_from_the_loop_is_an_error(ours, message) -> None:
    loop = Measured(9, 9, loss=7, gradient=3)
    check_equal(loop, loop._replace(seconds=1), "float32")
    with pytest.raises(ValueError, match=message):
        check_equal(loop, ours, "float32")


@pytest.mark.parametrize("flags", [("--batch-sizes", "1"), ("--ours-only", "0"), ("--repeats", "0")])
def test_refuses_sizes_that_measure_nothing(flags) -> None:
    done = run(*flags)
    assert done.returncode == 2
    assert "batch sizes begin at 2, repeats and threads at 1" in done.stderr
