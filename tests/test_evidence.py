"""A finished result against rows computed exactly."""

import cases
import numpy as np
import oracle
import pytest

import ropecy


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
    for word in ("459 of 1,000", "99%", "1.00%", "not proved", f"seed {evidence.seed}"):
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


def test_nothing_to_check():
    empty = np.zeros((0, 2))
    assert ropecy.check(empty, empty, np.ones((3, 2)), np.ones((3, 2))).error == 0
    Q = np.ones((3, 2))
    assert ropecy.check(np.zeros((3, 2)), Q, empty, empty).error == 0
    assert ropecy.check(np.zeros((3, 0)), Q, Q, np.zeros((3, 0))).n_rows == 3
