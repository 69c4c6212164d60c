"""A hunt for violated certificates; ``ROPECY_HUNT=10000 pytest tests/test_hunt.py`` looks at so many problems each."""

import math
import os

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from moment_cases import DATA, adversarial, by_moments, problem_of, row_errors, seen_by_rows, values_for

import ropecy
from ropecy.bounds import measure, measure_values

ASKED = os.environ.get("ROPECY_HUNT")
hunting = settings(max_examples=int(ASKED or 150))


def problem_drawn(rng, kind, values, size, causal, masked, dtype):
    H, G, d = rng.integers(1, 3), rng.integers(1, 3), rng.integers(1, 5)
    n, n_k = (int(rng.integers(190, 420)),) * 2 if causal else (int(rng.integers(1, 8)), int(rng.integers(1, 30)))
    q, k = adversarial(kind, rng, (H, G, n, n_k, d), size)
    v = values_for(values, rng, q, k, size)
    mask = rng.random((H, n_k)) < 0.7 if masked else None
    offset = int(rng.integers(-5, 5)) if causal else 0
    return problem_of(*(x.astype(dtype) for x in (q, k, v)), causal=causal, mask=mask, q_offset=offset)


DRAWN = {
    "kind": st.sampled_from(DATA),
    "seed": st.integers(0, 2**32),
    "causal": st.booleans(),
    "masked": st.booleans(),
    "size": st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.5]),
    "values": st.sampled_from(["uniform", "signs of the error", "rare", "ramp", "one column small"]),
    "dtype": st.sampled_from([np.float32, np.float64]),
}


@hunting
@given(degree=st.sampled_from([2, 3, 4, 5, 6]), fourth=st.booleans(), **DRAWN)
def test_no_row_is_past_its_certificate(kind, seed, degree, fourth, causal, masked, size, values, dtype):
    rng = np.random.default_rng(seed)
    problem = problem_drawn(rng, kind, values, size, causal, masked, dtype)
    if problem.empty:
        return
    kappa = float(rng.choice([0.5, 4.0, 32.0])) if fourth and degree < 4 else 0.0
    found = by_moments(problem, degree, kappa)
    if found is None:
        return
    o, rows, *_ = found
    scores, spread = measure(problem), measure_values(problem)
    unit = float(np.finfo(dtype).eps) / 2
    rounding = unit * (12 + 4 * math.exp(2 * scores.bound) + 2 * spread.offset)
    errors, ranges, largest = row_errors(problem, o, by_column=True)
    rows = np.minimum(rows, 1e300)  # inf times no range
    allowed = rows[..., None] * (1 + 1e-6) * ranges + rounding * largest
    assert np.all(errors <= allowed)


@hunting
@given(eps=st.sampled_from([1e-1, 1e-2, 1e-3, 1e-5]), method=st.sampled_from(["auto", "polynomial"]), **DRAWN)
def test_no_result_is_past_what_is_certified(kind, seed, eps, method, causal, masked, size, values, dtype):
    problem = problem_drawn(np.random.default_rng(seed), kind, values, size, causal, masked, dtype)
    try:
        O, certificate = ropecy.attention(
            problem.q,
            problem.k[:, None],
            problem.v[:, None],
            scale=problem.scale,
            causal=causal,
            q_offset=problem.q_offset,
            key_mask=None if problem.key_mask is None else problem.key_mask[:, None],
            eps=eps,
            method=method,
            seed=1,
            return_certificate=True,
        )
    except ropecy.BoundedEntryError:
        assert method == "polynomial"
        return
    if problem.empty:
        assert not O.any()
        return
    errors, ranges, largest = row_errors(problem, O, by_column=True)
    rows = certificate.rows_truncation[..., None] * ranges + certificate.rounding * largest
    assert np.all(errors <= rows)
    # Whole rows, by how far values are from the row: in the 2-norm, and in that of the sum.
    apart = np.abs(problem.v[:, None, None].astype(np.float64) - O[..., None, :])
    for p in (1, 2):
        radius = np.max(np.linalg.norm(apart, p, axis=-1), axis=-1, where=seen_by_rows(problem), initial=0)
        allowed = 2 * certificate.rows_truncation * radius * (1 + 1e-6)
        allowed += certificate.rounding * largest * problem.v.shape[2]
        assert np.all(np.linalg.norm(errors, p, axis=-1) <= allowed)
