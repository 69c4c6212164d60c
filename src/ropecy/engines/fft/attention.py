"""Polynomial attention where positions don't factor: ``p(s) t_{j-i} = sum_a w_a q^a T k^a`` with T = (t_{j-i}), by FFT.

The algorithm of arXiv:2412.17316 and arXiv:2505.11892 proper: each monomial is a Toeplitz matrix between two diagonal
ones. Rotations factor, so with rotated rows all monomials share one T, which holds the band and the bias, ``t_m =
exp(b_m)`` where a row may see the offset m. The gradient of the bias, which the papers do not have, is a correlation. A
family W_{i-j} multiplies T by a factor that differs from monomial to monomial (see `family`).

The error of a transform is absolute: a few units of rounding times the norm of its whole input. So transforms are done
in float64, for float32 data too, and a bias that spreads over many nats is cut into levels: rows that see none of the
large weights would else be lost in the rounding of these. Rows for which even that is not enough are computed by the
exact engine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...approximation.minimax import Polynomial
from ...certify.scores import Scores
from ...certify.values import medians
from ...problem.input_gradients import InputGradients, SymbolGradient
from ...problem.mask import Mask
from ...problem.problem import Problem
from ..exact import attention
from . import family
from .blocks import near
from .shared import Shared, plans
from .symbol import Run, Symbol


@dataclass(slots=True)
class Saved:
    """What backward needs of forward.

    Attributes
    ----------
    product : Shared or family.Product
        The sums over keys.
    symbol, polynomials, scores
        As `forward` was given them.
    centred : (H, G, d_v, n) float64 array
        O without the values' middle.
    inverse : (H, G, n) float64 array
        One over the denominators; 0 for rows that are computed exactly or see no key.
    exact : list of (Problem, attention.Saved)
        For each run of rows that was computed exactly, in some of the slots.
    """

    product: Shared | family.Product
    symbol: Symbol
    polynomials: tuple[Polynomial, ...]
    scores: Scores
    centred: np.ndarray
    inverse: np.ndarray
    exact: list[tuple[Problem, attention.Saved]]


def forward(
    problem: Problem, scores: Scores, polynomials: tuple[Polynomial, ...], symbol: Symbol, want_lse: bool
) -> tuple[np.ndarray, np.ndarray | None, Saved]:
    """O (H, G, n, d_v), lse float64 or None, and what backward needs.

    Parameters
    ----------
    problem : Problem
    scores : Scores
        Centre and sizes of q and k.
    polynomials : tuple of Polynomial
        The polynomial p of each slot, whose scores are all within ``[-p.B, p.B]``. All are of one degree, and with a
        family they are equal.
    symbol : Symbol
        `survey` of the problem.
    want_lse : bool

    Notes
    -----
    Time: 2 F (d_v + 1) complex transforms of n numbers, forth and back, F = C(d + g, g), in blocks. Memory: columns of
    q, k, v in float64, the spectrum of T, and for each thread a few columns and spectra; nothing of F n.
    """
    H, G, n = problem.sizes[:3]
    # Taken from v and given back to O, for the error of a transform is as large as what it is given.
    middle, degree = medians(problem), polynomials[0].degree
    values = _centred(problem, middle)
    if problem.family is None:
        product = Shared(problem, scores, values, symbol, max(1, degree))
    else:
        work = family.operations(problem, degree, symbol.block, near(problem, symbol.block), False)
        product = family.Product(problem, scores, values, symbol, plans(symbol.block, work))
    sums = product.forward(polynomials)
    plain = np.broadcast_to(symbol.top < symbol.unseen, (H, G, n)).copy()
    for run in symbol.exact_rows:
        plain[run.at] = False
    denominators = np.where(plain, sums[:, :, -1], 1)
    inverse = np.where(plain, 1 / denominators, 0)
    centred = sums[:, :, :-1] * inverse[:, :, None]
    o = centred + middle[:, None, :, None] * plain[:, :, None]
    o = np.ascontiguousarray(o.swapaxes(-1, -2).astype(problem.q.dtype))
    lse = None
    if want_lse:
        shift = symbol.peak[..., None]
        if scores.centre is not None:
            shift = shift + problem.scale * np.einsum(
                "hgna,ha->hgn", problem.q, scores.centre.astype(np.float64), dtype=np.float64
            )
        lse = np.where(plain, np.log(denominators) + shift, -np.inf)
    saved = Saved(product, symbol, polynomials, scores, centred, inverse, [])
    plain_scores = np.broadcast_to(scores.plain_of_slots, (H,))
    for run in symbol.exact_rows:
        part = _rows(problem, run)
        o_part, lse_part, saved_part = attention.forward(part, plain_scores[run.slots], want_lse)
        o[run.at] = o_part
        if want_lse:
            lse[run.at] = lse_part
        saved.exact.append((part, saved_part))
    return o, lse, saved


def backward(problem: Problem, saved: Saved, do: np.ndarray) -> InputGradients:
    """The gradients of ``<do, O>``. That of the bias is (H, 1, n + n_k - 1) where the heads of a group share the bias.

    Notes
    -----
    With dN = [do, -<do, o>] / den: dphi_a(q) = sum_c dN_c T (k^a v_c), dphi_a(k) = sum_c v_c T^T (q^a dN_c),
    dv_c = sum_a w_a k^a T^T (q^a dN_c), and the gradient of b_m is t_m times what correlation finds of q^a dN_c and
    k^a v_c at the offset m. The features of dq and dk are those of an antiderivative of p, one degree more, so that
    pairs have the weights p(s_ij) t_{j-i} / den_i there too. Two pairs of transforms for each monomial and column.
    """
    H, G, n = problem.sizes[:3]
    symbol = saved.symbol
    grad = np.zeros((H, G, problem.v.shape[2] + 1, n))
    upstream = do.astype(np.float64).swapaxes(-1, -2)
    grad[:, :, :-1] = upstream * saved.inverse[:, :, None]
    grad[:, :, -1] = -(upstream * saved.centred).sum(axis=2) * saved.inverse
    dq, dk, dv, dsymbol, *dfamily = saved.product.backward(saved.polynomials, grad, problem.bias is not None)
    n_k, dtype = problem.sizes.n_k, problem.dtype
    dq = np.ascontiguousarray((saved.scores.q_factor[:, None, None, None] * dq).swapaxes(-1, -2).astype(dtype))
    dk = np.ascontiguousarray((saved.scores.k_factor[:, None, None] * dk).swapaxes(-1, -2).astype(dtype))
    dv = np.ascontiguousarray(dv[:, :-1].swapaxes(-1, -2).astype(dtype))
    if problem.mask.kept is not None:
        dv[~problem.mask.kept] = 0
        # At offsets at which every key is hidden transforms leave small numbers in the place of 0.
        hidden = ~_kept_at(problem.mask)
        if dsymbol is not None:
            np.copyto(dsymbol, 0, where=hidden[:, None])
        for total in dfamily:
            # The family's entries are in order of i - j, and not of j - i.
            np.copyto(total, 0, where=hidden.all(axis=0)[::-1])
    for run, (part, saved_part) in zip(symbol.exact_rows, saved.exact, strict=True):
        found = attention.backward(part, saved_part, np.ascontiguousarray(do[run.at]))
        dq[run.at] = found.dq
        dk[run.slots] += found.dk
        dv[run.slots] += found.dv
        if dsymbol is not None:
            own = found.symbol[0].values
            own = own if dsymbol.shape[1] > 1 else own.sum(axis=1, keepdims=True)
            dsymbol[run.slots, :, n - run.last : n - run.first + n_k - 1] += own
        for total in dfamily:
            total[:, run.first : run.last + n_k - 1] += found.family
    found = InputGradients(dq, dk, dv, family=dfamily[0] if dfamily else None)
    if dsymbol is not None:
        found.symbol = (SymbolGradient(dsymbol, problem.mask.least),)
    return found


def _centred(problem: Problem, middle: np.ndarray) -> np.ndarray:
    """[v - middle, 1] as columns, (H, d_v + 1, n_k) float64, with 0 for hidden keys."""
    H, n_k, d_v = problem.v.shape
    values = np.ones((H, d_v + 1, n_k))
    np.subtract(problem.v.swapaxes(-1, -2), middle[:, :, None], out=values[:, :-1], dtype=np.float64)
    if problem.mask.kept is not None:
        values *= problem.mask.kept[:, None]
    return values


def _rows(problem: Problem, run: Run) -> Problem:
    """The problem of some query rows of some slots."""
    n, n_k = problem.sizes.n, problem.sizes.n_k
    problem = problem if run.slots == slice(0, len(problem.q)) else problem.slots(run.slots)
    bias = problem.bias
    return replace(
        problem,
        q=np.ascontiguousarray(problem.q[:, :, run.first : run.last]),
        mask=problem.mask.rows(run.first, run.last),
        bias=None if bias is None else np.ascontiguousarray(bias[..., n - run.last : n - run.first + n_k - 1]),
    )


def _kept_at(mask: Mask) -> np.ndarray:
    """Whether any row meets a kept key at an offset, (H, n + n_k - 1) bool, from the least offset on."""
    before = np.pad(np.cumsum(mask.kept, axis=1), ((0, 0), (1, 0)))
    at = np.arange(mask.n + mask.n_k - 1)
    return before[:, np.minimum(at + 1, mask.n_k)] > before[:, np.maximum(at - mask.n + 1, 0)]
