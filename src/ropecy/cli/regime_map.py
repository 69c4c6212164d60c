"""``python -m ropecy map``: which data a polynomial is certified for, and the n from which it beats exact attention.

The data are random rows of width d in random directions, with scores up to a bound B, or the heads in a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..approximation import minimax as poly
from ..certificate import BoundedEntryError
from ..certify.rounding import polynomial_rounding
from ..certify.sample import Sample
from ..certify.values import measure_values
from ..engines.base import Context
from ..engines.exact.cost import exact_work, seconds_of
from ..engines.polynomial.cost import Served, pays_from
from ..planning.planner import choose
from ..problem.call import prepare
from ..problem.mask import Mask
from ..problem.problem import Problem
from ..problem.request import Request

WIDTHS = (4, 8, 16, 32, 64, 128)
BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_TOKENS = 4096  # number of random rows whose moments are measured

SETH = """\
Where SETH forbids hope: for d = O(log n), errors of 1/poly(n) and entries of q and k within b, Alman and Song (NeurIPS
2023, arXiv:2302.13214; with RoPE arXiv:2505.11892, its gradient arXiv:2412.17316) have time n^(1+o(1)) where b =
o(sqrt(log n)), and none below n^(2-o(1)) for b = C sqrt(log n), C some constant, unless SETH fails. At scale 1/d such
entries give scores within B = b^2: the border is where B grows as log n, which is 8.3 at 4,096 tokens, 11.1 at 65,536
and 13.8 at a million. It is a statement on growth, and says nothing of one n; a trained model's scores of 20 to 70 are
past it at any length that there is."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The degree and the number of features of a polynomial that certifies eps, and the n from which it pays.

    It pays where it is faster than exact attention; `pays_from` is None where it is faster for no n.
    """

    degree: int
    n_features: int
    pays_from: int | None

    def __str__(self) -> str:
        return f"{self.degree:>6} {_count(self.n_features):>11} {_count(self.pays_from):>12}"


_HEAD, _NONE = (f"{a:>6} {b:>11} {c:>12}" for a, b, c in (("degree", "features", "pays from n"), "---"))


def _count(n: int | None) -> str:
    if n is None:
        return "-"
    return f"{n:,}" if n < 10**8 else f"{n:.1e}"


def cells(
    eps: float, *, dtype: str = "float32", causal: bool = False, grad: bool = False, seed: int = 0
) -> Iterator[tuple[int, float, Entry | None, Entry | None]]:
    """For each width d, d_v = d, and each bound B: (d, B, the entry by the worst case, the entry by moments).

    An entry is None where no polynomial certifies eps.

    Parameters
    ----------
    eps : float
        The error to certify, in units of range(V).
    dtype : str
        The dtype of Q, K and V.
    causal, grad : bool
        Whether row i sees the keys j <= i only, and whether gradients are planned for too.
    seed : int
        The seed of the random rows.
    """
    rng = np.random.default_rng(seed)
    for d in WIDTHS:
        q, k, v = rng.standard_normal((3, _TOKENS, d))
        q, k = (X * math.sqrt(d) / np.linalg.norm(X, axis=1, keepdims=True) for X in (q, k))
        q, k, v = (X.astype(dtype) for X in (q, k, v))
        for B in BOUNDS:
            mask = Mask(_TOKENS, _TOKENS, hi=0 if causal else None)
            problem = Problem(q=q[None, None], k=k[None], v=v[None], scale=B / d, mask=mask)
            yield d, B, _worst_case(problem, B, eps, grad), _by_moments(problem, eps, grad, seed)


def _worst_case(problem: Problem, B: float, eps: float, grad: bool) -> Entry | None:
    left = eps - polynomial_rounding(problem, B, measure_values(problem))
    degree = None if left <= 0 else poly.smallest_degree(B, poly.relative_error_for(left))
    if degree is None:
        return None
    degree = max(1, degree)
    return _entry(problem, degree, degree + 1 if grad else None)


def _by_moments(problem: Problem, eps: float, grad: bool, seed: int) -> Entry | None:
    try:
        found = choose(Context.of(problem, Request(eps=eps, method="polynomial", seed=seed, grad=grad))).executable
    except (BoundedEntryError, MemoryError):
        return None
    certificate, gradient = found.certificate, found.gradient_certificate
    if certificate.rule != "moments":
        return None
    rule = {"moments": True, "fourth": certificate.failure > 0}
    return _entry(problem, certificate.degree, gradient and gradient.degree, **rule)


def _entry(problem: Problem, degree: int, grad_degree: int | None, **rule: bool) -> Entry:
    n_features = poly.n_features(problem.sizes.d, degree)
    return Entry(degree, n_features, pays_from([Served(problem, degree, grad_degree, **rule)]))


def print_map(found: list[tuple[int, float, Entry | None, Entry | None]], what: str) -> None:
    """Print the cells as a table, and what theory says about larger bounds."""
    print(f"{what}; n as predicted for one head, d_v = d\n")
    print(f"{'':10} {'by the worst case':^31} | {'by moments, of random directions':^31}")
    print(f"{'d':>4} {'B':>5} {_HEAD} | {_HEAD}")
    for d, B, worst, moments in found:
        if B == BOUNDS[0]:
            print()
        print(f"{d:>4} {B:>5g} {worst or _NONE} | {moments or _NONE}")
    print(f"\n{SETH}")


@dataclass(frozen=True, slots=True)
class Head:
    """A head of a file, and what is planned for it.

    Attributes
    ----------
    index : tuple of int
        Its index in the leading axes of Q.
    n : int
        Number of keys.
    bound : float
        B, which no score exceeds in size.
    spread : float
        The root mean square of the scores of a row, for the row where it is largest.
    worst : Entry or None
        The polynomial that is certified by the worst case.
    engine : str
        The engine that method="auto" takes, with the degree if it has one.
    seconds, exact : float
        The seconds that this engine, and the exact one, are predicted to take.
    """

    index: tuple[int, ...]
    n: int
    bound: float
    spread: float
    worst: Entry | None
    engine: str
    seconds: float
    exact: float


def heads(rows: dict[str, np.ndarray], *, eps: float, scale: float | None, causal: bool, grad: bool) -> Iterator[Head]:
    """The heads of Q and K one after the other; Q and K are projected and rotated already. Without V, K stands for it.

    Raises
    ------
    TypeError, ValueError
        As `plan` raises them, and a ValueError where there is no head or no token.
    """
    shapes = {name: np.shape(rows[name]) for name in ("Q", "K")}
    for name, shape in shapes.items():
        if 0 in shape[:-1]:
            raise ValueError(f"{name}: got shape {shape}, wants at least one head of at least one token")
    call = prepare(rows["Q"], rows["K"], rows.get("V", rows["K"]), scale=scale, causal=causal, eps=eps)
    whole, request = call.problem, replace(call.request, grad=grad)
    for place, index in enumerate(np.ndindex(*call.lead)):
        h, g = divmod(place, whole.sizes.G)
        one = slice(h, h + 1)
        problem = replace(whole, q=whole.q[one, g : g + 1], k=whole.k[one], v=whole.v[one])
        context = Context.of(problem, request)
        found, statistics = choose(context).candidate, context.statistics
        bound, spread = statistics.scores.bound, math.inf
        if statistics.scores.keys is not None:
            spread = math.sqrt(float(Sample(problem, statistics.scores, statistics.values).second.max()))
        worst = None if bound > poly.MAX_BOUND else _worst_case(problem, bound, eps, grad)
        degree = found.executable.certificate.degree
        engine = found.engine if degree is None else f"{found.engine}, {degree}"
        seconds = (seconds_of(work, problem.threads, grad) for work in (found.work, exact_work(problem, grad)))
        yield Head(index, problem.sizes.n_k, bound, spread, worst, engine, *seconds)


def print_heads(found: list[Head], what: str) -> None:
    """Print a row for each head."""
    print(f"{what}\n")
    print(f"{'':35} {'by the worst case':^31} | {'auto':^36}")
    print(f"{'head':>12} {'B':>9} {'rms, at most':>12} {_HEAD} | {'engine, degree':<16} {'seconds':>9} {'exact':>9}")
    for one in found:
        print(
            f"{','.join(map(str, one.index)) or '-':>12} {one.bound:>9.3g} {one.spread:>12.2g} {one.worst or _NONE} | "
            f"{one.engine:<16} {one.seconds:>9.3g} {one.exact:>9.3g}"
        )
    exact = sum(one.engine == "exact" for one in found)
    print(f"\n{exact} of {len(found)} heads are computed exactly\n\n{SETH}")


def draw(path: Path, found: list[tuple[int, float, Entry | None, Entry | None]], rows: list[Head], what: str) -> None:
    """Draw the n from which a polynomial pays as a function of B: a line for each width, a cross for each head.

    The region B > log n, where theory expects no algorithm in almost linear time, is grey.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    top = 1e8
    for place, d in enumerate(WIDTHS):
        for column, style in ((2, "o-"), (3, "o--")):
            points = [(cell[1], cell[column].pays_from) for cell in found if cell[0] == d and cell[column] is not None]
            points = [(B, n) for B, n in points if n is not None and n < top]
            label = f"d = {d}" if column == 2 else None
            axes.loglog(*zip(*points, strict=True) if points else ([], []), style, color=f"C{place}", ms=3, label=label)
    axes.plot([], [], "k--", label="by moments")
    if rows:
        axes.plot([one.bound for one in rows], [one.n for one in rows], "kx", label="heads of the file")
    B = np.geomspace(BOUNDS[0], max([2 * BOUNDS[-1], *(1.2 * one.bound for one in rows)]), 200)
    axes.fill_between(B, 16, np.exp(np.minimum(B, math.log(top))), color="0.85", label="B > log n (SETH)")
    axes.set(ylim=(16, top), xlim=(B[0], B[-1]), title=what)
    axes.set(xlabel="B, which no score exceeds", ylabel="n from which a polynomial pays")
    axes.legend(fontsize=8, ncols=2, loc="upper left")
    figure.savefig(path, dpi=90)
