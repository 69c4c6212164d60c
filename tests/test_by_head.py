"""Heads with plans of their own: each takes what is cheapest for it, and the certificate tells which."""

import pickle

import numpy as np
import oracle
import pytest
from inside import chosen

import ropecy
from ropecy.engines.base import Context
from ropecy.engines.parts.executable import InParts
from ropecy.engines.parts.groups import groups
from ropecy.problem.normal_form import normal_form
from ropecy.problem.problem import Problem, in_order
from ropecy.problem.request import Request

N, D = 1500, 4
MILD, SHARP = 0.5, 60.0


def _case(rng, bounds, n=N, d=D, group=1, dtype=np.float64):
    """Queries, keys and values whose scores in head h are within bounds[h], and come near it."""
    bounds = np.asarray(bounds)[:, None, None]
    Q, K = (X / np.linalg.norm(X, axis=-1, keepdims=True) for X in rng.standard_normal((2, len(bounds), n, d)))
    V = rng.uniform(-1, 1, (len(bounds), n, d))
    Q = np.repeat(Q * np.sqrt(bounds), group, axis=0)
    return {"Q": Q.astype(dtype), "K": (K * np.sqrt(bounds)).astype(dtype), "V": V.astype(dtype), "scale": 1.0}


def _assert_within(found, certificate, dense):
    """O within its certificate, head by head in units of that head's own range."""
    assert np.all(np.abs(found - dense.O) <= certificate.truncation * dense.value_range + certificate.rounding * 2)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "key mask": {"key_mask": np.arange(N) % 7 > 0},
    "alibi": {"bias": oracle.Alibi(0.05), "causal": True},
    "near": {"near": (6, 2.0), "causal": True},
    "sample": {"certify": "sample", "seed": 1},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_a_sharp_head_leaves_the_others_their_polynomial(options, rng, ours):
    case = {**_case(rng, [MILD, MILD, SHARP, MILD]), **OPTIONS[options]}
    how = {name: case.pop(name) for name in ("certify", "seed") if name in case}
    O, certificate = ropecy.attention(**ours(case), **how, eps=1e-3, return_certificate=True)
    assert certificate.engine == "mixed"
    assert [(heads, part.engine) for heads, part in certificate.parts] == [
        (((0,), (1,), (3,)), "polynomial"),
        (((2,),), "exact"),
    ]
    dense = oracle.attention(**case)
    _assert_within(O, certificate, dense)
    # The sharp head is exact, in rows_truncation too.
    np.testing.assert_allclose(O[2], dense.O[2], atol=1e-12)
    assert certificate.rows_truncation.shape == (4, N)
    assert not certificate.rows_truncation[2].any()
    assert certificate.rows_truncation[[0, 1, 3]].max() == certificate.truncation > 0
    assert np.all(np.abs(O - dense.O) <= certificate.rows_truncation[..., None] * 2 + 1e-9)


@pytest.mark.parametrize(
    ("options", "group"), [("plain", 2), ("causal", 1), ("key mask", 1), ("alibi", 2), ("near", 1)]
)
def test_gradients_are_those_of_every_head(options, group, rng, ours):
    case = {**_case(rng, [MILD, SHARP, MILD], n=2000, group=group), **OPTIONS[options]}
    if "key_mask" in case:
        case["key_mask"] = np.arange(2000) % 7 > 0
    O, vjp = ropecy.attention_vjp(**ours(case), eps=1e-2)
    assert vjp.certificate.engine == "mixed"
    dense, dO = oracle.attention(**case), rng.standard_normal(O.shape)
    g = vjp(dO)
    assert g.certificate.engine == "mixed"
    assert g.certificate.rows_truncation.shape == O.shape[:-1]
    for name, expected in dense.backward(dO).items():
        found, size = getattr(g, name), np.linalg.norm(expected)
        assert np.linalg.norm(found - expected) <= 0.05 * size, name
        if name in ("dQ", "dK", "dV"):
            sharp = slice(group, 2 * group) if name == "dQ" else slice(1, 2)
            np.testing.assert_allclose(found[sharp], expected[sharp], rtol=1e-9, atol=1e-9 * size)


def test_a_bias_of_each_head_has_the_gradient_of_each(rng, ours):
    slopes = np.array([0.02, 0.05, 0.03, 0.04])
    case = {**_case(rng, [MILD, SHARP, MILD, MILD], n=2000), "bias": oracle.Alibi(slopes), "causal": True}
    O, vjp = ropecy.attention_vjp(**ours(case), eps=1e-2)
    assert vjp.certificate.engine == "mixed"
    dO = rng.standard_normal(O.shape)
    expected = oracle.attention(**case).backward(dO)["dbias"]
    np.testing.assert_allclose(vjp(dO).dbias, expected, rtol=0.05, atol=0.05 * np.abs(expected).max())


def test_a_near_scale_of_each_head_has_the_gradient_of_each(rng, ours):
    """Those of slots that are computed together, and apart from others between them."""
    case = {**_case(rng, [MILD, SHARP, MILD], n=2000, group=2), "causal": True, "near": (6, np.arange(6) / 2 - 1)}
    O, vjp = ropecy.attention_vjp(**ours(case), eps=1e-3)
    assert vjp.certificate.engine == "mixed"
    dense, dO = oracle.attention(**case), rng.standard_normal(O.shape)
    np.testing.assert_allclose(O, dense.O, atol=1e-2)
    exact = ropecy.attention_vjp(**ours(case), method="exact")[1](dO).dscale_near
    np.testing.assert_allclose(vjp(dO).dscale_near, exact, rtol=0.02, atol=0.02 * np.abs(exact).max())


def test_degrees_of_their_own_and_one_engine(rng):
    case = _case(rng, np.geomspace(0.05, 4, 6), n=3000)
    O, certificate = ropecy.attention(**case, eps=1e-3, method="polynomial", return_certificate=True)
    assert certificate.engine == "polynomial"
    degrees = [part.degree for _, part in certificate.parts]
    assert len(degrees) >= 2
    assert degrees == sorted(degrees)
    assert certificate.degree == degrees[-1]
    assert certificate.truncation == max(part.truncation for _, part in certificate.parts)
    # The rounding of a part is in units of the range of its own values.
    assert 0 < certificate.rounding <= max(part.rounding for _, part in certificate.parts)


def test_heads_of_constant_values_round_in_the_unit_of_all(rng):
    case = _case(rng, [MILD, SHARP, MILD])
    case["V"][1], case["V"][::2] = 1e6, case["V"][::2] * 1e-3
    O, certificate = ropecy.attention(**case, return_certificate=True, causal=True)
    dense = oracle.attention(**case, causal=True)
    assert certificate.engine == "mixed"
    allowed = certificate.truncation * dense.value_range + certificate.rounding * 2e-3
    assert np.all(np.abs(O - dense.O) <= allowed)


def test_every_head_is_in_one_part(rng):
    case = _case(rng, np.geomspace(0.05, 4, 6), n=3000)
    O, certificate = ropecy.attention(**case, eps=1e-3, method="polynomial", return_certificate=True)
    assert sorted(sum((heads for heads, _ in certificate.parts), ())) == [(h,) for h in range(6)]
    some = oracle.attention(**{**case, "Q": case["Q"][:, ::20]})
    _assert_within(O[:, ::20], certificate, some)


def test_heads_alike_have_one_plan(rng):
    case = _case(rng, [MILD] * 4)
    _, certificate = ropecy.attention(**case, return_certificate=True)
    assert certificate.engine == "polynomial"
    assert certificate.parts == ()


def test_heads_of_a_batch_are_named_by_both_indices(rng):
    case = {name: X.reshape(2, 2, N, D) for name, X in _case(rng, [MILD, MILD, MILD, SHARP]).items() if name != "scale"}
    _, certificate = ropecy.attention(**case, scale=1.0, return_certificate=True)
    assert certificate.parts[1][0] == ((1, 1),)
    assert str(certificate).splitlines()[2].startswith("  head (1, 1): exact: error <= ")


def test_what_certificates_and_plans_say(rng):
    case = _case(rng, [MILD, MILD, SHARP, MILD])
    plan = ropecy.plan(**case)
    lines = str(plan).splitlines()
    assert plan.engine == "mixed"
    assert any(line.startswith("-> mixed") for line in lines)
    assert any(line.startswith("   exact") for line in lines)
    assert "result    mixed, degree 3 (35 features): error <= " in str(plan)
    assert "  heads 0, 1, 3: polynomial, degree 3 (35 features): error <= " in str(plan)
    assert "  head 2: exact: error <= " in str(plan)
    assert plan.reason.startswith("heads 0, 1, 3: the cheapest engine that certifies eps; head 2: ")
    assert set(plan.seconds) == {"exact", "mixed"}
    assert plan.seconds["mixed"] < plan.seconds["exact"]


def test_an_engine_that_is_insisted_on_names_the_heads_that_it_refuses(rng):
    case = _case(rng, [MILD, SHARP, MILD])
    with pytest.raises(ropecy.BoundedEntryError, match=r"head 1: scores are bounded by B = 60 only .* no degree"):
        ropecy.attention(**case, method="polynomial")
    with pytest.raises(ropecy.BoundedEntryError, match=r"scores are bounded by B = 60 only"):
        ropecy.attention(**case, degree=3)


def test_only_heads_that_round_past_eps_are_warned_of(rng):
    case = _case(rng, [MILD, 3e4, MILD], n=3000, dtype=np.float32)
    with pytest.warns(ropecy.AccuracyWarning, match=r"eps = 0.001"):
        _, certificate = ropecy.attention(**case, return_certificate=True)
    assert certificate.engine == "mixed"
    assert certificate.error > 1e-3


def test_threads_change_no_bit(rng):
    case = _case(rng, [MILD, SHARP, 2 * MILD, MILD])
    one, two = (ropecy.attention_vjp(**case, threads=threads, causal=True) for threads in (1, 2))
    assert np.array_equal(one[0], two[0])
    dO = rng.standard_normal(one[0].shape)
    for name in ("dQ", "dK", "dV"):
        assert np.array_equal(getattr(one[1](dO), name), getattr(two[1](dO), name))


def test_the_logarithms_of_sums_are_those_of_every_head(rng):
    case = _case(rng, [MILD, SHARP, MILD])
    _, certificate, lse = ropecy.attention(**case, return_lse=True, return_certificate=True)
    assert certificate.engine == "mixed"
    np.testing.assert_allclose(lse, oracle.attention(**case).lse, atol=2e-3)


def test_products_with_the_matrix(rng):
    case = _case(rng, [MILD, SHARP, MILD])
    A, X = ropecy.AttentionMatrix(case["Q"], case["K"], scale=1.0), case["V"]
    found, certificate = A.dot(X, return_certificate=True)
    assert certificate.engine == "mixed"
    weights = np.exp(case["Q"] @ case["K"].swapaxes(1, 2))
    assert np.all(np.abs(found - weights @ X) <= certificate.error * (weights @ np.abs(X)))
    found, certificate = A.T.dot(X, return_certificate=True)
    assert certificate.engine == "mixed"
    weights = weights.swapaxes(1, 2)
    assert np.all(np.abs(found - weights @ X) <= certificate.error * (weights @ np.abs(X)))


def test_an_executable_goes_between_processes(rng):
    case = _case(rng, [MILD, SHARP, MILD])
    choice = chosen(**case)
    assert isinstance(choice.executable, InParts)
    sent = pickle.loads(pickle.dumps(choice.executable.measured_by(None)))
    problem = normal_form(Problem(q=case["Q"][:, None], k=case["K"], v=case["V"]), False).problem
    received = sent.measured_by(Context.of(problem, Request()).statistics)
    found = received.forward(problem, False)
    assert np.array_equal(found.o[:, 0], ropecy.attention(**case))
    assert found.certificate.parts == choice.executable.certificate.parts


@pytest.mark.parametrize(
    "more", [{}, {"causal": True}, {"causal": True, "near": (6, 2.0)}, {"bias": ropecy.RelativeBias.alibi(0.05)}]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bits_of_a_head_by_the_worst_case_depend_on_no_other_of_its_degree(dtype, more, rng):
    case = _case(rng, [0.5, 0.7, 0.1, 1.4], group=2, dtype=dtype)
    dO, how = rng.standard_normal((4, N, D)).astype(dtype), {"degree": 4, "eps": 1e-2, "scale": 1.0, **more}

    def beside(other):
        Q, K, V = case["Q"][[0, 1, 2 * other, 2 * other + 1]], case["K"][[0, other]], case["V"][[0, other]]
        O, vjp = ropecy.attention_vjp(Q, K, V, **how)
        assert (vjp.certificate.rule, vjp.certificate.degree, vjp.certificate.parts) == ("worst case", 4, ())
        g = vjp(dO)
        return O[:2], g.dQ[:2], g.dK[0], g.dV[0]

    first = beside(1)
    for other in (2, 3):
        for X, Y in zip(first, beside(other), strict=True):
            np.testing.assert_array_equal(X, Y)
    # Those of the smaller scores have a polynomial of their own, which is more exact.
    if not {"near", "bias"} & more.keys():
        O = ropecy.attention(case["Q"][[0, 1, 4, 5]], case["K"][[0, 2]], case["V"][[0, 2]], **how)
        dense = oracle.attention(Q=case["Q"][4:6], K=case["K"][2:3], V=case["V"][2:3], scale=1.0, **more)
        assert np.abs(O[2:] - dense.O).max() < 1e-5


@pytest.mark.parametrize("bounds", [[0.5, 60.0, 0.5], [1.0, 1.0, 1.0], [0.1, 1.0, 4.0]])
def test_the_group_of_a_head_is_its_own(bounds, rng):
    """Each head is in the group that it is in beside others of the same scores."""
    case = _case(rng, bounds, n=3000)

    def grouped(which):
        problem = Problem(q=case["Q"][which][:, None], k=case["K"][which], v=case["V"][which])
        return list(groups(Context.of(problem, Request())).together.values())

    expected = grouped([0, 1, 2])
    again = grouped([2, 1, 0])
    assert sorted(map(sorted, again)) == sorted(sorted(2 - slot for slot in slots) for slots in expected)


def test_slots_that_follow_one_another_are_no_copies():
    assert in_order(np.array([2, 3, 4])) == slice(2, 5)
    assert in_order(np.array([1, 3])).tolist() == [1, 3]
