"""Numbers of any size where a polynomial or transforms work: merged parts, decayed states, rows that are exact."""

import numpy as np
import oracle
import pytest
from conftest import relative_bias, relative_family
from inside import chosen

import ropecy

F4, F8 = np.float32, np.float64


def uniform(rng, *shape, dtype=F4):
    return rng.uniform(-1, 1, shape).astype(dtype)


def spread(dense):
    """The largest range of a column."""
    return np.ptp(dense.v, axis=-2).max()


@pytest.mark.parametrize("kind", ["hidden keys, steep", "near", "table"])
@pytest.mark.parametrize("size", [1e-30, 1e-19, 1e-13, 1e10, 1e30, 1e38])
def test_values_of_any_size(size, kind, rng, ours):
    # Of keys that a row sees far off, weights are as small as exp(-55): times a small value, nothing is left of them.
    n, mask = 400, np.ones(400, bool)
    mask[200:255] = False
    options = {
        "hidden keys, steep": {"bias": oracle.Alibi(1.0), "key_mask": mask, "causal": True},
        "near": {"near": (30, 1.0)},
        "table": {"bias": oracle.Table(np.sin(np.arange(41)))},
    }[kind]
    Q, K, dO = uniform(rng, n, 4), uniform(rng, n, 4), uniform(rng, n, 3)
    V = (size * rng.uniform(0.1, 1, (n, 3))).astype(F4)
    dense = oracle.attention(Q, K, V, **options)
    expected = dense.backward(dO)
    O, vjp = ropecy.attention_vjp(**ours({"Q": Q, "K": K, "V": V, **options}), method="polynomial")
    assert np.abs(O - dense.O).max() <= vjp.certificate.error * spread(dense)
    g = vjp(dO)
    for name in ("dQ", "dK", "dV", *(["dbias"] if "bias" in options else [])):
        largest = np.abs(expected[name]).max()
        assert np.abs(getattr(g, name) - expected[name]).max() <= 5e-3 * largest, name


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
def test_gradients_beside_a_steep_bias_of_any_size(size, rng, ours):
    n, mask = 400, np.ones(400, bool)
    mask[200:255] = False
    case = {name: uniform(rng, n, 4) for name in "QKV"}
    case |= {"bias": oracle.Alibi(1.0), "key_mask": mask, "causal": True}
    dO = (size * uniform(rng, n, 4)).astype(F4)
    g = ropecy.attention_vjp(**ours(case), method="polynomial")[1](dO)
    for name, expected in oracle.attention(**case).backward(dO).items():
        assert np.abs(getattr(g, name) - expected).max() <= 5e-3 * np.abs(expected).max(), name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [None, 4])
@pytest.mark.parametrize("bias", [1e4, 1e9, -1e9])
def test_a_bias_that_all_keys_have_does_not_drown_the_parts(bias, heads, causal, rng):
    # Near and far are merged by their log sums, which would have no more digits than 1e9 has.
    Q, K, V = uniform(rng, 4, 300, 4, dtype=F8), uniform(rng, 2, 300, 4, dtype=F8), uniform(rng, 2, 300, 3, dtype=F8)
    V += 10
    table = bias + uniform(rng, 21, dtype=F8) if heads is None else bias + uniform(rng, heads, 21, dtype=F8)
    # What is left of the table's digits is the same without the bias that all keys have.
    dense = oracle.attention(Q, K, V, bias=oracle.Table(table - bias), causal=causal)
    options = {"bias": ropecy.RelativeBias(table), "causal": causal, "method": "polynomial", "eps": 1e-11}
    O, certificate, lse = ropecy.attention(Q, K, V, **options, return_certificate=True, return_lse=True)
    assert certificate.engine == "polynomial"
    assert np.abs(O - dense.O).max() <= certificate.error * spread(dense)
    np.testing.assert_allclose(lse, dense.lse + bias, rtol=1e-15, atol=1e-10)
    g = ropecy.attention_vjp(Q, K, V, **options)[1](O)
    for name, expected in dense.backward(O).items():
        difference = np.linalg.norm(getattr(g, name) - expected)
        assert difference <= 1e-9 * np.linalg.norm(expected) + 1e-10, name


@pytest.mark.parametrize("slope", [1e-6, 1.0, 1e5])
def test_merging_parts_is_counted_where_a_bias_is_deep(slope, rng, ours):
    # A row whose next kept key is 50 tokens away sees no more than exp(-50 slope).
    mask = np.ones(400, bool)
    mask[100:150] = False
    Q, K, V = (uniform(rng, 400, 4, dtype=F8) for _ in "QKV")
    case = {"Q": Q, "K": K, "V": V, "bias": oracle.Table(-slope * np.abs(np.arange(-120, 121.0))), "key_mask": mask}
    dense = oracle.attention(**case)
    O, certificate = ropecy.attention(**ours(case), method="polynomial", eps=1e-3, return_certificate=True)
    assert np.abs(O - dense.O).max() <= certificate.error * spread(dense) + 120 * slope * 2.0**-52


@pytest.mark.parametrize("eps", [1e-3, 1e-4, 2e-5])
@pytest.mark.parametrize("depth", [200, 230])
def test_rows_that_are_exact_beside_transforms_round_as_exact_work_does(depth, eps, rng, ours):
    n = 600
    Q, K, V = uniform(rng, n, 4), uniform(rng, n, 4), 1000 + uniform(rng, n, 3)
    V[:5, 0] = -1000
    case = {"Q": Q, "K": K, "V": V, "key_mask": rng.random(n) < 0.5}
    case["bias"] = oracle.Table(np.linspace(-depth, 0, 2 * n - 1))
    planned = chosen(**ours(case), method="fft", eps=eps).executable
    exact = ropecy.plan(**ours(case), method="exact").certificate
    assert planned.symbol.exact_rows and exact.rounding <= planned.certificate.rounding
    O, certificate = ropecy.attention(**ours(case), method="fft", eps=eps, return_certificate=True)
    dense = oracle.attention(**case)
    assert certificate.error <= eps
    assert np.abs(O - dense.O).max() <= certificate.error * spread(dense)
    # Where exact work alone rounds by more, none is promised.
    with pytest.raises(ropecy.BoundedEntryError, match="rounding in float32"):
        ropecy.attention(**ours(case), method="fft", eps=0.9 * exact.rounding)


@pytest.mark.parametrize("n_k", [480, 512, 2048])
def test_sums_of_equal_terms_with_a_family(n_k, rng):
    # All rounded to one side, as many as a block has keys.
    n, K = 64, uniform(rng, n_k, 2)
    family = oracle.Family(uniform(rng, n + n_k - 1, 1), support=np.array([(0, 0)]))
    V = np.tile(rng.uniform(0.5, 1, 16), (n_k, 1)).astype(F4)
    V[0] *= F4(1.0001)
    V[1] = -V[2]
    O, certificate = ropecy.attention(
        np.zeros((n, 2), F4), K, V, relative_family(family), method="exact", return_certificate=True
    )
    dense = oracle.attention(np.zeros((n, 2)), K, V, family)
    assert np.abs(O - dense.O).max() <= 0.5 * certificate.error * spread(dense)


def test_buckets_of_a_long_distance_are_found_at_once(rng):
    # Ten million distances are not looked at one by one.
    table = rng.standard_normal(32)
    for max_distance in (10**7, 10**12):
        bias = ropecy.RelativeBias.t5(table, max_distance=max_distance)
        left, right = bias._form.reach()
        ends = np.array([-left - 1, -left, -left + 1, right - 1, right, right + 1])
        index = bias._form.index(ends)
        assert index[0] == index[1] != index[2] and index[3] != index[4] == index[5]
        Q, K, V = rng.uniform(-1, 1, (3, 300, 4))
        own = oracle.Buckets(table, max_distance)
        expected = oracle.attention(Q, K, V, bias=own).O
        np.testing.assert_allclose(ropecy.attention(Q, K, V, bias=relative_bias(own)), expected, rtol=0, atol=1e-12)
