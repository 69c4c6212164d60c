"""Fourth moments of the scores, from an eigenvalue: what certifies rows at degrees 2 and 3.

For any matrix M, with a = x^T M x and m keys,
s^2 = a + <x x^T, y y^T - M>, hence

    sum_j s_j^4 = 2 a sum_j s_j^2 - m a^2 + sum_j <x x^T, y_j y_j^T - M>^2 <= (sum_j s_j^2)^2 / m + ||x||^4 Lambda,

where x is a scaled query, y_j are scaled keys and s_j = <x, y_j> their scores. Lambda is the largest eigenvalue of the
quadratic form X -> sum_j <X, y_j y_j^T - M>^2 over symmetric matrices X. Where M is the mean and Lambda the largest
eigenvalue for a longer run of keys, the bound also holds for the first m keys of that run. So a few prefixes of the
keys serve all rows of a causal problem.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, replace

import numpy as np

from ..kernels import _quartic
from ..problem.problem import Outline, Problem, Slots
from .moments import chunk
from .scores import Scores

STEPS = 20  # of the Lanczos iteration
FAILURE = 1e-6  # the probability that a bound from it does not hold, for all slots and prefixes of a call together
_SHORTEST_PREFIX = 1536  # of causal keys that have fourth moments of their own


@dataclass(slots=True)
class Fourth:
    """Bounds of the fourth moments of the scores: Lambda for a few prefixes of the keys of each slot.

    Attributes
    ----------
    stops : (L,) int array
        How many keys each prefix has, increasing; the last is the number of all keys.
    largest : (H, L) array
        Lambda of each prefix, divided by the fourth power of the norm of the longest key. Multiplied by B_i^4, the
        bound of a row's scores, it takes the place of ``||x||^4 Lambda``.
    seed : int
        The seed of the random start of the Lanczos iteration.
    """

    stops: np.ndarray
    largest: np.ndarray
    seed: int

    def slots(self, which: Slots) -> Fourth:
        """Those of some of the slots."""
        return replace(self, largest=self.largest[which])

    def of_rows(self, far: np.ndarray) -> np.ndarray:
        """`largest` for rows whose first `far` keys, (n,), are seen through the polynomial: (H, n)."""
        return self.largest[:, np.searchsorted(self.stops, far)]


def prefixes(problem: Outline) -> np.ndarray:
    """How many keys each prefix has that gets a Lambda: all keys, and, if causal, also about a half, a quarter, ..."""
    size = chunk(problem)
    stops = [problem.sizes.n_k]
    while problem.mask.causal and stops[-1] > 2 * _SHORTEST_PREFIX:
        stops.append(-(-stops[-1] // (2 * size)) * size)
    return np.array(stops[::-1])


def fourth_moments(problem: Problem, scores: Scores, seed: int | None) -> Fourth:
    """A bound Lambda of ``sum_j <X, y_j y_j^T - mean>^2`` over all symmetric X of norm 1, for each slot and prefix.

    Notes
    -----
    It takes 20 steps of the Lanczos iteration for X -> sum_j (y_j^T X y_j - mean) y_j y_j^T on symmetric matrices, from
    a Gaussian start. Whatever the data, the largest Ritz value theta after k steps satisfies theta >= (1 - e) Lambda
    except with probability 1.648 sqrt(N) exp(-sqrt(e) (2 k - 1)) over the random start, where N = d (d + 1) / 2
    (Kuczynski and Wozniakowski 1992). Here e is chosen so that this probability, added up over all slots and prefixes,
    is `FAILURE`. Time 40 n_k d^2 in products of matrices, twice that in a causal problem; memory 2 n_k d.
    """
    if seed is None:
        seed = secrets.randbits(62)
    H, _, d = problem.k.shape
    stops = prefixes(problem)
    rows = _quartic.Rows(problem.k, problem.mask.kept, scores.centre, scores.k_factor, problem.threads)
    steps = min(STEPS, d * (d + 1) // 2)
    # Each slot has a start of its own, whatever slots are beside it.
    draws = (np.random.default_rng([seed, number]) for number in problem.numbers.tolist())
    start = np.array([rng.standard_normal((len(stops), d, d)) for rng in draws])
    theta = _largest_variance(rows, stops, problem.mask.kept_before(stops, H), steps, start)
    every = (problem.origin.alike or H) * len(stops)
    # After as many steps as there are dimensions further ones change nothing, so fewer steps than STEPS are as good.
    room = math.log(1.648 * math.sqrt(d * (d + 1) / 2) * every / FAILURE) / (2 * STEPS - 1)
    size = (scores.keys * abs(scores.k_factor))[:, None] ** 4
    largest = np.divide(theta / (1 - room * room), size, out=np.zeros_like(theta), where=size > 0)
    # The products were computed in the precision of the data, so their rounding is added.
    return Fourth(stops, largest + 64 * float(np.finfo(problem.k.dtype).eps) * stops, seed)


def _largest_variance(
    rows: _quartic.Rows, stops: np.ndarray, kept: np.ndarray, steps: int, start: np.ndarray
) -> np.ndarray:
    """The largest Ritz values, (H, L), after `steps` steps of Lanczos with full reorthogonalisation from `start`."""
    products = rows.apply(stops, None)[0]
    H, L, d, _ = products.shape
    # Sums are written with einsum, because BLAS would start threads of its own that keep spinning afterwards.
    X = start + start.swapaxes(2, 3)  # Gaussian in an orthonormal basis of symmetric matrices
    X /= np.linalg.norm(X, axis=(2, 3), keepdims=True)
    basis, T = np.empty((steps, H, L, d, d)), np.zeros((H, L, steps, steps))
    for k in range(steps):
        basis[k] = X
        image, total = rows.apply(stops, X)
        image -= (total / np.maximum(kept, 1))[..., None, None] * products
        T[..., k, k] = np.einsum("hlab,hlab->hl", image, X)
        for _ in range(2):
            part = np.einsum("khlab,hlab->khl", basis[: k + 1], image)
            image -= np.einsum("khl,khlab->hlab", part, basis[: k + 1])
        norm = np.sqrt(np.einsum("hlab,hlab->hl", image, image))
        # Where the Krylov space is exhausted what is left is rounding: all further vectors are 0.
        norm[norm <= 1e-14 * np.abs(T[..., 0, 0])] = 0
        if k + 1 < steps:
            T[..., k, k + 1] = T[..., k + 1, k] = norm
            image += image.swapaxes(2, 3)
            X = 0.5 * np.divide(image, norm[..., None, None], out=np.zeros_like(image), where=norm[..., None, None] > 0)
    return np.maximum(np.linalg.eigvalsh(T)[..., -1], 0)
