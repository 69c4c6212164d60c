"""A finished result against rows computed exactly."""

from dataclasses import replace

import cases
import numpy as np
import oracle
import pytest
from inside import chosen_for

import ropecy
from ropecy.approximation.minimax import B_grid
from ropecy.approximation.moment_fit import fit_moments
from ropecy.certify.sample import draw
from ropecy.problem.mask import Mask
from ropecy.problem.problem import Problem


@pytest.mark.parametrize("name", list(cases.SPECS))
def test_every_row_of_every_case_agrees(name, rng, ours):
    case = cases.make(name, rng)
    O = oracle.attention(**case).O
    evidence = ropecy.check(O, **ours(case), rows=10**6)
    assert evidence.n_rows == evidence.n_rows_total == O[..., 0].size
    assert evidence.error < 1e-11
    assert evidence.fraction == 0


@pytest.mark.parametrize("name", list(cases.SPECS))
def test_a_wrong_entry_is_found_and_measured(name, rng, ours):
    case = cases.make(name, rng)
    dense = oracle.attention(**case)
    O = dense.O.copy()
    spread = np.broadcast_to(dense.value_range, O.shape)
    wide = np.argwhere(spread > 0.1)
    if not len(wide):
        return
    at = tuple(wide[rng.integers(len(wide))])
    O[at] += 0.25 * spread[at]
    evidence = ropecy.check(O, **ours(case), rows=10**6)
    assert evidence.error == pytest.approx(0.25, rel=1e-9)
    assert evidence.index == at[:-1]


def test_constant_columns_are_theirs_or_wrong(rng):
    Q, K, V = rng.standard_normal((3, 20, 2))
    V[:, 1] = 3.0
    O = ropecy.attention(Q, K, V, method="exact")
    assert ropecy.check(O, Q, K, V).error < 1e-12
    O[7, 1] += 1e-6
    assert ropecy.check(O, Q, K, V).error == np.inf


def test_rows_are_drawn_by_the_seed_and_all_equally_often(rng):
    Q, K, V = rng.standard_normal((3, 12, 2))
    O = ropecy.attention(Q, K, V, method="exact")
    O += np.arange(12)[:, None]  # the largest row of a sample tells which it was
    largest = np.array([ropecy.check(O, Q, K, V, rows=1, seed=s).index[0] for s in range(400)])
    counts = np.bincount(largest, minlength=12)
    assert counts.min() > 10
    assert counts.max() < 70
    assert ropecy.check(O, Q, K, V, rows=1, seed=3) == ropecy.check(O, Q, K, V, rows=1, seed=3)
    assert len({ropecy.check(O, Q, K, V, rows=1).seed for _ in range(3)}) == 3


def test_statement_is_that_of_its_rows(rng):
    Q, K, V = rng.standard_normal((3, 1000, 2)).astype(np.float32)
    evidence = ropecy.check(ropecy.attention(Q, K, V), Q, K, V)
    assert evidence.n_rows == 459
    assert (1 - evidence.fraction) ** 459 == pytest.approx(1 - evidence.confidence)
    assert evidence.confidence == 0.99
    assert 0.0099 < evidence.fraction < 0.01
    for word in ("459 of 1,000", "of the range of the values,", "99%", "1.00%", "not proved", f"seed {evidence.seed}"):
        assert word in str(evidence)


def test_certificates_hold_in_the_rows_drawn(rng):
    Q, K, V = rng.standard_normal((3, 2, 700, 4)).astype(np.float32)
    for causal in (False, True):
        O, certificate = ropecy.attention(Q, K, V, causal=causal, eps=1e-2, return_certificate=True)
        assert ropecy.check(O, Q, K, V, causal=causal, seed=1).error <= 1e-2


def test_bad_arguments(rng):
    Q, K, V = rng.standard_normal((3, 20, 2))
    with pytest.raises(ValueError, match="rows"):
        ropecy.check(V, Q, K, V, rows=0)
    with pytest.raises(ValueError, match=r"^O: .*\(20, 2\)"):
        ropecy.check(V[1:], Q, K, V)
    with pytest.raises(ValueError, match=r"\bO\b"):
        ropecy.check(np.full((20, 2), np.nan), Q, K, V)
    with pytest.raises(TypeError, match="check"):
        ropecy.check(V, Q, K, V, return_lse=True)


# dQ is 0 where there is one key or no scale, and a sum over heads where Q lacks an axis.
WITHOUT_GRADIENT = {"one_key", "no_scale", "one_token", "window_of_one", "queries_without_batch", "keys_without_batch"}


@pytest.mark.parametrize("name", [name for name in cases.SPECS if name not in WITHOUT_GRADIENT])
def test_gradients(name, rng, ours):
    case = cases.make(name, rng)
    dense = oracle.attention(**case)
    dO = rng.standard_normal(dense.O.shape)
    dQ = dense.backward(dO)["dQ"]
    evidence = ropecy.check(dQ, **ours(case), dO=dO, rows=10**6)
    assert evidence.error <= 1e-11
    assert evidence.n_rows == evidence.n_rows_total == np.prod(dQ.shape[:-1])
    largest = np.linalg.norm(dQ, axis=-1).max()
    row = tuple(int(i) for i in rng.integers(dQ.shape[:-1]))
    dQ[row] += 0.1 * largest / np.sqrt(dQ.shape[-1])
    evidence = ropecy.check(dQ, **ours(case), dO=dO, rows=10**6)
    assert evidence.index == row and evidence.error == pytest.approx(0.1, rel=1e-6)
    assert "of the largest row of dQ" in str(evidence)


def test_gradients_of_a_sample(rng):
    Q, K, V, dO = rng.uniform(-1, 1, (4, 1000, 4)).astype(np.float32)
    _, vjp = ropecy.attention_vjp(Q, K, V, eps=1e-2, causal=True)
    evidence = ropecy.check(vjp(dO).dQ, Q, K, V, dO=dO, causal=True, rows=50, seed=1)
    assert 0 < evidence.error < 1e-2 and evidence.n_rows == 50
    assert ropecy.check(0 * Q, Q, K, V, dO=0 * dO, rows=50).error == 0
    with pytest.raises(ValueError, match=r"dO: got shape \(999, 4\)"):
        ropecy.check(Q, Q, K, V, dO=dO[1:])
    with pytest.raises(ValueError, match=r"O: got shape \(999, 4\)"):
        ropecy.check(Q[1:], Q, K, V, dO=dO)
    with pytest.raises(ValueError, match=r"Q: got shape \(1000, 4\), wants the leading axes \(2,\)"):
        ropecy.check(Q, Q, np.stack([K, K]), V, dO=np.stack([dO, dO]))


def test_nothing_to_check():
    empty = np.zeros((0, 2))
    assert ropecy.check(empty, empty, np.ones((3, 2)), np.ones((3, 2))).error == 0
    Q = np.ones((3, 2))
    assert ropecy.check(np.zeros((3, 2)), Q, empty, empty).error == 0
    assert ropecy.check(np.zeros((3, 0)), Q, Q, np.zeros((3, 0))).n_rows == 3


def unit(rng, n, d, dtype=np.float32):
    """Rows of norm sqrt(d), and values in [-1, 1]."""
    Q, K = (cases.unit_rows(x).astype(dtype) for x in rng.standard_normal((2, n, d)))
    return Q, K, rng.uniform(-1, 1, (n, 3)).astype(dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_sampled_degrees_are_small_and_their_error_within_eps_in_all_rows(causal, seed, rng):
    Q, K, V = unit(rng, 16384, 64)
    O, certificate = ropecy.attention(
        Q, K, V, causal=causal, certify="sample", method="polynomial", seed=seed, return_certificate=True
    )
    assert certificate.rule == "sampled"
    assert certificate.error <= 1e-3
    m = certificate.n_sampled - certificate.n_sampled // 2
    fraction = 1 - (0.01 / certificate.degree) ** (1 / m)
    assert f"99% at most {fraction:.1%} of the others of a head are past half of it, not proved" in str(certificate)
    if not causal:
        assert certificate.n_features < 200
    assert seed is None or certificate.seed == seed
    evidence = ropecy.check(O, Q, K, V, causal=causal, rows=300, seed=5)
    assert evidence.error <= certificate.error


def test_rows_at_risk_are_the_first_with_far_keys_where_causal(rng):
    Q, K, V = unit(rng, 6000, 64, np.float64)
    options = {"causal": True, "certify": "sample", "method": "polynomial", "degree": 2, "return_certificate": True}
    exact = ropecy.attention(Q, K, V, causal=True, method="exact")
    low, high = np.minimum.accumulate(V), np.maximum.accumulate(V)
    for seed in range(4):
        O, certificate = ropecy.attention(Q, K, V, seed=seed, **options)
        error = np.abs(O - exact)[1:] / (high - low)[1:]
        assert 1.3 * error.max() <= certificate.truncation <= 2.0001 * error.max()


def test_sampled_certificate_is_twice_the_error_of_its_rows(rng):
    Q, K, V = unit(rng, 180, 8, np.float64)  # fewer rows than are drawn: all of them
    O, certificate = ropecy.attention(
        Q, K, V, certify="sample", method="polynomial", degree=1, eps=0.1, return_certificate=True
    )
    assert (certificate.rule, certificate.degree, certificate.n_sampled) == ("sampled", 1, 180)
    exact = ropecy.attention(Q, K, V, method="exact")
    error = np.max(np.abs(O - exact) / (V.max(axis=0) - V.min(axis=0)))
    assert certificate.truncation == pytest.approx(2 * error, rel=1e-9)
    assert np.all(certificate.rows_truncation == certificate.truncation)


def test_sample_is_half_the_rows_at_most_risk_of_each_slot(rng):
    risk = rng.permutation(1000.0 + np.arange(1000)).reshape(2, 5, 100)
    draws = [np.random.default_rng(slot) for slot in range(2)]
    chosen = draw(risk, 60, draws).reshape(2, 500)
    likely = risk.reshape(2, 500) >= np.sort(risk.reshape(2, 500))[:, 470:471]
    assert np.all(np.count_nonzero(chosen, axis=1) == 60)
    assert np.all(chosen[likely])
    counts = sum(draw(risk, 60, draws).reshape(2, 500).astype(int) for _ in range(300))
    others = counts[~likely]
    assert others.max() < 45
    assert others.min() > 1


def test_slots_are_sampled_by_themselves(rng):
    Q, K = (cases.unit_rows(X) for X in rng.standard_normal((2, 4, 3000, 16)))
    V = rng.uniform(-1, 1, (4, 3000, 3))
    Q *= np.array([1, 1.03, 1, 1])[:, None, None]
    how = {"certify": "sample", "method": "polynomial", "eps": 1e-2, "seed": 3, "return_certificate": True}
    O, certificate = ropecy.attention(Q, K, V, **how)
    assert (certificate.rule, certificate.n_sampled) == ("sampled", 48)
    exact = ropecy.attention(Q, K, V, method="exact")
    error = np.max(np.abs(O - exact) / (V.max(axis=1) - V.min(axis=1))[:, None], axis=(1, 2))
    # A slot is judged by the worst of its own rows, and the first slot alike beside others.
    truncation = certificate.rows_truncation[:, 0]
    assert np.all(truncation <= 2.0001 * error)
    assert np.all(truncation >= error)
    assert len(set(truncation)) == 4
    beside, other = ropecy.attention(Q, K, np.concatenate([V[:1], 1e3 * V[1:]]), **how)
    np.testing.assert_array_equal(beside[0], O[0])
    np.testing.assert_array_equal(other.rows_truncation[0], certificate.rows_truncation[0])


def test_many_slots_have_a_tile_of_rows_each(rng):
    Q, K = (cases.unit_rows(X) for X in rng.standard_normal((2, 9, 3000, 16)))
    how = {"certify": "sample", "method": "polynomial", "eps": 1e-2}
    assert ropecy.plan(Q, K, rng.uniform(-1, 1, (9, 3000, 3)), **how).certificate.n_sampled == 48


def planned_by_samples(rng, slots, degrees):
    """A problem of so many slots, and its executable with these degrees to try."""
    Q, K, V = (np.stack(X) for X in zip(*(unit(rng, 1500, 16, np.float64) for _ in range(slots)), strict=True))
    problem = Problem(q=Q[:, None], k=K, v=V, mask=Mask(1500, 1500), scale=0.125)
    planned = chosen_for(problem, eps=3e-2, method="polynomial", certify="sample", seed=1).executable
    bounds = planned.expansion.scores.of_slots
    return problem, replace(planned, trials=[tuple(fit_moments(B_grid(B), g) for B in bounds) for g in degrees])


def test_a_slot_whose_sampled_rows_fail_takes_more_degrees_alone(rng):
    problem, planned = planned_by_samples(rng, 3, [2, 4])
    fine, other = planned.forward(problem, True), planned.prove(1).forward(problem.slots(slice(1, 2)), True)
    exact = ropecy.attention(problem.q[1, 0], problem.k[1], problem.v[1], method="exact", scale=0.125)
    assert fine.certificate.degree == 2
    for allowed, trials in ((0.1, planned.trials), (0.1, planned.trials[:1]), (0, planned.trials)):
        failing = replace(planned, allowed=planned.allowed * [1, allowed, 1], trials=trials)
        found = failing.forward(problem, True)
        for X, Y in ((found.o, fine.o), (found.lse, fine.lse)):
            np.testing.assert_array_equal(X[[0, 2]], Y[[0, 2]])
        assert found.certificate.degree == 4
        # By a sample of the next degree, or by a proof.
        by_proof = allowed == 0 or len(trials) == 1
        assert np.array_equal(found.o[1], other.o[0]) == by_proof
        rows = found.certificate.rows_truncation
        assert found.certificate.truncation == rows.max()
        assert np.max(np.abs(found.o[1, 0] - exact) / np.ptp(problem.v[1], axis=0)) <= rows[1].max() + 1e-10
    left = replace(planned, allowed=np.zeros(3)).forward(problem, True)
    np.testing.assert_array_equal(left.o[1], other.o[0])
    np.testing.assert_array_equal(left.lse[1], other.lse[0])
    assert left.certificate.rule == "worst case"
    said = "^certify='sample': twice the error of 64 sampled rows is past 0 at all degrees that were tried, which is"
    with pytest.raises(ropecy.BoundedEntryError, match=said):
        replace(failing, prove=None).forward(problem, False)


def test_a_slot_without_a_polynomial_of_a_degree_waits_for_the_next(rng):
    problem, planned = planned_by_samples(rng, 2, [2, 4])
    second = planned.trials[1]
    waits = replace(planned, trials=[(planned.trials[0][0], None), second], prove=None)
    found, fine = waits.forward(problem, False), planned.forward(problem, False)
    np.testing.assert_array_equal(found.o[0], fine.o[0])
    again = replace(planned, trials=[second]).forward(problem, False)
    np.testing.assert_array_equal(found.o[1], again.o[1])
    assert (fine.certificate.degree, found.certificate.degree) == (2, 4)


def test_rows_at_risk_are_those_of_large_certificates(rng):
    Q, K, V = unit(rng, 4000, 8, np.float64)
    Q[[17, 2900]] *= 3
    eps = 0.05
    _, certificate = ropecy.attention(
        Q, K, V, certify="sample", method="polynomial", eps=eps, seed=1, return_certificate=True
    )
    O = ropecy.attention(Q, K, V, certify="sample", method="polynomial", eps=eps, seed=1)
    evidence = ropecy.check(O, Q, K, V, rows=4000)
    assert evidence.error <= 0.51 * certificate.truncation  # the two long queries were among the sampled


def test_what_sampled_rows_refuse_falls_to_the_proof_or_is_refused(rng):
    Q, K, V = unit(rng, 3000, 16)
    K[:] = K[:1] + 0.3 * K  # the largest eigenvalue has most of the scores
    K = cases.unit_rows(K)
    _, certificate = ropecy.attention(Q, K, V, certify="sample", eps=1e-5, return_certificate=True)
    assert certificate.error <= 1e-5
    with pytest.raises(ropecy.BoundedEntryError, match="sampled rows"):
        ropecy.attention(4 * Q, K, V, certify="sample", method="polynomial", degree=1, eps=1e-4)


def test_samples_say_nothing_of_gradients_and_products(rng):
    Q, K, V = unit(rng, 3000, 8)
    _, vjp = ropecy.attention_vjp(Q, K, V, certify="sample", method="polynomial", eps=1e-2)
    assert vjp.certificate.rule == "worst case"
    A = ropecy.AttentionMatrix(Q[:50], K[:40], certify="sample", method="polynomial", eps=1e-2)
    exact = np.exp(Q[:50].astype(float) @ K[:40].T / 8)
    assert np.all(np.abs(A.toarray() - exact) <= 2.1e-2 * exact)


def test_same_seed_same_bits(rng):
    Q, K, V = unit(rng, 3000, 16)
    options = {"certify": "sample", "method": "polynomial", "seed": 4, "return_certificate": True}
    (one, first), (two, second) = (ropecy.attention(Q, K, V, threads=t, **options) for t in (1, 2))
    np.testing.assert_array_equal(one, two)
    assert first == second


def test_plan_of_a_sample_names_its_rule(rng):
    Q, K, V = unit(rng, 16384, 32)
    plan = ropecy.plan(Q, K, V, certify="sample", method="polynomial")
    assert plan.certificate.rule == "sampled"
    assert "sampled rows" in str(plan)
