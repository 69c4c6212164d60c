"""What certificates of parts promise, which are made of those of every part."""

import numpy as np
import oracle
import pytest
from inside import chosen_for, problem_for

import ropecy
from ropecy.problem.normal_form import normal_form
from ropecy.problem.problem import Problem


def unit(X):
    return X / np.linalg.norm(X, axis=-1, keepdims=True)


def chosen_parts(Q, K, V, **how):
    problem = problem_for(Q, K, V, **how)
    request = {name: how[name] for name in ("eps", "certify")}
    return chosen_for(normal_form(problem, False).problem, **request).executable.parts


def heads(rng, bounds, n=1500, d=4):
    size = np.sqrt(np.asarray(bounds))[:, None, None]
    Q, K = (unit(X) * size for X in rng.standard_normal((2, len(bounds), n, d)))
    return Q, K, rng.uniform(-1, 1, (len(bounds), n, d))


def test_rounding_of_gradients_is_in_units_of_the_rows_own_values(rng):
    n, sharp = 1500, 3e5
    Q, K = (
        unit(X) * np.sqrt(np.repeat([0.5, sharp], [n, n + 1]))[:, None] for X in rng.standard_normal((2, 2 * n + 1, 4))
    )
    V = rng.uniform(-1, 1, (2 * n + 1, 4)) * np.repeat([1, 1e-6], [n, n + 1])[:, None]
    case = {name: X.astype(np.float32) for name, X in zip("QKV", (Q, K, V), strict=True)}
    how = {"scale": 1.0, "method": "exact"}
    together = ropecy.attention_vjp(**case, **how, lengths=[n, n + 1])[1]
    alone = ropecy.attention_vjp(**{name: X[n:] for name, X in case.items()}, **how)[1]
    dO = rng.standard_normal(V.shape).astype(np.float32)
    assert together(dO).certificate.rounding >= alone(dO[n:]).certificate.rounding


def test_what_projections_lose_is_relative_to_the_longest_row_of_all_sequences(rng):
    # W makes the long rows of the first sequence cancel, and the second one's stay long.
    n, long = 32, 1e8
    W = np.array([[np.pi, 0], [-np.pi, 0], [0, 1.0]])
    a, b = rng.uniform(0.5, 1, n) * long, rng.uniform(-1, 1, n + 1) * long
    first = np.stack([a, a + rng.uniform(-1, 1, n), rng.uniform(-1, 1, n)], axis=1)
    X = np.concatenate([first, np.stack([b, -b, rng.uniform(-1, 1, n + 1)], axis=1)])
    Q = np.concatenate([rng.uniform(-1, 1, (n, 2)), rng.uniform(-1, 1, (n + 1, 2)) * 1e-9])
    V = rng.uniform(-1, 1, (2 * n + 1, 3))
    how = {"W_K": W, "scale": 1.0, "method": "exact"}
    O, certificate = ropecy.attention(Q, X, V, **how, lengths=[n, n + 1], return_certificate=True)
    expected = oracle.attention(Q=Q[:n], K=X[:n], V=V[:n], W_K=W, scale=1.0, dtype=np.longdouble).O
    assert np.abs(O[:n] - expected).max() <= certificate.rounding * np.ptp(V, axis=0).max()


def test_parts_count_what_storing_in_half_precision_costs(rng):
    Q, K, V = (X.astype(np.float16) for X in heads(rng, [0.5, 60.0, 0.5]))
    O, certificate = ropecy.attention(Q, K, V, scale=1.0, return_certificate=True)
    expected = oracle.attention(Q=Q, K=K, V=V, scale=1.0).O
    for ((head,), *_), part in certificate.parts:
        assert part.storing > 0
        spread = np.ptp(V[head].astype(float), axis=0).max()
        assert np.abs(O[head] - expected[head]).max() <= part.error * spread


def test_parts_of_products_with_the_matrix(rng):
    Q, K, _ = heads(rng, [0.5, 60.0, 0.5])
    X = np.eye(1500)[:, :50]
    found, certificate = ropecy.AttentionMatrix(Q, K, scale=1.0).dot(X, return_certificate=True)
    weights = np.exp(Q @ K.swapaxes(1, 2))[..., :50]
    for indices, part in certificate.parts:
        for (head,) in indices:
            assert np.all(
                np.abs(found[head] - weights[head])
                <= part.truncation * weights[head] * (1 + 1e-9)
                + part.rounding * np.exp(Q[head] @ K[head].T).sum(axis=1, keepdims=True)
            )


@pytest.mark.parametrize("columns", [1, 6])
def test_names_of_heads_in_products(columns, rng):
    Q, K, _ = heads(rng, [0.5, 60.0, 0.5])
    A = ropecy.AttentionMatrix(np.repeat(Q, 2, axis=0), K, scale=1.0)
    X = rng.uniform(-1, 1, (6, 1500, 2)) if columns == 6 else rng.uniform(-1, 1, (1500, 2))
    _, certificate = A.dot(X, return_certificate=True)
    count = 6 if columns == 6 else 3
    assert sorted(sum((named for named, _ in certificate.parts), ())) == [(head,) for head in range(count)]
    Q, K = (Y[[0, 1, 2, 0]].reshape(2, 2, 1500, 4) for Y in (Q, K))
    _, certificate = ropecy.AttentionMatrix(Q, K, scale=1.0).T.dot(
        X[..., :1, :] * np.ones((1500, 1)) if columns == 1 else X[:4].reshape(2, 2, 1500, 2), return_certificate=True
    )
    assert certificate.parts[1][0] == ((0, 1),)


def test_sampled_parts_say_what_every_sample_shows(rng):
    lengths = [6000, 6001, 9000]
    X = unit(rng.standard_normal((2, sum(lengths), 16))) * 1.6
    V = rng.uniform(-1, 1, (sum(lengths), 3))
    how = {"scale": 1.0, "eps": 1e-2, "certify": "sample", "lengths": lengths}
    _, certificate = ropecy.attention(*X, V, **how, return_certificate=True)
    assert certificate.rule == "sampled"
    # Each part has a sample of its own, and no more rows than that speak of the longest sequence.
    assert all(own.executable.certificate.rule == "sampled" for own in chosen_parts(*X, V, **how))
    assert certificate.n_sampled == 192
    assert "not proved" in str(certificate)
    O, again = (ropecy.attention(*X, V, **how, seed=certificate.seed) for _ in range(2))
    assert np.array_equal(O, again)


def test_constant_values_of_one_part_round_nothing(rng):
    Q, K, V = (X.astype(np.float32) for X in heads(rng, [0.5, 60.0, 0.5], n=2000))
    V[1] = 1e4
    O, certificate = ropecy.attention(Q, K, V, scale=1.0, return_certificate=True)
    assert certificate.engine == "mixed"
    assert certificate.rounding < 1e-4
    assert np.array_equal(O[1], V[1])
    values = (rng.uniform(0, 1, (3901, 2)) + 3e3).astype(np.float32)
    rows = rng.standard_normal((3901, 4)).astype(np.float32)
    _, one = ropecy.attention(rows, rows, values, method="exact", lengths=[1, 3900], return_certificate=True)
    _, whole = ropecy.attention(rows, rows, values, method="exact", return_certificate=True)
    assert one.rounding <= 2 * whole.rounding


def test_parts_within_eps_are_no_cause_to_warn(rng, recwarn):
    Q, K, V = (X.astype(np.float32) for X in heads(rng, [0.75, 600.0, 0.75], n=2000))
    _, certificate = ropecy.attention(Q, K, V, scale=1.0, return_certificate=True)
    assert all(part.error <= 1e-3 for _, part in certificate.parts)
    assert not [one for one in recwarn if one.category is ropecy.AccuracyWarning]


def test_storing_is_in_the_unit_of_all_values(rng):
    Q, K, V = heads(rng, [0.5, 60.0])
    V[1] = 1 + 1e-2 * V[1]
    Q, K, V = (X.astype(np.float16) for X in (Q, K, V))
    O, certificate = ropecy.attention(Q, K, V, scale=1.0, return_certificate=True)
    assert certificate.engine == "mixed"
    most, spread = np.abs(V.astype(float)).max(), np.ptp(V.astype(float), axis=1).max()
    assert certificate.storing == pytest.approx(2.0**-11 * most / spread, rel=1e-6)
    # In units of its own values, which lie close together, the second part loses far more.
    assert certificate.parts[1][1].storing > 10 * certificate.storing


def test_the_unit_is_that_of_values_before_sequences_are_centred(rng):
    # The first keys have no rows, so that nothing centres their values, which are as far from 0 as all others.
    Q, K = rng.standard_normal((16, 4)), rng.standard_normal((20, 4))
    V = 3e4 + rng.uniform(0, 1, (20, 3))
    case = {name: X.astype(np.float32) for name, X in (("Q", Q), ("K", K), ("V", V))}
    how = {"lengths": ([0, 16], [4, 16]), "method": "exact"}
    O, certificate = ropecy.attention(**case, **how, return_certificate=True)
    expected = oracle.attention(Q=case["Q"], K=case["K"][4:], V=case["V"][4:], scale=0.25).O
    error, spread = np.abs(O - expected).max(), np.ptp(case["V"].astype(float), axis=0).max()
    assert 0 < error <= certificate.rounding * spread


def test_the_unit_of_a_product_is_that_of_its_factor(rng):
    Q, X = rng.uniform(-1, 1, (40, 4)), 1e6 * rng.uniform(-1, 1, (40, 2))
    _, certificate = ropecy.AttentionMatrix(Q, Q, lengths=[25, 15]).dot(X, return_certificate=True)
    assert certificate.rounding < 1e-12


def test_work_of_a_part_is_cut_as_that_of_the_whole(rng):
    Q, K, V = heads(rng, [1.0] * 6, n=10)
    problem = Problem(q=np.stack([Q, Q], axis=1), k=K, v=V)
    part = problem.slots(np.array([0, 3]))
    assert part.cut_for == problem.cut_for == 6
    assert part.slots(slice(0, 1)).cut_for == 6
    assert part.ungrouped().cut_for == problem.ungrouped().cut_for == 12


def test_a_seed_that_is_given_back_is_taken_again(rng, monkeypatch):
    # The largest number of so many bits.
    monkeypatch.setattr("secrets.randbits", lambda bits: 2**bits - 1)
    Q, K, V = (X[0] for X in heads(rng, [1.0], n=600))
    O = ropecy.attention(Q, K, V, method="exact")
    seed = ropecy.check(O, Q, K, V, rows=50).seed
    assert ropecy.check(O, Q, K, V, rows=50, seed=seed).seed == seed
    X = unit(rng.standard_normal((2, 12001, 16))) * 1.6
    V = rng.uniform(-1, 1, (12001, 3))
    for lengths in (None, [6000, 6001]):
        how = {"scale": 1.0, "eps": 1e-2, "certify": "sample", "lengths": lengths}
        O, certificate = ropecy.attention(*X, V, **how, return_certificate=True)
        assert certificate.rule == "sampled"
        assert np.array_equal(O, ropecy.attention(*X, V, **how, seed=certificate.seed))


def test_a_row_without_keys_is_checked_too(rng):
    Q, K = rng.standard_normal((10, 4)), rng.standard_normal((6, 4))
    lengths = [4, 6], [6, 0]
    O = ropecy.attention(Q, K, K, lengths=lengths)
    assert ropecy.check(O, Q, K, K, lengths=lengths).error < 1e-12
    O[7] = 7.0
    assert ropecy.check(O, Q, K, K, lengths=lengths).error == np.inf


def test_biases_of_heads_cost_no_more_than_their_sequences(rng):
    import tracemalloc

    rows = [4] * 300 + [6000]
    Q, K, V = rng.standard_normal((3, 4, sum(rows), 8)).astype(np.float32)
    how = {"causal": True, "window": 64, "method": "exact", "lengths": rows}
    peaks = []
    for bias in (None, ropecy.RelativeBias.alibi(np.array([0.1, 0.2, 0.3, 0.4]))):
        ropecy.attention(Q, K, V, bias=bias, **how)
        tracemalloc.start()
        ropecy.attention(Q, K, V, bias=bias, **how)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 3 * peaks[0]
    with pytest.raises(MemoryError, match="the bias at the offsets of all sequences"):
        ropecy.attention(
            Q[0, :6], Q[0, :6], Q[0, :6], lengths=[3, 3], q_offset=[0, 10**13], bias=ropecy.RelativeBias.alibi(1.0)
        )


def test_offsets_by_which_nothing_goes_make_no_parts(rng):
    Q, K, V = rng.standard_normal((3, 800, 4))
    found = ropecy.plan(Q, K, V, lengths=[8] * 100, q_offset=np.arange(100))
    assert found.bytes == ropecy.plan(Q, K, V, lengths=[8] * 100).bytes
