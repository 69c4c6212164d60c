"""Rows computed exactly: what they say of a result, and what they do not."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from .certificate import CONFIDENCE, unseen
from .certify.statistics import Statistics
from .engines.exact.row_errors import row_errors
from .engines.exact.rows import ExactRows
from .engines.parts.selection import parts_of
from .options import CheckOptions
from .problem import checks
from .problem.call import Call, prepare_for
from .problem.input_gradients import InputGradients
from .problem.problem import Problem
from .relative import RelativeFamily
from .rotary import Rotary

_RANGE = "the range of the values"

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True, slots=True)
class Evidence:
    """How far rows of a result are from what they should be; ``print(evidence)`` says it in words.

    Attributes
    ----------
    error : float
        The largest ``|O_ic - Attn_ic| / range_j(V_jc)`` over the sampled rows i and all c, range over the keys that row
        i sees. A column that is constant there counts 0 where O has its value, within rounding, and else inf. Of a
        gradient, the largest ``||dQ_i - exact_i||`` by the largest ``||exact_i||``.
    index : tuple of int
        The row where it is: O[index].
    n_rows, n_rows_total : int
        Rows sampled, uniformly and without replacement, and rows there are.
    seed : int
        Of the coins that chose the rows.
    confidence, fraction : float
        With this confidence, at most this fraction of all rows has a larger error.
    of : str
        What `error` is a part of.
    """

    error: float
    index: tuple[int, ...]
    n_rows: int
    n_rows_total: int
    seed: int
    confidence: float
    fraction: float
    of: str = _RANGE

    def __str__(self) -> str:
        found = f"{self.n_rows:,} of {self.n_rows_total:,} rows: error <= {self.error:.2g} of {self.of}"
        if self.n_rows == self.n_rows_total:
            return found
        return (
            f"{found}, the largest at {self.index}; with confidence {self.confidence:.0%} (seed {self.seed}) at "
            f"most {self.fraction:.2%} of all rows are further off, by how much is not said; sampled, not proved"
        )


def check(
    O: ArrayLike,
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    R: Rotary | RelativeFamily | None = None,
    *,
    rows: int = 459,
    seed: int | None = None,
    dO: ArrayLike | None = None,
    **options: Unpack[CheckOptions],
) -> Evidence:
    """``max_i max_c |O_ic - (D^-1 A V)_ic| / range_j(V_jc)`` over `rows` rows i drawn at random and computed exactly.

    With dO the same of a gradient: O is dQ of <dO, D^-1 A V>, and what is found is max_i ||dQ_i - exact_i|| by the
    largest ||exact_i|| of the sample.

    Parameters
    ----------
    O : (..., n, d_v) array
        A result of `attention`, or of anything that should agree with it: its shape, Q's dtype.
    Q, K, V, R, **options
        As in `attention`, without ``return_certificate`` and ``return_lse``.
    rows : int
        How many rows, over all leading axes together; all of them where there are no more. 459 speak with confidence
        0.99 of all rows but 1%.
    seed : int, optional
        By default fresh, and given back, so that the rows can be drawn again.
    dO : (..., n, d_v) array, optional
        As for the vjp of `attention_vjp`.

    Returns
    -------
    Evidence

    Raises
    ------
    TypeError, ValueError
        As `attention` does, and where O has another shape or dtype than its result, or NaN or Inf; with dO, where Q
        lacks leading axes of the result, over which dQ is a sum.

    See Also
    --------
    ropecy.Certificate : what is proved of a result, where something is.

    Notes
    -----
    Rows are computed in float64, whatever the dtype. The time is that of ``rows n_k (d + d_v)`` multiply-adds, two and
    a half times as many more for a gradient, and several times that where a mask or a bias goes by j - i. If more than
    a fraction b of all rows had a larger error than the sample, m rows would have missed them with probability at most
    ``(1 - b)^m``.

    Examples
    --------
    >>> from ropecy import attention
    >>> Q, K, V = np.random.default_rng(0).uniform(-1, 1, (3, 100, 4))
    >>> check(attention(Q, K, V, causal=True), Q, K, V, causal=True).error < 1e-3
    True
    """
    checks.check_values(V)
    rows = checks.check_count("rows", rows)
    call = prepare_for("check", Q, K, V, R, {**options, "seed": seed})
    shape = call.shape
    if dO is not None:
        dO = checks.check_like("dO", dO, call.dtype, call.shape)
        checks.check_finite("dO", dO)
        shape = np.shape(Q)
        if shape[:-1] != call.shape[:-1]:
            wanted = f"wants the leading axes {call.shape[:-2]} of the result where dO is given"
            raise ValueError(f"Q: got shape {shape}, {wanted}")
    O = checks.check_like("O", O, call.dtype, shape)
    checks.check_finite("O", O)
    seed = call.request.seed
    seed = secrets.randbits(62) if seed is None else seed
    total = int(np.prod(call.shape[:-1]))
    count = min(rows, total)
    fraction = 0.0 if count == total else unseen(count)
    chosen = np.sort(np.random.default_rng(seed).choice(total, count, replace=False)) if total else np.empty(0, int)
    error, worst = 0.0, 0
    if count and dO is not None:
        found = _gradient_errors(call, O, dO, chosen)
        error, worst = float(found.max()), int(chosen[found.argmax()])
    elif count and call.shape[-1]:
        found = _errors(call, O, chosen)
        error, worst = float(found.max()), int(chosen[found.argmax()])
    index = tuple(int(i) for i in np.unravel_index(worst, call.shape[:-1])) if total else ()
    of = _RANGE if dO is None else "the largest row of dQ"
    return Evidence(error, index, count, total, seed, CONFIDENCE, fraction, of)


def _errors(call: Call, O: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The error of each of the rows `chosen`, flat indices, in units of the ranges of their values."""
    whole, o = _in_float64(call.problem), call.from_user(O).astype(np.float64)
    # A row that sees no key, and is in no part, is 0.
    marked, found = np.zeros(o.shape[:3], bool), np.where(o.any(axis=-1), np.inf, 0.0)
    marked.reshape(-1)[chosen] = True
    for part in parts_of(whole):
        rows = np.flatnonzero(part.rows(marked))
        if not rows.size:
            continue
        exact = part.problem(whole)
        bound = Statistics(exact).plain.plain
        errors = np.zeros(exact.q.shape[:3])
        errors.reshape(-1)[rows] = row_errors(exact, part.rows(o), rows, _unit(call.dtype), bound=bound)
        part.put_rows(found, errors)
    return found.reshape(-1)[chosen]


def _gradient_errors(call: Call, dQ: np.ndarray, dO: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """||dQ_i - exact_i|| of the rows `chosen`, flat indices, by the largest ||exact_i|| among them."""
    whole = _in_float64(call.problem)
    found = InputGradients(*(np.zeros_like(X) for X in (whole.q, whole.k, whole.v)))
    marked, upstream = np.zeros(whole.q.shape[:3], bool), call.from_user(dO).astype(np.float64)
    marked.reshape(-1)[chosen] = True
    for part in parts_of(whole):
        if not part.rows(marked).any():
            continue
        problem, do = part.problem(whole), part.rows(upstream)
        own = InputGradients(*(np.zeros_like(X) for X in (problem.q, problem.k, problem.v)))
        if problem.empty:
            continue
        o, lse = np.zeros_like(do), np.full(do.shape[:3], -np.inf)
        rows = ExactRows(problem, np.inf, part.rows(marked))
        rows.forward(o, lse)
        rows.backward(o, lse, do, own)
        part.put_rows(found.dq, own.dq)
    exact = call.gradients(found)["dQ"]
    exact, dQ = (X.reshape(-1, X.shape[-1])[chosen].astype(np.float64) for X in (exact, dQ))
    off, largest = np.linalg.norm(dQ - exact, axis=1), np.linalg.norm(exact, axis=1).max()
    return off / largest if largest else np.where(off > 0, np.inf, 0.0)


def _unit(dtype: np.dtype) -> float:
    """Of rounding in a dtype, known to NumPy or not (bfloat16)."""
    return float(np.finfo(dtype).eps) / 2 if dtype.kind == "f" else 2.0**-8


def _in_float64(problem: Problem) -> Problem:
    return replace(problem, q=problem.q.astype(float), k=problem.k.astype(float), v=problem.v.astype(float))
