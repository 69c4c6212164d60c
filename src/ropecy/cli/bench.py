"""``ropecy bench``: this machine's limits, and how near attention comes to them.

Measured are the multiply-adds that the cores can do on registers, the bytes that they can read from memory, each engine
of this package, and PyTorch's scaled_dot_product_attention where it is installed. All are measured in one process, one
after the other and that several times, since the speed of a shared machine changes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..attention import attention
from ..certificate import BoundedEntryError
from ..kernels import _peak
from ..plan import plan
from . import progress
from .info import info

DTYPES = ("float32", "float64", "float16", "bfloat16")
_READ = 2**26  # float32 numbers, 256 MiB: more than caches hold
_ROUNDS = 2_000_000  # of multiply-adds, some 10 ms
_TURNS = 7
_PATIENCE = 10.0  # seconds that all turns of one row may take


@dataclass(frozen=True, slots=True)
class Shape:
    """Numbers of batch elements, query heads, key heads, queries and keys, and the width of a head, in this order."""

    b: int
    h: int
    hk: int
    n: int
    nk: int
    d: int

    def pairs(self, causal: bool) -> float:
        """How many pairs of a query and a key each head computes; a causal mask lets the last query see all keys."""
        n, nk = self.n, self.nk
        return float(sum(max(0, nk - n + i + 1) for i in range(n))) if causal else float(n) * nk


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of one way to compute attention.

    Attributes
    ----------
    name : str
    seconds : float
        The median of the turns.
    multiply_adds : float or None
        The multiply-adds of scores and values, as a fraction of those that the cores could do in that time; None for a
        polynomial, which does fewer.
    bandwidth : float
        The bytes of Q, K, V and O, as a fraction of those that could be read from memory in that time.
    """

    name: str
    seconds: float
    multiply_adds: float | None
    bandwidth: float


def run(shape: Shape, dtype: str, causal: bool, threads: int | None, plot: Path | None = None) -> None:
    """Measure, print the results as a table, and draw them to the file `plot` if it is given."""
    threads = info()["threads"] if threads is None else threads
    arrays = _arrays(shape, dtype)
    print("machine   {machine}, {cpus} CPUs, {instruction set}, {fftw}".format(**info()))
    print(f"threads   {threads}")
    rivals = _engines(arrays, shape, causal, threads) | _torch(arrays, shape, dtype, causal, threads)
    compute = np.dtype(np.float64 if dtype == "float64" else np.float32)
    peak, read, seconds = _measure(rivals, compute, threads)
    print(f"peak      {peak / 1e9:,.0f} Gflop/s in {compute}, in registers (a multiply-add is two operations)")
    print(f"memory    {read / 1e9:,.1f} GB/s read\n")
    shown = ", ".join(f"{name} = {getattr(shape, name)}" for name in Shape.__dataclass_fields__)
    print(f"{shown}, {dtype}{', causal' if causal else ''}\n")
    operations = 4.0 * shape.b * shape.h * shape.pairs(causal) * shape.d
    size = sum(X.nbytes for X in arrays) + arrays[0].nbytes
    rows = [
        Row(name, s, None if name == "polynomial" else operations / s / peak, size / s / read)
        for name, s in seconds.items()
    ]
    print(f"{'':<12} {'milliseconds':>13} {'of multiply-adds':>17} {'of bandwidth':>13}")
    for row in rows:
        share = "-" if row.multiply_adds is None else f"{row.multiply_adds:.0%}"
        print(f"{row.name:<12} {1e3 * row.seconds:>13.3g} {share:>17} {row.bandwidth:>13.0%}")
    if plot is not None:
        _draw(plot, rows, f"{shown}\n{dtype}{', causal' if causal else ''}, {threads} threads")
        print(f"\ndrawn to {plot}")


def _arrays(shape: Shape, dtype: str) -> list[np.ndarray]:
    """Random Q, K and V; rows of Q and K have root mean square 1, so that scores are within 1 at the default scale."""
    if dtype == "bfloat16":
        import ml_dtypes

        kind = np.dtype(ml_dtypes.bfloat16)
    else:
        kind = np.dtype(dtype)
    rng = np.random.default_rng(0)
    sizes = ((shape.h, shape.n), (shape.hk, shape.nk), (shape.hk, shape.nk))
    made = [rng.standard_normal((shape.b, *size, shape.d), np.float32) for size in sizes]
    for X in made[:2]:
        X /= np.sqrt(np.mean(X * X, axis=-1, keepdims=True))
    return [X.astype(kind) for X in made]


def _engines(arrays: list[np.ndarray], shape: Shape, causal: bool, threads: int) -> dict[str, Callable[[], object]]:
    how = {"causal": causal, "q_offset": shape.nk - shape.n if causal else 0, "threads": threads}
    rivals: dict[str, Callable[[], object]] = {"exact": lambda: attention(*arrays, method="exact", **how)}
    try:
        planned = plan(*arrays, method="polynomial", **how)
    except (BoundedEntryError, MemoryError) as error:
        print(f"polynomial: {error}")
    else:
        if planned.seconds["polynomial"] * (_TURNS + 1) < _PATIENCE:
            rivals["polynomial"] = lambda: attention(*arrays, method="polynomial", **how)
    return rivals


def _torch(
    arrays: list[np.ndarray], shape: Shape, dtype: str, causal: bool, threads: int
) -> dict[str, Callable[[], object]]:
    """PyTorch's attention under the same mask, or nothing where PyTorch is not installed or has no such mask."""
    try:
        import torch
        from torch.nn.functional import scaled_dot_product_attention as sdpa
    except ImportError:
        return {}
    if causal and shape.n != shape.nk and shape.n != 1:
        return {}  # PyTorch aligns causal masks at the first query and key
    torch.set_num_threads(threads)
    q, k, v = (torch.from_numpy(X.astype(np.float64 if dtype == "float64" else np.float32)) for X in arrays)
    q, k, v = (x.to(getattr(torch, dtype)) for x in (q, k, v))
    how = {"is_causal": causal and shape.n > 1, "scale": 1 / shape.d, "enable_gqa": shape.h != shape.hk}
    return {"PyTorch SDPA": lambda: sdpa(q, k, v, **how)}


def _measure(
    rivals: dict[str, Callable[[], object]], compute: np.dtype, threads: int
) -> tuple[float, float, dict[str, float]]:
    """Multiply-adds and bytes per second, and the seconds of each rival: medians over turns, each of which runs all."""
    big = np.ones(_READ, np.float32)
    done = []
    work = {
        "peak": lambda: done.append(_peak.multiply_add(compute, _ROUNDS, threads)),
        "read": lambda: _peak.total(big, threads),
        **rivals,
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    start = time.perf_counter()
    for turn in range(_TURNS + 1):
        progress.show(f"turn {turn + 1} of at most {_TURNS + 1}")
        for name, function in work.items():
            before = time.perf_counter()
            function()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - before)
        if turn and time.perf_counter() - start > _PATIENCE * len(work):
            break
    progress.show("")
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return done[0] / seconds.pop("peak"), big.nbytes / seconds.pop("read"), seconds


def _draw(path: Path, rows: list[Row], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time_axis, share_axis) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    names = [row.name for row in rows]
    time_axis.bar(names, [1e3 * row.seconds for row in rows], color="tab:blue")
    time_axis.set_ylabel("milliseconds")
    places = np.arange(len(rows))
    share_axis.bar(places - 0.2, [row.multiply_adds or 0.0 for row in rows], 0.4, label="of multiply-adds")
    share_axis.bar(places + 0.2, [row.bandwidth for row in rows], 0.4, label="of read bandwidth")
    share_axis.set_xticks(places, names)
    share_axis.axhline(1.0, color="0.5", lw=0.8)
    share_axis.set_ylabel("share of this machine's limit")
    share_axis.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
