"""Sums of exponentials, f(m) ~ sum_k w_k exp(-r_k m) with w_k >= 0, and their largest relative error.

A bias b_t enters attention by the factor exp(b_t). Written as such a sum, with m = |t|, it becomes a sum of decays,
each of which a running state can follow.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_TERMS = (2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24)  # numbers of terms that are tried
_SAMPLES = 400  # the largest number of distances at which weights are fitted
_BLOCK = 1 << 16  # the number of distances that are checked at a time


def fit(
    log_f: Callable[[np.ndarray], np.ndarray], first: int, last: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """log w_k, r_k and the error max_m |sum_k w_k exp(-r_k m) / f(m) - 1|, with the fewest terms that are tried.

    Parameters
    ----------
    log_f : callable
        It returns log f at an array of distances. If f is completely monotone, such sums come near it.
    first, last : int
        The least and the largest distance m. The error is computed at every integer from first to last.
    tolerance : float
        The largest relative error allowed.

    Returns
    -------
    (array, array, float) or None
        log w_k, r_k and the error; None where no number of terms that is tried keeps it within the tolerance.

    Notes
    -----
    The rates are evenly spaced on a logarithmic scale. The weights minimise, by non-negative least squares, the
    relative errors at distances that are evenly spaced on a logarithmic scale too. Computing the error takes time
    O(last).
    """
    m = np.unique(np.round(np.geomspace(max(first, 1), last, _SAMPLES)))
    base = log_f(np.array([float(first)]))[0]
    growth = log_f(m) - base
    for terms in _TERMS:
        for highest in (1.0, 2.0, 4.0, 8.0):
            rates = np.append(0.0, np.geomspace(0.1 / last, max(highest / first, 0.2 / last), terms - 1))
            # Each column is scaled to be 1 at the first distance.
            columns = np.exp(np.minimum(-np.outer(m - first, rates) - growth[:, None], 600))
            weights = non_negative(columns, np.ones(len(m)))
            kept = weights > 0
            if not kept.any() or np.abs(columns @ weights - 1).max() > tolerance:
                continue
            log_w, r = np.log(weights[kept]) + base + rates[kept] * first, rates[kept]
            error = _largest_error(log_f, first, last, log_w, r)
            if error <= tolerance:
                return log_w, r, error
    return None


def _largest_error(
    log_f: Callable[[np.ndarray], np.ndarray], first: int, last: int, log_w: np.ndarray, r: np.ndarray
) -> float:
    """max |sum_k w_k exp(-r_k m) / f(m) - 1| over all integers m from first to last."""
    worst = 0.0
    for start in range(first, last + 1, _BLOCK):
        m = np.arange(start, min(last + 1, start + _BLOCK), dtype=np.float64)
        values = np.exp(log_w - np.outer(m, r) - log_f(m)[:, None]).sum(axis=1)
        worst = max(worst, float(np.abs(values - 1).max()))
    return worst


def non_negative(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """argmin ||A x - b||_2 over x >= 0, by the active set method of Lawson and Hanson (1974)."""
    # All columns are scaled to norm 1, so that the choice of the next column does not depend on their scale.
    size = np.linalg.norm(A, axis=0)
    A = A / size
    x = np.zeros(A.shape[1])
    active = np.zeros(A.shape[1], bool)
    for _ in range(3 * A.shape[1]):
        gain = np.where(active, -np.inf, A.T @ (b - A @ x))
        if gain.max() <= 1e-12 * np.linalg.norm(b):
            break
        active[gain.argmax()] = True
        while True:
            trial = np.zeros_like(x)
            trial[active] = np.linalg.lstsq(A[:, active], b, rcond=None)[0]
            negative = active & (trial <= 0)
            if not negative.any():
                break
            step = np.min(x[negative] / (x[negative] - trial[negative]))
            x += step * (trial - x)
            active &= x > 1e-15 * x.max(initial=0)
            x[~active] = 0
            if not active.any():
                break
        x = trial
    return x / size
