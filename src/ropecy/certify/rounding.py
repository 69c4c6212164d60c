"""What rounding costs: models of its size for sums over keys, exact and by monomials, measured and not proved."""

from __future__ import annotations

import math

import numpy as np

from ..problem.communicator import SERIAL, Communicator
from ..problem.problem import Outline
from .scores import Scores
from .values import Values

# Keys that the exact engine adds up in the dtype it computes in, in blocks, before float64 takes over.
_STRETCH = 1536


def exact_rounding(problem: Outline, scores: Scores, values: Values, comm: Communicator = SERIAL) -> float:
    """What rounding costs the exact engine at most, in units of max_c range_j(v_jc).

    Three things add up.

    * Sums over keys (`sums_rounding`).
    * Scores. Those of size S carry ``(2 + sqrt(d) / 2) S`` units; biases two units of their size, which counts from
      the largest bias (`bias_reach`). Weights that are off by that move O by as much of the range, and never by more
      than the range: O stays between the least and the largest of the values.
    * Storing O, which may lie far from 0.
    """
    unit = problem.unit
    d, n_k = problem.sizes.d, sum(comm.gather(problem.sizes.n_k))
    scale, size = _scale(problem), score_size(problem, scores)
    off = unit * _of_scores(d) * size + (scale * scores.lost if scale else 0.0)
    if problem.bias is not None:
        off += 2 * unit * bias_reach(problem, size)
    sums = sums_rounding(problem.dtype, n_k, _STRETCH if problem.family is None else 1)
    return sums * max(1.0, values.residual) + min(1.0, off) + unit * values.offset


def sums_rounding(dtype: np.dtype, n_k: int, stretch: int = _STRETCH) -> float:
    """What rounding costs sums over n_k keys, in units of the largest value.

    In a block of 96 keys equal terms are all rounded to the same side, by half of a unit a key; sums over blocks grow
    with the square root of their number. The sums of so many keys, a `stretch`, are added up in float64, where equal
    ones are again rounded to the same side.
    """
    unit = float(np.finfo(dtype).eps) / 2
    return unit * (8 + min(40.0, n_k / 2) + math.sqrt(n_k / 96)) + 2.0**-54 * n_k / stretch


def _of_scores(d: int) -> float:
    """What rounding costs a sum of d products, in units of the norms of its factors."""
    return 2 + math.sqrt(d) / 2


def most_of_norms(dtype: np.dtype, n_k: int, d: int, eps: float) -> float:
    """The largest score, by the norms of queries and keys, of which the rounding leaves exact work within eps, n_k keys
    with values near 0 being added up.
    """
    return (eps - sums_rounding(dtype, n_k)) / (_of_scores(d) * float(np.finfo(dtype).eps) / 2)


def score_size(problem: Outline, scores: Scores) -> float:
    """A bound of the scores without a bias, those of the near field too."""
    scale = _scale(problem)
    return scale * scores.products if scale else 0.0


def _scale(problem: Outline) -> float:
    """The larger one of the scale and that of the near field."""
    return abs(problem.scale) if problem.near is None else max(abs(problem.scale), abs(problem.near[1]))


def seen_bias(problem: Outline) -> np.ndarray:
    """The bias at the offsets that the band allows, (H or 1, G or 1, _); one of -inf where it allows none."""
    seen = problem.bias[..., problem.mask.seen_symbol]
    return seen if seen.shape[-1] else np.full((*problem.bias.shape[:2], 1), -np.inf)


def bias_reach(problem: Outline, size: float) -> float:
    """How far below the largest bias those of the keys are that count in a row, scores being within `size`.

    At most all the way. And at most what the best key of a row is below it, and the mean over a row's weights P below
    that: P maximises ``sum_j P_j (s_j + b_j) + entropy(P)``, so this is at most ``2 size + log n_k``.
    """
    where = problem.mask.seen_symbol
    seen = problem.bias[..., where]
    if not seen.shape[-1]:
        return 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        top = seen.max(axis=-1, keepdims=True)
        depth = top - seen
        reach = float(depth.max())
        near = 2 * size + math.log(max(problem.sizes.n_k, 1))
        if reach <= near or problem.origin.hidden:
            return reach
        beside = where.start, problem.bias.shape[-1] - where.stop
        depth = np.pad(depth, ((0, 0), (0, 0), beside), constant_values=np.inf)
        best = _best(problem, depth)
    best = float(best[np.isfinite(best)].max(initial=0))
    return min(reach, best + near)


def _best(problem: Outline, depth: np.ndarray) -> np.ndarray:
    """The least of depth (H or 1, G or 1, n + n_k - 1), by offset, over the keys that a row sees, (_, _, n); inf where
    that is none. With a key_mask that of the kept key next to the row, which is no less.
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
    """What rounding costs the polynomial engine, in units of max_c range_j(v_jc), for scores within B.

    Monomial sums cancel for negative scores: a few units times e^{2B}, measured (0.3 to 4, 11 where B is small).
    Values are centred, so that their offset costs no more than storing O does. `lost` is `Scores.lost`: scores that are
    off by so much times the scale move O by as much of the range, and never by more than the range.
    """
    unit = problem.unit
    sums = 12 + 4 * math.exp(min(2 * B, 700))
    return unit * (sums * (2 if values.far else 1) + 2 * values.offset) + moved(problem, lost)


def moved(problem: Outline, lost: float) -> float:
    """How far scores whose products are off by `lost` move O, in units of the range."""
    return min(1.0, abs(problem.scale) * lost) if lost else 0.0


