"""Models of the rounding error of O, for exact attention and for monomials. They were measured, not proved."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..problem.communicator import SERIAL, Communicator
from ..problem.problem import Outline
from .scores import Scores
from .values import Values

_STRETCH = 1536  # how many keys the exact engine sums in its own dtype, in blocks, before it adds the sum up in float64


class Magnitudes(NamedTuple):
    """What rounding errors grow with, for all slots together, as numbers, or for each slot, as (H,) arrays.

    Attributes
    ----------
    bound : number or array
        A bound of the scores, keys centred.
    products : number or array
        A bound of the products <q, k>, keys as they are.
    scale : number or array
        The largest factor, in size, that a product is multiplied with.
    lost : number or array
        The error of the products that projections and rotations left.
    offset, residual, far
        As in `Values`, in units of the largest range of all slots, or of each slot's own.
    """

    bound: float | np.ndarray
    products: float | np.ndarray
    scale: float | np.ndarray
    lost: float | np.ndarray
    offset: float | np.ndarray
    residual: float | np.ndarray
    far: bool | np.ndarray


def largest(problem: Outline, scores: Scores, values: Values) -> Magnitudes:
    """Those of all slots together."""
    of_scores = scores.bound, scores.products, problem.largest_scale, scores.lost
    return Magnitudes(*of_scores, values.offset, values.residual, bool(values.far.any()))


def of_slots(problem: Outline, scores: Scores, values: Values) -> Magnitudes:
    """Those of each slot."""
    of_scores = scores.of_slots, scores.products_of_slots, problem.largest_scales, scores.lost_of_slots
    return Magnitudes(*of_scores, values.offsets, values.residuals, values.far)


def exact_rounding(problem: Outline, scores: Scores, values: Values, comm: Communicator = SERIAL) -> float:
    """A bound of the rounding error of O by the exact engine, in units of max_c range_j(v_jc), over all ranks' keys."""
    n_k = sum(comm.gather(problem.sizes.n_k))
    return float(rounding_of_pairs(problem, largest(problem, scores, values), n_k).max())


def rounding_of_pairs(problem: Outline, m: Magnitudes, n_k: int) -> np.ndarray:
    """A bound of the rounding error of O by the exact engine, with n_k keys, for magnitudes of this size.

    It is the sum of three errors:

    * of sums over keys (`sums_rounding`);
    * of scores: a score of size S is off by ``(2 + sqrt(d) / 2) S`` units of rounding, a bias by two units of its
      distance from the largest bias (`bias_reach`). Where scores are off by e, O moves by at most e times the range of
      the values; and never by more than the range, since O stays between the least and the largest value;
    * of storing O, whose entries may be far larger than the range.
    """
    unit, size = problem.unit, score_size(m)
    sums = sums_rounding(problem.dtype, n_k, _STRETCH if problem.family is None else 1)
    with np.errstate(over="ignore"):
        off = unit * _of_scores(problem.sizes.d) * size + _times(m.scale, m.lost)
        if problem.bias is not None:
            off = off + 2 * unit * bias_reach(problem, size)
        return sums * np.maximum(1.0, m.residual) + np.minimum(1.0, off) + unit * m.offset


def sums_rounding(dtype: np.dtype, n_k: int, stretch: int = _STRETCH) -> float:
    """The rounding error of a sum over n_k keys, in units of the largest value.

    Keys are summed in blocks of 96. If the terms of a block are equal, all are rounded to the same side, by half a unit
    each. The errors of different blocks are independent, so they grow with the square root of the number of blocks.
    After every `stretch` keys the sum is added up in float64, where equal terms are again rounded to the same side.
    """
    unit = float(np.finfo(dtype).eps) / 2
    return unit * (8 + min(40.0, n_k / 2) + math.sqrt(n_k / 96)) + 2.0**-54 * n_k / stretch


def _of_scores(d: int) -> float:
    """The rounding error of an inner product of d terms, in units of rounding times the norms of both vectors."""
    return 2 + math.sqrt(d) / 2


def most_of_norms(dtype: np.dtype, n_k: int, d: int, eps: float) -> float:
    """The largest ``|scale| ||q|| ||k||`` up to which the exact engine's rounding error is below eps.

    The sum is over n_k keys, and the values are assumed to lie near 0, so that storing O costs no more.
    """
    return (eps - sums_rounding(dtype, n_k)) / (_of_scores(d) * float(np.finfo(dtype).eps) / 2)


def score_size(m: Magnitudes) -> np.ndarray:
    """A bound of the scores without their bias, inside the near field and outside."""
    return _times(m.scale, m.products)


def _times(scale: float | np.ndarray, X: float | np.ndarray) -> np.ndarray:
    """scale X, which is 0 where the scale is, even if X is not known."""
    with np.errstate(over="ignore"):
        return np.multiply(scale, X, out=np.zeros(np.broadcast(scale, X).shape), where=np.not_equal(scale, 0))


def seen_bias(problem: Outline) -> np.ndarray:
    """The bias at the offsets that the band allows, (H or 1, G or 1, offsets); a single -inf if it allows none."""
    seen = problem.bias[..., problem.mask.seen_symbol]
    return seen if seen.shape[-1] else np.full((*problem.bias.shape[:2], 1), -np.inf)


def bias_reach(problem: Outline, size: np.ndarray) -> np.ndarray:
    """A bound of the weighted mean, over the keys of a row, of how far their biases lie below the largest bias of the
    head, for each slot; one for all slots that share the bias and the size.

    Scores without bias are within `size`. One bound is the distance from the largest to the least bias. The other is
    the sum of two distances: from the largest bias down to the largest that the row sees, and from there to the mean
    over the row's weights P. As P maximises ``sum_j P_j (s_j + b_j) + entropy(P)``, the latter is at most ``2 size +
    log n_k``.
    """
    where = problem.mask.seen_symbol
    seen = problem.bias[..., where]
    if not seen.shape[-1]:
        return np.zeros(len(seen))
    with np.errstate(over="ignore", invalid="ignore"):
        depth = seen.max(axis=-1, keepdims=True) - seen
        deepest = depth.max(axis=(1, 2))
        near = 2 * size + math.log(max(problem.sizes.n_k, 1))
        if np.all(deepest <= near) or problem.origin.hidden:
            return deepest
        beside = where.start, problem.bias.shape[-1] - where.stop
        depth = np.pad(depth, ((0, 0), (0, 0), beside), constant_values=np.inf)
        best = _best(problem, depth)
        best = np.where(np.isfinite(best), best, 0).max(axis=(1, 2), initial=0)
        return np.minimum(deepest, best + near)


def _best(problem: Outline, depth: np.ndarray) -> np.ndarray:
    """An upper bound of the least depth of a key that each row sees, (H or 1, G or 1, n); inf for a row that sees none.

    `depth`, (H or 1, G or 1, n + n_k - 1), is how far the bias at each offset is below the largest one. Without a
    key_mask the result is the minimum itself; with one it is the depth at the kept key nearest to the row.
    """
    (H, G, n, n_k, *_), kept_keys = problem.sizes, problem.mask.kept
    at = np.arange(n)
    if kept_keys is None:
        # Row i sees the n_k entries from n - 1 - i on: the end of a block of so many, and the start of the next.
        blocks = -(-depth.shape[-1] // n_k) + 1
        room = ((0, 0), (0, 0), (0, blocks * n_k - depth.shape[-1]))
        cut = np.pad(depth, room, constant_values=np.inf).reshape(*depth.shape[:2], blocks, n_k)
        from_start = np.minimum.accumulate(cut, axis=-1).reshape(*depth.shape[:2], -1)
        to_end = np.minimum.accumulate(cut[..., ::-1], axis=-1)[..., ::-1].reshape(*depth.shape[:2], -1)
        return np.minimum(to_end[..., n - 1 - at], from_start[..., n - 1 - at + n_k - 1])
    own, kept = at + problem.mask.offset, np.where(kept_keys, np.arange(n_k), -1)
    before = np.pad(np.maximum.accumulate(kept, axis=1), ((0, 0), (1, 0)), constant_values=-1)
    after = np.where(kept_keys, np.arange(n_k), n_k)
    after = np.pad(np.minimum.accumulate(after[:, ::-1], axis=1)[:, ::-1], ((0, 0), (0, 1)), constant_values=n_k)
    found = np.full((H, G, n), np.inf)
    for key in (before[:, np.clip(own + 1, 0, n_k)], after[:, np.clip(own, 0, n_k)]):
        index = key - at + n - 1
        seen = (key >= 0) & (key < n_k)
        index = np.broadcast_to(np.where(seen, index, 0)[:, None], found.shape)
        deep = np.take_along_axis(np.broadcast_to(depth, found.shape[:2] + depth.shape[-1:]), index, axis=-1)
        found = np.minimum(found, np.where(seen[:, None], deep, np.inf))
    return found


def polynomial_rounding(problem: Outline, B: float, values: Values, lost: float = 0.0) -> float:
    """The rounding error of O by the polynomial engine, in units of max_c range_j(v_jc), for scores within B.

    It is no more than the largest of `rounding_of_slots` where B is the largest bound of a slot. `lost` is
    `Scores.lost`, the error of the products <q, k> (see `moved`).
    """
    far = bool(values.far.any())
    m = Magnitudes(B, math.inf, abs(problem.scale), lost, values.offset, values.residual, far)
    return float(rounding_of_monomials(problem, m))


def rounding_of_slots(problem: Outline, scores: Scores, values: Values, B: np.ndarray) -> np.ndarray:
    """`polynomial_rounding` of each slot by itself, for scores within B, in units of the range of its own values: (H,).

    B has an entry for each slot.
    """
    return rounding_of_monomials(problem, of_slots(problem, scores, values)._replace(bound=B))


def rounding_of_monomials(problem: Outline, m: Magnitudes) -> np.ndarray:
    """The rounding error of O by sums of monomials, for magnitudes of this size.

    Sums of monomials cancel where scores are negative, which costs a few units of rounding times e^{2B}: 0.3 to 4 were
    measured, 11 where B is small. Values are centred, so an offset of theirs costs no more than storing O does.
    """
    with np.errstate(over="ignore"):
        sums = 12 + 4 * np.exp(np.minimum(2 * m.bound, 700))
        of_scores = np.minimum(1.0, abs(problem.scale) * m.lost)
        return problem.unit * (sums * np.where(m.far, 2, 1) + 2 * m.offset) + of_scores


def moved(problem: Outline, lost: float | np.ndarray) -> np.ndarray:
    """How far O moves, in units of the range of the values, if the products <q, k> are off by `lost`.

    It is no more than the error of the scores, and never more than the whole range.
    """
    with np.errstate(over="ignore"):
        return np.minimum(1.0, abs(problem.scale) * np.asarray(lost))
