"""The oracle itself: against finite differences, against PyTorch, and against the papers' form q R_{j-i} k^T."""

import cases
import numpy as np
import oracle
import pytest


def _parameters(case):
    """The arguments that have a gradient, and the name of it."""
    names = {name: "d" + name for name in ("Q", "K", "V", "W", "W_Q", "W_K", "W_V") if name in case}
    return {**names, **({"bias": "dbias"} if "bias" in case else {})}


def _moved(case, name, step):
    """The case with one argument moved by step."""
    if name != "bias":
        return {**case, name: case[name] + step}
    bias = case["bias"]
    kind = type(bias)
    return {**case, "bias": kind((bias.values if kind is oracle.Table else bias.slope) + step)}


@pytest.mark.parametrize("name", cases.SPECS)
def test_gradients_match_finite_differences(name, rng):
    case = cases.make(name, rng)
    dense = oracle.attention(**case)
    dO = cases.upstream(case, dense, rng)
    gradients = dense.backward(dO)
    for argument, gradient in _parameters(case).items():
        gradient = gradients[gradient]
        direction = rng.standard_normal(np.shape(gradient))
        h = 1e-5
        forward = oracle.attention(**_moved(case, argument, h * direction)).O
        backward = oracle.attention(**_moved(case, argument, -h * direction)).O
        expected = np.vdot(dO, forward - backward) / (2 * h)
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(np.vdot(gradient, direction) - expected) <= 2e-8 * max(size, 1.0), argument


@pytest.mark.parametrize("name", cases.SPECS)
def test_gradients_have_the_shapes_of_their_arguments(name, rng):
    case = cases.make(name, rng)
    dense = oracle.attention(**case)
    gradients = dense.backward(cases.upstream(case, dense, rng))
    for argument, gradient in _parameters(case).items():
        if argument != "bias":
            assert gradients[gradient].shape == case[argument].shape


@pytest.mark.parametrize("rope", [{}, {"pairing": "interleaved"}, {"rotary_dim": 4}, {"attention_factor": 1.5}])
def test_rotations_factor(rope, rng):
    R = oracle.Rope(6, **rope)
    q, k = rng.standard_normal((2, 6))
    for i, j in [(0, 0), (3, 11), (-7, 20), (1000, 3)]:
        rotated = R.rotate(q, i) @ R.rotate(k, j)
        assert rotated == pytest.approx(q @ R.matrix(j - i) @ k, rel=1e-12, abs=1e-12)
        assert R.rotate(q, i) @ k == pytest.approx(q @ R.rotate(k, i, transpose=True), rel=1e-12, abs=1e-12)


def test_pairings_differ_by_a_permutation(rng):
    x = rng.standard_normal(6)
    order = [0, 2, 4, 1, 3, 5]
    half = oracle.Rope(6).rotate(x[order], 5)
    interleaved = oracle.Rope(6, pairing="interleaved").rotate(x, 5)
    np.testing.assert_allclose(half, interleaved[order], rtol=1e-14)


def test_hidden_keys_may_be_anything(rng):
    case = cases.make("key_mask_per_row", rng)
    shown = oracle.attention(**case)
    hidden = np.broadcast_to(~case["key_mask"], case["K"].shape[:-1])
    poisoned = {**case, "K": case["K"].copy(), "V": case["V"].copy()}
    poisoned["K"][hidden] = np.nan
    poisoned["V"][hidden] = np.inf
    np.testing.assert_array_equal(oracle.attention(**poisoned).O, shown.O)


def test_matches_torch(rng):
    torch = pytest.importorskip("torch")
    for name in ("plain", "causal", "batch_and_heads", "grouped_queries", "key_mask_per_row", "bias_table"):
        case = {key: value for key, value in cases.make(name, rng).items() if key != "R"}
        dense = oracle.attention(**case)
        dO = cases.upstream(case, dense, rng)
        Q, K, V = (torch.tensor(case[x], requires_grad=True) for x in "QKV")
        n, n_k = Q.shape[-2], K.shape[-2]
        t = np.arange(n_k) - np.arange(n)[:, None]
        mask = np.zeros((n, n_k))
        if case.get("causal"):
            mask = np.where(t <= 0, mask, -np.inf)
        if "bias" in case:
            mask = mask + case["bias"].symbol(t)
        if "key_mask" in case:
            mask = np.where(case["key_mask"][..., None, :], mask, -np.inf)
        grouped = Q.ndim > 2 and Q.shape[-3] != K.shape[-3]
        O = torch.nn.functional.scaled_dot_product_attention(
            Q, K, V, attn_mask=torch.tensor(mask), scale=1.0 / Q.shape[-1], enable_gqa=grouped
        )
        O.backward(torch.tensor(dO))
        np.testing.assert_allclose(dense.O, O.detach().numpy(), rtol=1e-12, atol=1e-12)
        gradients = dense.backward(dO)
        for x, X in zip("QKV", (Q, K, V), strict=True):
            np.testing.assert_allclose(gradients["d" + x], X.grad.numpy(), rtol=1e-11, atol=1e-12)


def test_loss_gradient_matches_finite_differences(rng):
    case = cases.make("projections", rng)
    E = rng.standard_normal(oracle.attention(**case).O.shape)
    gradient = oracle.loss_gradients(E=E, **case)["dW"]
    direction = rng.standard_normal(gradient.shape)
    step = 1e-5 * direction
    difference = oracle.loss(E=E, **_moved(case, "W", step)) - oracle.loss(E=E, **_moved(case, "W", -step))
    assert np.vdot(gradient, direction) == pytest.approx(difference / 2e-5, rel=1e-7)
