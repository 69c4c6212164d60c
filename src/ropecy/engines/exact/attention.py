"""Exact attention of any problem, with the kernels for its kind of scores: forward, resume and backward."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType

import numpy as np

from ...kernels import _rows
from ...problem.input_gradients import InputGradients
from ...problem.problem import Outline, Problem
from ..merge import share
from . import family, streaming

Saved = streaming.Saved | family.Saved

_LEAST = -64  # of the exponent that the gradient by a near scale leaves to the scale


def _kernels(problem: Outline) -> ModuleType:
    return streaming if problem.family is None else family


def forward(problem: Problem, bound: float | np.ndarray, want_lse: bool) -> tuple[np.ndarray, np.ndarray | None, Saved]:
    """O (H, G, n, d_v), lse float64 (H, G, n) or None, and what backward needs.

    `bound` is a bound of the scores without their bias, one or one a slot, or inf. Where it is small, kernels keep no
    running maximum.
    """
    return _kernels(problem).forward(problem, bound, want_lse)


def resume(problem: Problem, bound: float, o: np.ndarray, lse: np.ndarray) -> Saved:
    """What `backward` needs of a forward pass that had more keys than `problem`, of which o and lse are the results."""
    return _kernels(problem).resume(problem, bound, o, lse)


def backward(problem: Problem, saved: Saved, do: np.ndarray) -> InputGradients:
    """The gradients of ``<do, O>``, without that of the near field's scale."""
    return _kernels(problem).backward(problem, saved, do)


def of_one_scale(problem: Problem) -> Problem:
    """The problem with `scale_near` as its only scale, if that is one number and the whole band is near."""
    mask, near = problem.mask, problem.near
    if near is None or near.by_head or max(-mask.lo, mask.hi) >= near.width:
        return problem
    return replace(problem, scale=near.scale, near=None)


def near_scale_gradient(problem: Problem, o: np.ndarray, lse: np.ndarray, do: np.ndarray) -> np.ndarray:
    """d<do, O> / d scale_near of each slot and query head, (H, G) float64, from any engine's o and lse: the sum of
    dS_ij <q_i, k_j> over the pairs of the near field.

    Notes
    -----
    sum_i <q_i, sum_j dS_ij k_j>: the near field's own backward pass, in time ``n (2 w - 1)`` pairs.
    """
    width, scale_near = problem.near
    mask = problem.mask.within(1 - width, width - 1)
    # q is multiplied by scale_near but for a power of two, which is the scale. So dq is the sum over keys that is
    # wanted here, even where scale_near is 0. That power is not so small that dq vanishes beside that of other heads.
    exponent = np.maximum(np.frexp(scale_near)[1], _LEAST)
    q = problem.q * np.asarray(np.ldexp(scale_near, -exponent), problem.dtype)[..., None, None]
    near = problem.near._replace(scale=np.ldexp(1.0, exponent))
    band = of_one_scale(replace(problem, q=q, near=near, mask=mask))
    if mask.lo > mask.hi or band.empty:
        return np.zeros(problem.sizes[:2])
    # Weights are computed with the sums of the band itself. Computed from lse, those of huge scores might overflow by
    # rounding alone.
    _, own, saved = forward(band, math.inf, True)
    with np.errstate(over="ignore"):
        inverse = (saved.inverse * np.minimum(share(own, lse), 1)).astype(o.dtype)
    # What the float64 sum below can hold, dq may not: gradients are linear in do.
    sizes = (math.frexp(_rows.largest(X))[1] for X in (band.k, band.v, do))
    size = sum(sizes) + max(0, int(np.max(exponent))) + band.sizes.d_v.bit_length() + 2
    power = max(0, size - np.finfo(do.dtype).maxexp)
    dq = backward(band, replace(saved, o=o, inverse=inverse), np.ldexp(do, -power) if power else do).dq
    with np.errstate(over="ignore"):
        return np.ldexp(np.einsum("hgid,hgid->hg", problem.q, dq, dtype=np.float64), power - exponent)
