"""The forward pass against the oracle: every argument, exact, by polynomials, and as auto chooses."""

import cases
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ropecy

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

NARROW = {np.float32: 2.0**-24, np.float64: 2.0**-53}  # the unit roundoff u of what the package computes in


def assert_within_eps(O, dense, eps):
    """|O_ic - Attn_ic| <= eps * range(V_c) over the keys row i sees, and the rounding of storing O."""
    u = NARROW[O.dtype.type]
    allowance = 16 * u * np.abs(dense.v).max(axis=(-2, -1), initial=0.0)[..., None, None]
    excess = np.abs(O - dense.O) - eps * dense.value_range - allowance
    assert excess.max(initial=-1.0) <= 0.0


@pytest.mark.parametrize("name", cases.SPECS)
def test_exact_float64_is_the_oracle(name, rng, ours):
    case = cases.make(name, rng)
    expected = oracle.attention(**case).O
    O = ropecy.attention(**ours(case), method="exact")
    assert O.shape == expected.shape
    assert O.dtype == np.float64
    np.testing.assert_allclose(O, expected, rtol=0, atol=2e-13 * np.abs(case["V"]).max())


@pytest.mark.parametrize("name", cases.SPECS)
def test_exact_float32_is_as_good_as_plain_numpy(name, rng, ours):
    case = cases.make(name, rng, np.float32)
    expected = oracle.attention(**case).O
    plain = oracle.attention(**case, dtype=np.float32).O
    O = ropecy.attention(**ours(case), method="exact")
    assert O.dtype == np.float32
    floor = NARROW[np.float32] * np.linalg.norm(expected)
    assert np.linalg.norm(O - expected) <= 2 * np.linalg.norm(plain - expected) + floor


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", cases.SPECS)
def test_auto_keeps_eps(name, dtype, rng, ours):
    case = cases.make(name, rng, dtype, unit=True)
    dense = oracle.attention(**case)
    O, certificate = ropecy.attention(**ours(case), eps=1e-3, return_certificate=True)
    assert O.dtype == dtype
    if dense.value_range.max() > 0:  # the unit of certificate.error
        assert certificate.error <= 1e-3
    assert_within_eps(O, dense, 1e-3)


@pytest.mark.parametrize("eps", [0.3, 1e-2, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("name", cases.POLYNOMIAL)
def test_polynomial_keeps_eps(name, eps, rng, ours):
    case = cases.make(name, rng, unit=True)
    if case["Q"].shape[-1] > 6:
        eps = max(eps, 1e-3)  # more monomials than a test has time for
    O, certificate = ropecy.attention(**ours(case), eps=eps, method="polynomial", return_certificate=True)
    assert certificate.engine == "polynomial"
    assert certificate.error <= eps
    assert_within_eps(O, oracle.attention(**case), eps)


@pytest.mark.parametrize("eps", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("name", cases.POLYNOMIAL)
def test_polynomial_float32_keeps_eps(name, eps, rng, ours):
    case = cases.make(name, rng, np.float32, unit=True)
    O = ropecy.attention(**ours(case), eps=eps, method="polynomial")
    assert O.dtype == np.float32
    assert_within_eps(O, oracle.attention(**case), eps)


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["rope_half", "causal", "key_mask", "grouped_queries", "prime_lengths", "projections"])
def test_polynomial_of_a_fixed_degree_keeps_its_own_certificate(name, degree, rng, ours):
    case = cases.make(name, rng, unit=True)
    dense = oracle.attention(**case)
    O, certificate = ropecy.attention(
        **ours(case), eps=0.5, method="polynomial", degree=degree, return_certificate=True
    )
    assert certificate.degree == degree
    assert_within_eps(O, dense, certificate.error)


@pytest.mark.parametrize("bound", [0.1, 1.0, 3.0, 6.0])
@pytest.mark.parametrize("causal", [False, True])
def test_polynomial_keeps_eps_over_every_bound(bound, causal, rng):
    Q, K, V = rng.standard_normal((3, 211, 3))
    Q, K = cases.unit_rows(Q), cases.unit_rows(K)
    options = {"scale": bound / 3, "causal": causal}
    O = ropecy.attention(Q, K, V, **options, eps=1e-3, method="polynomial")
    assert_within_eps(O, oracle.attention(Q, K, V, **options), 1e-3)


def test_polynomial_keeps_eps_where_two_keys_attain_the_bound():
    # The error tau(e) range(V) is attained by two keys whose scores are where p is off by +e and by -e.
    Q = np.linspace(-1.0, 1.0, 201)[:, None]
    K = np.array([[1.0], [-1.0], [0.3]])
    V = np.array([[1.0], [-1.0], [1.0]])
    for eps in (1e-1, 1e-2, 1e-3, 1e-5):
        O = ropecy.attention(Q, K, V, scale=1.0, eps=eps, method="polynomial")
        assert_within_eps(O, oracle.attention(Q, K, V, scale=1.0), eps)


@pytest.mark.parametrize("offset", [1.0, 1e3])
def test_values_with_an_offset_keep_eps_of_their_range(offset, rng):
    # The error is promised in units of the range of V, not of its size.
    Q, K, V = rng.standard_normal((3, 97, 4))
    V += offset
    for method in ("exact", "polynomial"):
        O = ropecy.attention(cases.unit_rows(Q), cases.unit_rows(K), V, eps=1e-4, method=method)
        assert_within_eps(O, oracle.attention(cases.unit_rows(Q), cases.unit_rows(K), V), 1e-4)


def test_keys_with_an_offset_are_centred(rng):
    # Softmax does not see a constant added to every key; the bound must not either.
    Q, K, V = rng.standard_normal((3, 97, 4))
    Q, K = cases.unit_rows(Q), cases.unit_rows(K)
    O, certificate = ropecy.attention(Q, K + 30.0, V, eps=1e-3, method="polynomial", return_certificate=True)
    assert certificate.bound <= 2.5
    assert_within_eps(O, oracle.attention(Q, K, V), 1e-3)


def test_equal_values_come_back(rng):
    Q, K = rng.standard_normal((2, 50, 4))
    V = np.full((50, 2), 3.25)
    for method in ("exact", "polynomial"):
        O = ropecy.attention(cases.unit_rows(Q), cases.unit_rows(K), V, method=method, causal=True)
        np.testing.assert_allclose(O, 3.25, rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("causal", [False, True])
def test_scores_of_800_do_not_overflow(dtype, causal, rng, ours):
    Q, K, V = rng.standard_normal((3, 40, 4)).astype(dtype)
    Q, K = (20 * cases.unit_rows(X) for X in (Q, K))
    options = {"scale": 0.5, "causal": causal}
    expected = oracle.attention(Q, K, V, **options)
    assert np.abs(0.5 * Q @ K.T).max() > 700
    for method in ("auto", "exact"):
        O = ropecy.attention(Q, K, V, **options, method=method)
        np.testing.assert_allclose(O, expected.O, atol=1e-11 if dtype == np.float64 else 1e-3)


@pytest.mark.parametrize("method", ["auto", "exact"])
@pytest.mark.parametrize("which", ["Q", "K", "V", "QK", "QKV"])
def test_huge_inputs_give_no_nan(which, method, rng):
    for dtype, huge in ((np.float64, 1e155), (np.float32, 1e25)):
        case = cases.make("causal", rng, dtype)
        for name in which:
            case[name] *= dtype(huge)
        del case["R"]
        try:
            O = ropecy.attention(**case, method=method)
        except (ValueError, OverflowError) as error:  # a clear refusal is as good as a result
            assert len(str(error)) > 20
        else:
            assert np.isfinite(O).all()


@pytest.mark.parametrize("method", ["auto", "exact"])
def test_huge_keys_meet_tiny_queries(method, rng):
    # Every score is ordinary, though the keys' squared norms are not.
    Q, K, V = rng.standard_normal((3, 20, 4))
    expected = oracle.attention(Q, K, V).O
    O = ropecy.attention(Q * 2.0**-520, K * 2.0**520, V, eps=1e-3, method=method)
    np.testing.assert_allclose(O, expected, atol=1e-3 * np.ptp(V) if method == "auto" else 1e-12)


@settings(max_examples=60)
@given(data=st.data())
def test_exact_is_the_oracle_for_any_shape(data):
    draw = data.draw
    heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    n, n_k = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    d, d_v = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    Q = rng.standard_normal((heads * groups, n, d))
    K, V = rng.standard_normal((heads, n_k, d)), rng.standard_normal((heads, n_k, d_v))
    window = draw(st.none() | st.integers(1, 50) | st.tuples(st.integers(0, 20), st.integers(0, 20)))
    options = {"causal": draw(st.booleans()), "window": window, "q_offset": draw(st.integers(-30, 30))}
    expected = oracle.attention(Q, K, V, **options).O
    O = ropecy.attention(Q, K, V, **options, method="exact")
    np.testing.assert_allclose(O, expected, rtol=0, atol=1e-12)


@settings(max_examples=40)
@given(data=st.data())
def test_polynomial_keeps_eps_for_any_shape(data):
    draw = data.draw
    heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    n, n_k = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    d, d_v = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    eps = draw(st.sampled_from([1e-1, 1e-2, 1e-3, 1e-5]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    Q = cases.unit_rows(rng.standard_normal((heads * groups, n, d)))
    K, V = cases.unit_rows(rng.standard_normal((heads, n_k, d))), rng.standard_normal((heads, n_k, d_v))
    options = {"causal": draw(st.booleans()), "q_offset": draw(st.integers(-30, 30))}
    O = ropecy.attention(Q, K, V, **options, eps=eps, method="polynomial")
    assert_within_eps(O, oracle.attention(Q, K, V, **options), eps)
