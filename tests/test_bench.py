"""``ropecy bench``: the table it prints, its options, and the kernels of the limits."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ropecy import __main__
from ropecy.kernels import _peak


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_a_row_for_each_engine(dtype, capsys):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    __main__.main(["bench", "--shape", "1,4,2,64,80,8", "--dtype", dtype, "--causal", "--threads", "1"])
    printed = capsys.readouterr().out
    assert "Gflop/s" in printed and "GB/s" in printed
    assert f"h = 4, hk = 2, n = 64, nk = 80, d = 8, {dtype}, causal" in printed
    for engine in ("exact", "polynomial"):
        (line,) = (line for line in printed.splitlines() if line.startswith(engine))
        assert float(line.split()[1]) > 0


def test_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    __main__.main(["bench", "--shape", "1,1,1,16,16,4", "--plot", str(tmp_path / "bench.png")])
    assert (tmp_path / "bench.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("shape", "message"),
    [("1,2,3", "six integers"), ("1,8,3,1,5,6", "to divide h"), ("1,0,1,1,1,1", "six integers"), ("a,b", "six")],
)
def test_shapes_that_are_none(shape, message, capsys):
    with pytest.raises(SystemExit) as caught:
        __main__.main(["bench", "--shape", shape])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_operations_are_counted(dtype, threads):
    # Twelve chains of vectors of 16, 32 or 64 bytes, two operations each.
    done = _peak.multiply_add(dtype, 1000, threads)
    assert done in {2.0 * 12 * size / np.dtype(dtype).itemsize * 1000 * threads for size in (16, 32, 64)}


@pytest.mark.parametrize("n", [0, 1, 7, 127, 128, 1000])
def test_sums_read_every_number_once(n, threads):
    x = np.arange(n, dtype=np.float32)
    assert _peak.total(x, threads) == x.sum(dtype=np.float64)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts the process's threads as Linux shows them")
@pytest.mark.parametrize("limit", ["multiply_add('float32', 1000, 2)", "total(np.ones(2**22, np.float32), 2)"])
def test_limits_are_those_of_all_threads(limit):
    program = (
        "import os, numpy as np; from ropecy.kernels import _peak\n"
        "def count(): return len(os.listdir('/proc/self/task'))\n"
        f"before = count(); _peak.{limit}; print(count() - before)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "1\n"
