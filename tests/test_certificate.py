"""What a certificate says, and what happens where none can be given."""


import cases
import numpy as np
import oracle
import pytest

import ropecy
from ropecy.planning import plain_calls, planner


def _bounded(rng, n=97, d=4, dtype=np.float64):
    Q, K, V = rng.standard_normal((3, n, d)).astype(dtype)
    return cases.unit_rows(Q), cases.unit_rows(K), V


@pytest.mark.parametrize("method", ["exact", "polynomial", "fft"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_error_is_truncation_and_rounding(method, dtype, rng):
    Q, K, V = _bounded(rng, dtype=dtype)
    _, certificate = ropecy.attention(Q, K, V, method=method, return_certificate=True)
    assert certificate.engine == method
    assert certificate.rounding > 0
    assert certificate.truncation >= 0
    assert certificate.error == pytest.approx(certificate.truncation + certificate.rounding, rel=1e-12)
    assert certificate.error <= 1e-3


def test_exact_truncates_nothing(rng):
    _, certificate = ropecy.attention(*_bounded(rng), method="exact", return_certificate=True)
    assert certificate.rule == "exact"
    assert certificate.truncation == 0


def test_polynomial_names_its_degree_and_features(rng):
    _, certificate = ropecy.attention(*_bounded(rng), method="polynomial", degree=6, return_certificate=True)
    assert certificate.rule == "worst case"
    assert certificate.degree == 6
    assert certificate.n_features == 210  # C(4 + 6, 6)


def _largest_score(q, k, scale):
    """max |s| with keys as they are or centred, whichever is smaller: a bound must cover one of the two."""
    return min(np.abs(scale * q @ (k - c).T).max() for c in (0.0, k.mean(axis=0)))


def test_bound_covers_the_scores(rng):
    Q, K, V = _bounded(rng)
    _, certificate = ropecy.attention(Q, K, V, method="polynomial", return_certificate=True)
    assert _largest_score(Q, K, 0.25) <= certificate.bound
    assert certificate.bound <= 1.1  # by Cauchy-Schwarz 1, of rows of norm 2 at scale 1/4


def test_smaller_eps_takes_a_larger_degree(rng):
    Q, K, V = _bounded(rng)
    degrees = [
        ropecy.attention(Q, K, V, method="polynomial", eps=eps, return_certificate=True)[1].degree
        for eps in (1e-1, 1e-3, 1e-5, 1e-8)
    ]
    assert degrees == sorted(set(degrees))


def test_certificate_prints(rng):
    for method in ("exact", "polynomial", "fft"):
        _, certificate = ropecy.attention(*_bounded(rng), method=method, return_certificate=True)
        assert method in str(certificate)


def test_batch_carries_the_certificate_of_its_worst_head(rng):
    Q, K, V = (rng.standard_normal((2, 50, 3)) for _ in range(3))
    Q, K = cases.unit_rows(Q), cases.unit_rows(K)
    Q[1] *= 2.0

    def bound(*arrays):
        return ropecy.attention(*arrays, method="polynomial", return_certificate=True)[1].bound

    assert bound(Q, K, V) == pytest.approx(max(bound(Q[0], K[0], V[0]), bound(Q[1], K[1], V[1])), rel=1e-6)


def test_masked_keys_and_values_do_not_set_the_bound(rng):
    Q, K, V = _bounded(rng)
    mask = np.ones(97, dtype=bool)
    mask[5] = False
    K[5], V[5] = 1e6, 1e6
    O, certificate = ropecy.attention(Q, K, V, key_mask=mask, method="polynomial", return_certificate=True)
    assert certificate.bound <= 2
    expected = oracle.attention(Q, K, V, key_mask=mask)
    assert np.all(np.abs(O - expected.O) <= 1e-3 * expected.value_range + 1e-12)


def test_attention_factor_is_in_the_bound(rng, ours):
    case = cases.make("rope_attention_factor", rng, unit=True)
    _, certificate = ropecy.attention(**ours(case), method="polynomial", return_certificate=True)
    dense = oracle.attention(**case)
    assert _largest_score(dense.q, dense.k, dense.scale) <= certificate.bound


@pytest.mark.parametrize("size", [15.0, 60.0, 900.0])
def test_polynomial_refuses_large_scores(size, rng):
    Q, K, V = _bounded(rng, d=8)
    Q *= size
    for call in (ropecy.attention, ropecy.attention_vjp):
        with pytest.raises(ropecy.BoundedEntryError, match=r"\bB\b") as caught:
            call(Q, K, V, method="polynomial")
        assert "degree" in str(caught.value)
        assert "features" in str(caught.value) or "exact" in str(caught.value)
    assert issubclass(ropecy.BoundedEntryError, ValueError)


def test_memory_that_no_machine_has_is_refused_before_the_work(rng):
    Q, K, V = _bounded(rng, n=20, d=128)  # 7.2e9 monomials of degree 6
    with pytest.raises(MemoryError, match=r"\d"):
        ropecy.attention(Q, K, V, method="polynomial", degree=6)


def test_auto_takes_exact_for_large_scores(rng):
    Q, K, V = _bounded(rng)
    O, certificate = ropecy.attention(50 * Q, K, V, return_certificate=True)
    assert certificate.engine == "exact"
    np.testing.assert_allclose(O, oracle.attention(50 * Q, K, V).O, atol=1e-12)


def test_auto_takes_the_polynomial_where_it_pays(rng):
    Q, K, V = _bounded(rng, n=8192, d=2, dtype=np.float32)
    _, certificate = ropecy.attention(Q, K, V, eps=1e-2, return_certificate=True)
    assert certificate.engine == "polynomial"


def test_degree_that_cannot_hold_eps_is_refused(rng):
    with pytest.raises(ropecy.BoundedEntryError, match="degree"):
        ropecy.attention(*_bounded(rng), method="polynomial", degree=1, eps=1e-6)


def test_eps_below_rounding_is_refused_by_the_polynomial_and_said_by_exact(rng):
    Q, K, V = _bounded(rng, dtype=np.float32)
    with pytest.raises(ropecy.BoundedEntryError):
        ropecy.attention(Q, K, V, method="polynomial", eps=1e-12)
    _, certificate = ropecy.attention(Q, K, V, method="exact", eps=1e-12, return_certificate=True)
    assert certificate.error > 1e-12


@pytest.mark.parametrize("name", ["plain", "causal", "key_mask", "wide", "long", "bias_table", "everything"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exact_rounding_is_covered(name, dtype, rng, ours):
    case = cases.make(name, rng, dtype)
    case["V"] += dtype(1000)  # an offset is what makes rounding large beside the range
    dense = oracle.attention(**case)
    weights = dense.P.astype(np.longdouble)  # the rounding of the oracle's own product must not count
    expected = weights @ dense.v / weights.sum(axis=-1, keepdims=True)
    O, certificate = ropecy.attention(**ours(case), method="exact", return_certificate=True)
    kept = np.broadcast_to(case.get("key_mask", True), dense.v.shape[:-1])[..., None]
    spread = np.where(kept, dense.v, -np.inf).max(axis=-2) - np.where(kept, dense.v, np.inf).min(axis=-2)
    assert np.all(np.abs(O - expected).max(axis=(-2, -1)) <= certificate.error * spread.max(axis=-1))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("window", 5),
        ("window", (2, 3)),
        ("bias", ropecy.RelativeBias.alibi(-0.1)),
        ("bias", ropecy.RelativeBias.kerple(0.5, 1.5, "power")),
        ("near field", ropecy.RelativeBias(np.zeros(2001))),
    ],
)
def test_what_the_polynomial_engine_does_not_do_is_named(argument, value, rng):
    Q, K, V = _bounded(rng)
    for call in (ropecy.attention, ropecy.attention_vjp):
        with pytest.raises(NotImplementedError, match=argument):
            call(Q, K, V, method="polynomial", **{"bias" if argument == "near field" else argument: value})


def test_plan_agrees_with_the_call_and_computes_nothing(rng):
    Q, K, V = _bounded(rng, n=200)
    for method in ("exact", "polynomial", "fft", "auto"):
        plan = ropecy.plan(Q, K, V, method=method)
        _, certificate = ropecy.attention(Q, K, V, method=method, return_certificate=True)
        assert plan.engine == certificate.engine
        assert plan.certificate.degree == certificate.degree
        assert plan.engine in str(plan)


def test_plan_without_values(rng):
    Q, K, _ = _bounded(rng)
    assert ropecy.plan(Q, K, method="polynomial").certificate.truncation <= 1e-3


def test_certificate_of_gradients(rng):
    Q, K, V = _bounded(rng)
    O, vjp = ropecy.attention_vjp(Q, K, V, method="polynomial")
    assert vjp.certificate.engine == "polynomial"
    assert vjp.certificate.error <= 1e-3
    assert vjp(O).certificate.engine == "polynomial"


@pytest.mark.parametrize(
    "call",
    [
        ropecy.attention,
        ropecy.attention_vjp,
        ropecy.plan,
        lambda Q, K, V: ropecy.loss(Q, K, V, V),
        lambda Q, K, V: ropecy.loss_grad(Q, K, V, V),
        lambda Q, K, V: ropecy.AttentionMatrix(Q, K) @ V,
    ],
)
def test_auto_warns_of_long_exact_work_where_it_is_called(call, rng, monkeypatch):
    Q, K, V = rng.standard_normal((3, 50, 4)) * 10
    monkeypatch.setattr(planner, "_MINUTE", 0.0)
    monkeypatch.setattr(planner, "_SMALL", 0)
    with pytest.warns(ropecy.PerformanceWarning, match=r"exact attention is predicted to take .* s: ") as caught:
        call(Q, K, V)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("method", ["exact", "polynomial", "fft"])
def test_every_method_warns_of_long_work_once(method, rng, monkeypatch):
    Q, K, V = _bounded(rng)
    monkeypatch.setattr(planner, "_MINUTE", 0.0)
    monkeypatch.setattr(planner, "_SMALL", 0)
    monkeypatch.setattr(plain_calls, "serves", lambda *arguments: False)
    said = "exact attention" if method == "exact" else rf"{method} attention of degree \d, [\d,]+ features,"
    for call in (ropecy.attention, ropecy.attention_vjp, ropecy.plan):
        with pytest.warns(ropecy.PerformanceWarning, match=rf"^{said} is predicted to take .* s: ") as caught:
            call(Q, K, V, method=method)
        # Of what would run, and not of what plan compares it with.
        assert len(caught) == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_k", [96, 3000, 100_000])
@pytest.mark.parametrize("bounded", [True, False])
def test_sums_of_equal_terms_are_covered(n_k, bounded, dtype, rng):
    # All are rounded to the same side. The last value is 0, lest values be centred.
    worst = 0
    for _ in range(20):
        Q, V = np.ones((9, 2)), np.ones((n_k, 8)) * rng.uniform(1, 2, 8)
        K = np.ones((n_k, 2)) * (rng.uniform(-1, 1) if bounded else rng.uniform(30, 40))
        V[-1] = 0
        Q, K, V = (X.astype(dtype) for X in (Q, K, V))
        O, certificate = ropecy.attention(Q, K, V, scale=1.0, method="exact", return_certificate=True)
        expected = V[0].astype(np.longdouble) * (n_k - 1) / n_k
        error = float(np.abs(O - expected).max()) / float(V.max())
        assert error <= certificate.rounding
        worst = max(worst, error)
    assert certificate.rounding < 130 * np.finfo(dtype).eps / 2 or not bounded
    assert worst > 10 * np.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_of_equal_terms_with_a_family_are_covered(dtype, rng):
    family = ropecy.RelativeFamily(np.broadcast_to(np.eye(2, dtype=dtype), (3999, 2, 2)).copy(), 2000)
    for _ in range(3):
        K, V = np.full((2000, 2), rng.uniform(-1, 1)), np.ones((2000, 8)) * rng.uniform(1, 2, 8)
        Q, K, V = (X.astype(dtype) for X in (np.ones((2000, 2)), K, V))
        O, certificate = ropecy.attention(Q, K, V, family, scale=1.0, method="exact", return_certificate=True)
        assert np.abs(O - V).max() <= certificate.rounding * V.max()


@pytest.mark.parametrize("hidden", [False, True])
def test_rows_with_few_far_keys_are_certified_for_less(hidden, rng):
    n, d = 700, 2
    Q, K = (cases.unit_rows(rng.standard_normal((n, d))) for _ in range(2))
    V = rng.uniform(-1, 1, (n, 2))
    how = {"causal": True, "scale": 0.5, "eps": 0.2, "method": "polynomial", "degree": 1}
    # Hidden keys of a row's own chunk are none that are near.
    mask = np.arange(n) % 5 == 0 if hidden else None
    O, found = ropecy.attention(Q, K, V, key_mask=mask, return_certificate=True, **how)
    planned = ropecy.plan(Q, K, V, key_mask=mask, **how).certificate
    rows, chunk = found.rows_truncation, np.flatnonzero(found.rows_truncation)[0]
    assert found.rule == "worst case" and found.truncation == rows.max() <= planned.truncation
    assert 50 <= chunk < 400  # pairs in the first chunk are exact
    assert np.all(np.diff(rows[chunk : chunk + 50]) <= 0)  # near keys become more, far ones do not
    dense = oracle.attention(Q, K, V, key_mask=mask, causal=True, scale=0.5)
    allowed = rows[:, None] * dense.ranges(V) + found.rounding * np.ptp(V)
    assert np.all(np.abs(O - dense.O) <= allowed)
    # A whole pair may be off by as much as ever, wherever it is.
    _, of_product = ropecy.AttentionMatrix(Q, K, key_mask=mask, **how).dot(V, return_certificate=True)
    assert of_product.truncation >= 2 * planned.truncation / (1 + planned.truncation**2) * (1 - 1e-12)


@pytest.mark.parametrize("few", [False, True])
def test_rows_of_the_second_chunk_come_near_their_certificate(few):
    # Far keys at one end of the scores and near ones at the other are the worst there is.
    n = 192
    side = np.repeat([1.0, -1.0], n // 2)
    Q, K, V = np.ones((n, 1)), side[:, None], (side[:, None] > 0).astype(float)
    # Of one far key beside many near ones, its share of the row alone is what errors are in proportion to.
    mask = np.arange(n) % (n // 2) > 0 if few else np.ones(n, bool)
    mask[: n // 2] ^= few
    how = {"causal": True, "scale": 1.0, "key_mask": mask}
    options = {"eps": 0.2, "method": "polynomial", "degree": 1}
    O, found = ropecy.attention(Q, K, V, return_certificate=True, **how, **options)
    errors = np.abs(O - oracle.attention(Q, K, V, **how).O)[:, 0]
    assert np.all(errors <= found.rows_truncation + found.rounding)
    assert errors[-1] > (0.9 if few else 0.15) * found.rows_truncation[-1]
