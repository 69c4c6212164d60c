"""Bounds of the scores: ``|scale <q_i, k_j - c>| <= |scale| max ||q_i|| max ||k_j - c||``.

Softmax does not change when a constant is added to all scores of a row, so keys may be centred on any c. Rotations do
not change norms, so the bounds hold with and without them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ..kernels import _rows
from ..problem.communicator import SERIAL, Communicator
from ..problem.problem import Outline, Problem, Slots
from .values import kept_keys

_FEW = 64  # how many keys of a slot `least_bound` looks at


@dataclass(slots=True)
class Scores:
    """Bounds of the scores of a problem, and the factors that bring queries and keys to one size.

    Attributes
    ----------
    plain : float
        A bound of ``|scale <q_i, k_j>|``; inf if it overflows. With a family it bounds ``sum_ab |scale q_a W_t[a, b]
        k_b|``, the sum of the sizes of all terms of a score.
    bound : float
        B, a bound of ``|scale <q_i, k_j - centre>|``, or with a family of ``|scale q_i W_t k_j^T|``.
    centre : (H, d) array or None
        What is subtracted from the keys of each slot: their mean where that lowers the bound, else 0; None is 0 in all.
    q_factor, k_factor : (H,) float64 arrays
        ``scale <q, k - c> = <q_factor q, k_factor (k - c)>``, where the longest query and the longest key of a slot
        have the same norm, the square root of the slot's bound. With a family the product of both factors is the scale
        times the largest entry of W.
    of_slots : (H,) float64 array
        The bound of each slot.
    how : str
        Why `bound` is smaller than `plain`, in words.
    keys : (H,) array or None
        The largest ``||k_j - centre||`` of each slot; None with a family.
    products : float
        `plain` without the scale.
    products_of_slots : (H,) float64 array or float
        `products` of each slot.
    plain_of_slots : (H,) float64 array or float
        `plain` of each slot.
    lost_of_slots : (H,) float64 array or float
        A bound of the rounding error that the products <q_i, k_j> of each slot have from the projections and rotations
        of q and k.
    """

    plain: float
    bound: float
    centre: np.ndarray | None
    q_factor: np.ndarray
    k_factor: np.ndarray
    of_slots: np.ndarray
    how: str = "with keys centred"
    keys: np.ndarray | None = None
    products: float = math.inf
    products_of_slots: np.ndarray | float = math.inf
    plain_of_slots: np.ndarray | float = math.inf
    lost_of_slots: np.ndarray | float = 0.0

    @property
    def lost(self) -> float:
        """The largest of `lost_of_slots`."""
        return float(np.max(self.lost_of_slots))

    def of_rows(self, problem: Problem) -> np.ndarray:
        """The bound B_i of each row's scores, ``|scale| ||q_i|| max_j ||k_j - centre||``, (H, G, n) float64."""
        H, G, n, _, d, _ = problem.sizes
        factor = abs(problem.scale) * room(problem) * self.keys
        with np.errstate(all="ignore"):
            return _rows.norms(problem.q.reshape(H, G * n, d), factor, problem.threads).reshape(H, G, n)

    def slots(self, which: Slots, plain: Scores) -> Scores:
        """The bounds and factors of some of the slots, whose bounds by norms alone are `plain`."""
        of_slots = self.of_slots[which]
        return replace(
            plain,
            bound=float(of_slots.max()),
            centre=None if self.centre is None else self.centre[which],
            q_factor=self.q_factor[which],
            k_factor=self.k_factor[which],
            of_slots=of_slots,
            how=self.how,
            keys=None if self.keys is None else self.keys[which],
        )

    def within(self, B: float | np.ndarray) -> Scores:
        """The bounds and factors for rows whose own bound is at most B, which is one for all slots or one for each."""
        if np.all(B >= self.of_slots):
            return self
        of_slots = np.minimum(self.of_slots, B)
        ratio = np.divide(of_slots, self.of_slots, out=np.ones_like(of_slots), where=self.of_slots > 0)
        # Where the rest have no scores but 0, or next to it, they are the same by any factors.
        balance = np.sqrt(np.where(ratio > 0, ratio, 1))
        q_factor, k_factor = self.q_factor / balance, self.k_factor * balance
        how = f"{self.how}, but for the longest queries"
        factors = {"q_factor": q_factor, "k_factor": k_factor}
        return replace(self, bound=float(of_slots.max()), of_slots=of_slots, how=how, **factors)


def unbounded(problem: Outline, plain: float, products: float = math.inf, lost: np.ndarray | float = 0.0) -> Scores:
    """Scores of which only `plain`, `products` and `lost` are known: enough for engines that need no `bound`."""
    slots = np.ones((3, problem.sizes.H))
    slots[2] = math.inf
    return Scores(plain, math.inf, None, *slots, products=products, lost_of_slots=lost)


@dataclass(slots=True)
class Norms:
    """The largest ``||q_i||`` and the largest ``||k_j||`` of every slot, over all ranks: (H,) float64 arrays."""

    q: np.ndarray
    k: np.ndarray

    def slots(self, which: Slots) -> Norms:
        """The norms of some of the slots."""
        return Norms(self.q[which], self.k[which])


def measure_norms(problem: Problem, comm: Communicator = SERIAL) -> Norms:
    """The norms of queries and kept keys, by one read of both. They are as computed: `room` covers their rounding."""
    with np.errstate(all="ignore"):
        q = comm.largest(query_norms(problem))
        k = comm.largest(_rows.largest_norms(problem.k, problem.mask.kept, None, problem.threads))
    return Norms(q, k)


def largest_scores(problem: Problem) -> np.ndarray:
    """Bounds of the scores of each slot, (H,), by the norms of queries and keys, as in `plain_scores`."""
    factor = room(problem) * abs(problem.scale)
    return _rows.largest_products(problem.q, problem.k, problem.mask.kept, factor, problem.threads)


def plain_scores(problem: Problem, norms: Norms) -> Scores:
    """The bound of the scores by norms alone, `Scores.plain`; `Scores.bound` is inf."""
    with np.errstate(all="ignore"):
        of_slots = norms.q * norms.k * room(problem)
        products = float(of_slots.max())
        plain = products * abs(problem.scale)
        if not math.isfinite(plain):
            return unbounded(problem, math.inf)
        # Keys were projected and rotated before they were centred, so their error is relative to their norms before.
        origin = problem.origin
        q, k = norms.q if origin.q_norm is None else origin.q_norm, norms.k if origin.k_norm is None else origin.k_norm
        lost = (origin.q_lost * (q * norms.k) + origin.k_lost * (norms.q * k)) * room(problem)
    found = unbounded(problem, plain, products, lost)
    return replace(found, products_of_slots=of_slots, plain_of_slots=of_slots * abs(problem.scale))


def query_norms(problem: Problem) -> np.ndarray:
    """The largest norm of a query of each slot, (H,) float64, for one process that holds all queries."""
    H, G, n, _, d, _ = problem.sizes
    return _rows.largest_norms(problem.q.reshape(H, G * n, d), None, None, problem.threads)


def least_bounds(problem: Problem, q_norms: np.ndarray) -> np.ndarray:
    """Numbers, (H,), that the bounds of the slots' scores exceed, whatever the centres of their keys; 0 if keys are
    hidden.

    Whatever the centre, at least one of a few keys is as far from it as the root mean square of their distances from
    their mean.
    """
    if problem.mask.kept is not None:
        return np.zeros(problem.sizes.H)
    square = _rows.few_scatter(problem.k, -(-problem.sizes.n_k // _FEW))
    with np.errstate(all="ignore"):
        return abs(problem.scale) * np.sqrt(np.maximum(0.0, q_norms * q_norms * square))


def centred_scores(problem: Problem, norms: Norms, comm: Communicator = SERIAL) -> Scores:
    """Bounds of the scores by Cauchy-Schwarz; the keys of a slot are centred on their mean if that shortens them.

    Notes
    -----
    Time O(n_k d), for two reads of k. The bounds include the rounding of the norms.
    """
    plain = plain_scores(problem, norms)
    if not math.isfinite(plain.plain):
        return plain
    k, kept = problem.k, problem.mask.kept
    with np.errstate(all="ignore"):
        total = comm.total(_rows.columns(k, kept, problem.threads)[0])
        mean = (total / kept_keys(problem, comm)[:, None]).astype(k.dtype)
        mean_norm = comm.largest(_rows.largest_norms(k, kept, mean, problem.threads))
        # This is decided by the keys alone, because gradients gain by shorter keys even where all queries are 0.
        nearer = mean_norm < norms.k
        keys = np.where(nearer, mean_norm, norms.k)
        of_slots = norms.q * keys * abs(problem.scale) * room(problem)
    q_factor, k_factor = balancing_factors(problem.scale, norms.q, keys, k.dtype)
    return replace(
        plain,
        bound=float(of_slots.max()),
        centre=np.where(nearer[:, None], mean, k.dtype.type(0)) if nearer.any() else None,
        q_factor=q_factor,
        k_factor=k_factor,
        of_slots=of_slots,
        keys=keys,
    )


def room(problem: Outline) -> float:
    """The factor, slightly above 1, by which a product of two computed norms is a bound in spite of their rounding."""
    return 1 + 8 * (problem.sizes.d + 8) * problem.unit


def balancing_factors(
    scale: float, q_norm: np.ndarray, k_norm: np.ndarray, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The factors of q and of k in each slot, (H,) each, whose product is the scale.

    After them the longest query and the longest key have the same norm, so that the monomials of both stay below
    B^(degree/2), far from overflow and underflow.
    """
    size, largest = abs(scale), 2.0 ** (np.finfo(dtype).maxexp - 8)
    with np.errstate(all="ignore"):
        if not size:
            return np.zeros(len(k_norm)), np.where(k_norm > 0, 1 / k_norm, 1.0)
        # If one of both is 0, its size does not matter: it is chosen so that the other comes to norm 1.
        q = np.where(q_norm > 0, q_norm, np.where(k_norm > 0, 1 / (size * k_norm), 1.0))
        k = np.where(k_norm > 0, k_norm, 1 / (size * q))
        q_factor = np.clip(math.sqrt(size) * np.sqrt(k) / np.sqrt(q), 1 / largest, largest)
    return np.copysign(q_factor, scale), size / q_factor
