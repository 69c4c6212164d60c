"""Bounds of the scores: ``|scale <q_i, k_j - c>| <= |scale| max ||q_i|| max ||k_j - c||``.

Softmax ignores a constant that is added to a row, so keys may be centred on any c; rotations keep norms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ..kernels import _rows
from ..problem.communicator import SERIAL, Communicator
from ..problem.problem import Outline, Problem
from .values import kept_keys

# Keys of a slot that say what no centre brings the bound below.
_FEW = 64


@dataclass(slots=True)
class Scores:
    """Bounds of the scores.

    Attributes
    ----------
    plain : float
        Bound of ``|scale <q_i, k_j>|``; inf where it is past the largest number. With a family, of ``sum_ab |scale q_a
        W_t[a, b] k_b|``, the size of what is added up.
    bound : float
        B, bound of ``|scale <q_i, k_j - centre>|``, the smaller of that for centre 0 and for the mean of the keys; or
        of ``|scale q_i W_t k_j^T|``.
    centre : (H, d) array or None
        None is 0.
    q_factor, k_factor : (H,) float64 arrays
        ``scale <q, k - c> = <q_factor q, k_factor (k - c)>``. What is multiplied is of one size in every slot, the root
        of the slot's own bound. With a family, their product is scale times the largest entry.
    of_slots : (H,) float64 array
        The bound of each slot.
    how : str
        How `bound` betters `plain`.
    keys : (H,) array or None
        The largest ``||k_j - centre||`` of each slot; None with a family.
    products : float
        `plain` without the scale.
    lost : float
        What rounding has done to these products at most when q and k were projected and rotated.
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
    lost: float = 0.0

    def of_rows(self, problem: Problem) -> np.ndarray:
        """Of every row its own bound ``|scale| ||q_i|| max_j ||k_j - centre||``, (H, G, n) float64."""
        H, G, n, _, d, _ = problem.sizes
        factor = abs(problem.scale) * room(problem) * self.keys
        with np.errstate(all="ignore"):
            return _rows.norms(problem.q.reshape(H, G * n, d), factor, problem.threads).reshape(H, G, n)

    def within(self, B: float) -> Scores:
        """The same for the rows whose bound is at most B, with factors for their sizes."""
        if B >= self.bound:
            return self
        of_slots = np.minimum(self.of_slots, B)
        balance = np.sqrt(np.divide(of_slots, self.of_slots, out=np.ones_like(of_slots), where=self.of_slots > 0))
        q_factor, k_factor = self.q_factor / balance, self.k_factor * balance
        how = f"{self.how}, but for the longest queries"
        return replace(self, bound=B, q_factor=q_factor, k_factor=k_factor, of_slots=of_slots, how=how)


def unbounded(problem: Outline, plain: float, products: float = math.inf, lost: float = 0.0) -> Scores:
    """Scores of which `plain`, `products` and `lost` are all that is known, for engines that need no more."""
    slots = np.ones((3, problem.sizes.H))
    slots[2] = math.inf
    return Scores(plain, math.inf, None, *slots, products=products, lost=lost)


@dataclass(slots=True)
class Norms:
    """The largest ``||q_i||`` and ``||k_j||`` of every slot over all that hold a piece of it, (H,) float64 arrays."""

    q: np.ndarray
    k: np.ndarray


def measure_norms(problem: Problem, comm: Communicator = SERIAL) -> Norms:
    """One read of q and of kept keys. Rounding is for `room` to cover."""
    H, G, n, _, d, _ = problem.sizes
    with np.errstate(all="ignore"):
        q = comm.largest(_rows.largest_norms(problem.q.reshape(H, G * n, d), None, None, problem.threads))
        k = comm.largest(_rows.largest_norms(problem.k, problem.mask.kept, None, problem.threads))
    return Norms(q, k)


def largest_score(problem: Problem) -> float:
    """A bound of the scores by the norms of the arrays as they are here, the same as that of `plain_scores`; inf with a
    family, whose kernels ask for none.
    """
    if problem.family is not None:
        return math.inf
    product = _rows.largest_product(problem.q, problem.k, problem.mask.kept, problem.threads)
    return product * room(problem) * abs(problem.scale)


def plain_scores(problem: Problem, norms: Norms) -> Scores:
    """What norms alone say: no more than engines that need no bound ask for."""
    with np.errstate(all="ignore"):
        products = float((norms.q * norms.k).max()) * room(problem)
        plain = products * abs(problem.scale)
        if not math.isfinite(plain):
            return unbounded(problem, math.inf)
        # Keys were rotated and projected before they were centred.
        before = problem.origin.k_norm
        lost = problem.origin.q_lost * products
        lost += problem.origin.k_lost * (products if before is None else float((norms.q * before).max()))
    return unbounded(problem, plain, products, lost)


def least_bound(problem: Problem, norms: Norms) -> float:
    """What no centre of the keys brings the bound below: 0, which is always true, where keys are hidden.

    Of a few keys, some is as far from any point as the root mean square of their distances to their mean.
    """
    if problem.mask.kept is not None:
        return 0.0
    square = _rows.few_scatter(problem.k, -(-problem.sizes.n_k // _FEW))
    with np.errstate(all="ignore"):
        return abs(problem.scale) * math.sqrt(max(0.0, float((norms.q * norms.q * square).max())))


def centred_scores(problem: Problem, norms: Norms, comm: Communicator = SERIAL) -> Scores:
    """Bounds by Cauchy-Schwarz, keys being centred on their mean in each slot where that makes them shorter.

    Notes
    -----
    Time O(n_k d): two reads of k. Rounding of the norms is on the safe side.
    """
    plain = plain_scores(problem, norms)
    if not math.isfinite(plain.plain):
        return plain
    k, kept = problem.k, problem.mask.kept
    with np.errstate(all="ignore"):
        total = comm.total(_rows.columns(k, kept, problem.threads)[0])
        mean = (total / kept_keys(problem, comm)[:, None]).astype(k.dtype)
        mean_norm = comm.largest(_rows.largest_norms(k, kept, mean, problem.threads))
        # By the keys alone: gradients gain by it where queries are 0, too.
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
    """What products of two norms are to be multiplied with, so that their rounding is covered."""
    return 1 + 8 * (problem.sizes.d + 8) * problem.unit


def balancing_factors(
    scale: float, q_norm: np.ndarray, k_norm: np.ndarray, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """What q and k of each slot are multiplied by, (H,): the scale is the product of both, and queries and keys come to
    one size. Monomials of either then stay below B^(degree/2), far from overflow and underflow.
    """
    size, largest = abs(scale), 2.0 ** (np.finfo(dtype).maxexp - 8)
    with np.errstate(all="ignore"):
        if not size:
            return np.zeros(len(k_norm)), np.where(k_norm > 0, 1 / k_norm, 1.0)
        # What is 0 is of any size, so that the other comes to 1.
        q = np.where(q_norm > 0, q_norm, np.where(k_norm > 0, 1 / (size * k_norm), 1.0))
        k = np.where(k_norm > 0, k_norm, 1 / (size * q))
        q_factor = np.clip(math.sqrt(size) * np.sqrt(k) / np.sqrt(q), 1 / largest, largest)
    return np.copysign(q_factor, scale), size / q_factor
