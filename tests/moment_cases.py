"""Problems for certificates by moments, the certificates of their rows, and their errors in plain NumPy."""

import numpy as np
from inside import measure, measure_values

from ropecy.approximation import minimax as poly
from ropecy.approximation import moment_fit
from ropecy.certify import fourth_moments, moments
from ropecy.engines.polynomial import features
from ropecy.problem.mask import Mask
from ropecy.problem.problem import Problem

CHUNK = 96  # of causal scans where d is at most 8: pairs inside one are exact


def problem_of(q, k, v, causal=False, mask=None, q_offset=0, scale=1.0):
    """q (H, G, n, d), k (H, n_k, d), v (H, n_k, d_v); what mask hides is 0, as engines are promised."""
    if mask is not None:
        k, v = np.where(mask[..., None], k, 0), np.where(mask[..., None], v, 0)
    seen = Mask(q.shape[2], k.shape[1], None, 0 if causal else None, q_offset, mask)
    return Problem(q=q, k=k, v=v, scale=scale, mask=seen)


def by_moments(problem, degree, kappa=0.0, scores=None):
    """O, the certificate of its rows, and what they are made of; None where no row has a polynomial. Every row has that
    of its own size; kappa is in units of B_i.
    """
    scores, values = scores or measure(problem), measure_values(problem)
    B = poly.B_grid(scores.bound)
    p = moment_fit.fit_moments(B, degree, kappa / B**2)
    if p is None:
        return None
    fourth = fourth_moments.fourth_moments(problem, scores, seed=5) if kappa else None
    rule = moments.MomentRule((p,), kappa, scores, fourth)
    fits = rule.fits(problem)
    judged = features.Judged(moments.value_distances(problem, values), fits.ratio((p,), problem.dtype))
    o, _, saved = features.forward(problem, features.Expansion(scores, values, p), False, judged=judged)
    return o, rule.truncation(problem, fits, saved), saved, rule


def as_they_are(problem):
    """Bounds without centring, where scores are at most 1."""
    scores = measure(problem)
    assert scores.plain < 1.0001
    scores.bound, scores.centre = 1.0, None
    scores.q_factor = scores.k_factor = scores.keys = scores.of_slots = np.ones(1)
    return scores


def seen_by_rows(problem):
    """Which rows see which keys, (H, 1, n, n_k)."""
    n, n_k = problem.q.shape[2], problem.k.shape[1]
    seen = np.ones((n, n_k), bool)
    if problem.mask.causal:
        seen = np.arange(n_k) <= np.arange(n)[:, None] + problem.mask.offset
    seen = np.broadcast_to(seen, (len(problem.k), 1, n, n_k))
    return seen if problem.mask.kept is None else seen & problem.mask.kept[:, None, None, :]


def row_errors(problem, o, by_column=False):
    """max_c |O - Attn| / range of the values that the row sees, (H, G, n), plain NumPy.

    Or, by column, |O - Attn| and these ranges, (H, G, n, d_v), and the largest range over all keys that are kept, or
    max |v| where all are equal.
    """
    H, G, n, _ = problem.q.shape
    n_k = problem.k.shape[1]
    q, k, v = (x.astype(np.longdouble) for x in (problem.q, problem.k, problem.v))
    seen = seen_by_rows(problem)
    s = np.where(seen, problem.scale * q @ k[:, None].swapaxes(-1, -2), -np.inf)
    w = np.exp(s - np.maximum(s.max(axis=-1, keepdims=True), -1e300))
    total = w.sum(axis=-1, keepdims=True)
    exact = np.divide(w, total, out=np.zeros_like(w), where=total > 0) @ v[:, None]
    every = np.where(seen[..., None], v[:, None, None], np.nan)
    with np.errstate(all="ignore"):
        spread = np.nanmax(every, axis=-2, initial=-np.inf) - np.nanmin(every, axis=-2, initial=np.inf)
        error = np.abs(o - exact)
        if by_column:
            kept = np.ones((H, n_k), bool) if problem.mask.kept is None else problem.mask.kept
            kept = np.where(kept[..., None], v, np.nan)
            whole = np.nanmax(kept, axis=1, initial=-np.inf) - np.nanmin(kept, axis=1, initial=np.inf)
            return error, np.maximum(spread, 0), max(whole.max(), 0) or np.abs(v).max()
        error = np.where(spread > 0, error / spread, 0)
    return error.max(axis=-1)


DATA = ("gauss", "one direction", "two clusters", "all negative", "heavy tails", "signs", "one far key")


def adversarial(kind, rng, shape, size):
    """Queries and keys of the kind, scores up to about `size`."""
    H, G, n, n_k, d = shape
    q, k = rng.standard_normal((H, G, n, d)), rng.standard_normal((H, n_k, d))
    axis = rng.standard_normal(d)
    if kind == "one direction":
        k = rng.standard_normal((H, n_k, 1)) * axis
        q = rng.choice([-1.0, 1.0], (H, G, n, 1)) * axis
    elif kind == "two clusters":
        k = rng.choice([-1.0, 1.0], (H, n_k, 1), p=[0.1, 0.9]) * axis + 0.01 * k
    elif kind == "all negative":
        q, k = axis + 0.01 * q, -axis + 0.01 * k
    elif kind == "heavy tails":
        k = rng.standard_t(2, (H, n_k, d))
    elif kind == "signs":
        q, k = np.sign(q), np.sign(k)
    elif kind == "one far key":
        k *= 0.01
        k[:, 0] = -axis
        q = axis + 0.1 * q
    largest = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
    return q * (size / max(largest, 1e-30)), k


def values_for(kind, rng, q, k, size):
    """Values (H, n_k, 2) that go with scores as errors do, or not."""
    H, n_k, _ = k.shape
    s = np.einsum("d,hmd->hm", q[0, 0, -1], k)[..., None]
    if kind == "signs of the error":
        return np.concatenate([np.sign(s), s < -0.5 * size], axis=-1)
    if kind == "rare":
        return (rng.random((H, n_k, 2)) < 0.1) + 0.0
    if kind == "ramp":
        return np.arange(n_k)[None, :, None] + 0.1 * s * np.ones(2)
    v = rng.uniform(-1, 1, (H, n_k, 2))
    return v * [1, 1e-4] + [0, 1] if kind == "one column small" else v
