"""What a slot, a head of a batch element, gets does not depend on which slots are beside it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inside import chosen_for, outputs

import ropecy
from ropecy.certify.statistics import Statistics
from ropecy.engines.exact.engine import Exact
from ropecy.problem.mask import Mask
from ropecy.problem.problem import Problem

N, D = 400, 6
# The size of scores, of values, how unlike the lengths of queries are, and how far from 0 values lie.
SLOT = st.tuples(
    st.sampled_from([0.02, 0.3, 0.5, 0.72, 0.74, 1.0, 1.1, 2.0, 4.0, 60.0]),
    st.sampled_from([1e-3, 1.0, 1e4]),
    st.sampled_from([0.0, 0.5, 1.5]),
    st.sampled_from([0.0, 30.0]),
)
METHODS = st.sampled_from(["auto", "polynomial"])


def _slot(seed, bound, size, ragged, offset, n=N, d=D, dtype=np.float32):
    rng = np.random.default_rng(seed)
    q, k = (X / np.linalg.norm(X, axis=-1, keepdims=True) for X in rng.standard_normal((2, n, d)))
    q *= bound * np.exp(-ragged * rng.random((n, 1)))
    return tuple(X.astype(dtype) for X in (q, k, size * (rng.uniform(-1, 1, (n, 3)) + offset)))


def _results(slots, grad, **options):
    """What the first slot gets beside the others: its results, its part of the certificate, and its plan."""
    Q, K, V = (np.stack(X) for X in zip(*slots, strict=True))
    if not grad:
        O, c, lse = ropecy.attention(Q, K, V, scale=1.0, **options, return_lse=True, return_certificate=True)
        found, certificates = [O, lse], [c]
    else:
        O, vjp = ropecy.attention_vjp(Q, K, V, scale=1.0, **options)
        # Powers of two bring dO of all slots to one size.
        g = vjp(np.sign(V))
        found, certificates = [O, g.dQ, g.dK, g.dV], [vjp.certificate, g.certificate]
    for certificate in certificates:
        rows = certificate.rows_truncation
        found.append(np.full(found[0].shape[:-1], certificate.truncation) if rows is None else rows)
    part = next((own for names, own in certificates[0].parts if (0,) in names), certificates[0])
    return [X[0] for X in found], (part.engine, part.rule, part.degree)


@settings(max_examples=25)
@given(
    first=SLOT,
    others=st.lists(SLOT, min_size=3, max_size=3),
    causal=st.booleans(),
    grad=st.booleans(),
    method=METHODS,
    eps=st.sampled_from([1e-3, 2e-2]),
    seed=st.integers(0, 99),
)
def test_bits_and_certificates_are_a_slots_own(first, others, causal, grad, method, eps, seed):
    if method == "polynomial":
        first, *others = ((min(own[0], 4.0), *own[1:]) for own in (first, *others))
    slot, how = _slot(seed, *first), {"causal": causal, "method": method, "eps": eps, "seed": 1}
    if method == "polynomial":
        how["eps"] = 2e-2
    alike = _results([slot] * 4, grad, **how)
    beside = _results([slot, *(_slot(seed + 1 + at, *own) for at, own in enumerate(others))], grad, **how)
    assert beside[1] == alike[1]
    for X, Y in zip(beside[0], alike[0], strict=True):
        np.testing.assert_array_equal(X, Y)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", ["auto", "polynomial"])
def test_a_slot_whose_rows_fail_takes_the_fallback_alone(method, causal):
    slots = [_slot(seed, 1.0, 1.0, 0.0, 0.0, n=900, d=16, dtype=np.float64) for seed in range(3)]
    q, k, v = (np.stack(X) for X in zip(*slots, strict=True))
    problem = Problem(q=q[:, None], k=k, v=v, mask=Mask(900, 900, hi=0 if causal else None))
    planned = chosen_for(problem, eps=1e-3, method="polynomial", grad=True).executable
    assert planned.certificate.rule == "moments"
    if method == "auto":
        planned = replace(planned, fallback=Exact(problem, Statistics(problem), True))
    failing = replace(planned, n_exact_rows=np.array([900, -1, 900]))
    do = np.cos(v)[:, None]
    by = [planned.forward(problem, True), planned.fallback.forward(problem, True), failing.forward(problem, True)]
    fine, other, found = ((own.o, own.lse, *outputs(own.backward(problem, do))) for own in by)
    for X, Y, Z in zip(fine, other, found, strict=True):
        np.testing.assert_array_equal(Z[[0, 2]], X[[0, 2]])
        np.testing.assert_array_equal(Z[1], Y[1])
    for certificate in (by[2].certificate, by[2].gradient_certificate):
        assert certificate.rule == "mixed"
        assert certificate.rows_truncation.shape == (3, 1, 900)
        assert certificate.rows_truncation.max() == certificate.truncation
    assert np.all(by[2].certificate.rows_truncation[1] == 0) == (method == "auto")


def test_a_sequence_rounds_by_its_own_values():
    """However large those of a sequence beside it are, all of which lie far from 0."""
    few, many = (_slot(seed, 0.5, 1.0, 0.0, 5.0, n=n) for seed, n in ((1, 40), (2, 1500)))
    how = {"scale": 1.0, "eps": 1e-2, "return_certificate": True}
    Q, K, V = (np.concatenate([X, size * Y]) for X, Y, size in zip(few, many, np.float32([1, 1, 1e12]), strict=True))
    (names, part), _ = ropecy.attention(Q, K, V, lengths=[40, 1500], **how)[1].parts
    assert names == ((0, 0),)
    assert part.rounding <= 1.01 * ropecy.attention(*few, **how)[1].rounding
