"""Fourth moments of the scores, from an eigenvalue: what certifies rows at degrees 2 and 3.

For any matrix M, with a = x^T M x and m keys,
s^2 = a + <x x^T, y y^T - M>, hence

    sum_j s_j^4 = 2 a sum_j s_j^2 - m a^2 + sum_j <x x^T, y_j y_j^T - M>^2 <= (sum_j s_j^2)^2 / m + ||x||^4 Lambda,

where Lambda is the largest eigenvalue of the last sum over symmetric matrices. M being the mean over a longer stretch
of keys, and Lambda the sum over that stretch, it holds for the keys that come first as well: causal rows share a few
prefixes. Nothing of this is in the papers.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import numpy as np

from ..kernels import _quartic
from ..problem.problem import Outline, Problem
from .moments import chunk
from .scores import Scores

# Lanczos: steps, and the probability that its bound fails, over all slots of a call.
STEPS = 20
FAILURE = 1e-6
_SHORTEST_PREFIX = 1536  # of causal keys that have fourth moments of their own


@dataclass(slots=True)
class Fourth:
    """Sums over the first keys of a slot that stand in for fourth moments.

    Attributes
    ----------
    stops : (L,) int array
        Increasing; the last is the number of keys.
    largest : (H, L) array
        Lambda of the first `stops` keys, in units of the fourth power of the largest: with B_i in the place of ||x||.
    seed : int
        Of the coins behind it.
    """

    stops: np.ndarray
    largest: np.ndarray
    seed: int

    def of_rows(self, far: np.ndarray) -> np.ndarray:
        """Lambda for rows that see the first `far` keys (n,) by polynomial: (H, n)."""
        return self.largest[:, np.searchsorted(self.stops, far)]


def prefixes(problem: Outline) -> np.ndarray:
    """How many keys have fourth moments together: all, and, causal, halves of halves too."""
    size = chunk(problem)
    stops = [problem.sizes.n_k]
    while problem.mask.causal and stops[-1] > 2 * _SHORTEST_PREFIX:
        stops.append(-(-stops[-1] // (2 * size)) * size)
    return np.array(stops[::-1])


def fourth_moments(problem: Problem, scores: Scores, seed: int | None) -> Fourth:
    """Lambda >= the sum over j of <X, y_j y_j^T - mean>^2, for all symmetric X of norm 1, of each stretch of keys.

    Notes
    -----
    20 steps of Lanczos for X -> sum_j (y_j^T X y_j - mean) y_j y_j^T on symmetric matrices from a Gaussian start. Its
    largest Ritz value theta has theta >= (1 - e) Lambda for all data but with probability 1.648 sqrt(N)
    exp(-sqrt(e) (2 k - 1)) over its own coins, N = d (d + 1) / 2 (Kuczynski and Wozniakowski 1992): e is where that is
    1e-6, shared by the slots and stretches. Time 40 n_k d^2 in products of matrices, twice that where causal; memory
    2 n_k d.
    """
    if seed is None:
        seed = secrets.randbits(63)
    rng = np.random.default_rng(seed)
    H, _, d = problem.k.shape
    stops = prefixes(problem)
    rows = _quartic.Rows(problem.k, problem.mask.kept, scores.centre, scores.k_factor, problem.threads)
    steps = min(STEPS, d * (d + 1) // 2)
    theta = _largest_variance(rows, stops, problem.mask.kept_before(stops, problem.sizes.H), steps, rng)
    # More steps than dimensions change nothing, so the statement for STEPS holds for fewer too.
    room = math.log(1.648 * math.sqrt(d * (d + 1) / 2) * theta.size / FAILURE) / (2 * STEPS - 1)
    size = (scores.keys * abs(scores.k_factor))[:, None] ** 4
    largest = np.divide(theta / (1 - room * room), size, out=np.zeros_like(theta), where=size > 0)
    # Products are in the data's precision.
    return Fourth(stops, largest + 64 * float(np.finfo(problem.k.dtype).eps) * stops, seed)


def _largest_variance(rows: _quartic.Rows, stops: np.ndarray, kept: np.ndarray, steps: int, rng) -> np.ndarray:
    """The largest Ritz values after `steps` steps of Lanczos, every vector made orthogonal to all before it: (H, L)."""
    products = rows.apply(stops, None)[0]
    H, L, d, _ = products.shape
    # With einsum: products of BLAS leave threads behind that spin.
    start = rng.standard_normal((H, L, d, d))
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
        # A space that is exhausted goes on with 0.
        norm[norm <= 1e-14 * np.abs(T[..., 0, 0])] = 0
        if k + 1 < steps:
            T[..., k, k + 1] = T[..., k + 1, k] = norm
            image += image.swapaxes(2, 3)
            X = 0.5 * np.divide(image, norm[..., None, None], out=np.zeros_like(image), where=norm[..., None, None] > 0)
    return np.maximum(np.linalg.eigvalsh(T)[..., -1], 0)
