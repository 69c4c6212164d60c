"""RoPEAttention: ordinary RoPE, scores within a bound, a near field, plans without data, training."""

import copy
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch_cases import SDPA, check_same, gradients, padding, tensors  # noqa: E402

import ropecy  # noqa: E402
from ropecy.attention import differentiable  # noqa: E402
from ropecy.torch import RoPEAttention  # noqa: E402


def scores_of(layer, x, monkeypatch):
    """The largest score that the layer forms of x."""
    met = []

    def watch(Q, K, V, **options):
        rows = [options["R"].rotate(X.astype(np.float64)) for X in (Q, np.repeat(K, Q.shape[-3] // K.shape[-3], -3))]
        met.append(float(np.abs(options["scale"] * rows[0] @ rows[1].swapaxes(-1, -2)).max()))
        return ropecy.attention(Q, K, V, **options)

    monkeypatch.setattr("ropecy.torch.operators.attention", watch)
    layer(x)
    return met[0]


def test_layer_is_sdpa_on_rotated_rows():
    torch.manual_seed(3)
    layer = RoPEAttention(24, 6, num_kv_heads=2, bias=True).double()
    x, mask = torch.randn(2, 17, 24, dtype=torch.float64), padding(2, 17)
    x = torch.where(mask[..., None], x, 0)  # padding is read as 0
    q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = (torch.from_numpy(layer.rotary.rotate(y.detach().numpy())) for y in (q, k))
    seen = mask[:, None, None] & torch.ones(17, 17, dtype=torch.bool).tril()
    expected = layer.o_proj(SDPA(q, k, v, seen, enable_gqa=True).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, mask), expected, rtol=0, atol=1e-12)


def test_layer_by_positions():
    """Only differences of positions count, and rows of a batch may have their own."""
    torch.manual_seed(3)
    layer = RoPEAttention(24, 3).double()
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    moved = torch.stack([torch.arange(17) + 5, torch.arange(17) + 1000])
    torch.testing.assert_close(layer(x, positions=moved), layer(x), rtol=0, atol=1e-12)
    stretched = layer(x, positions=2 * torch.arange(17))
    assert (stretched - layer(x)).abs().max() > 1e-3


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_bounded_scores(factor, monkeypatch):
    """Whatever weights, temperatures and an attention factor do, B holds; and it can be reached."""
    torch.manual_seed(3)
    ones = [1.0] * 4
    rule = {"rope_type": "longrope", "short_factor": ones, "long_factor": ones, "factor": 1.0}
    rule |= {"original_max_position_embeddings": 64, "attention_factor": factor}
    layer = RoPEAttention(32, 4, num_kv_heads=2, bound=2.0, rotary=ropecy.Rotary(8, scaling=rule)).double()
    with torch.no_grad():
        layer.temperature.fill_(30.0)
        for p in (layer.q_proj, layer.k_proj):
            p.weight.mul_(100)
        layer.k_proj.weight.copy_(layer.q_proj.weight[:16])
    largest = scores_of(layer, torch.randn(2, 50, 32, dtype=torch.float64), monkeypatch)
    assert 1.9 < largest <= 2.0 * (1 + 1e-9)


@pytest.mark.parametrize(("near", "near_by_head"), [(None, False), (0, True), (5, False), (5, True)])
def test_near_field_of_a_bounded_layer(near, near_by_head):
    """The far scores' products at a temperature of their own; without it, the bounded layer."""
    torch.manual_seed(3)
    layer = RoPEAttention(
        24, 6, num_kv_heads=2, bound=2.0, near=near, near_by_head=near_by_head, method="exact"
    ).double()
    if layer.log_scale_near is not None:
        assert layer.log_scale_near.shape == (6 if near_by_head else 1,)
        with torch.no_grad():
            layer.log_scale_near += torch.linspace(-1, 1, 6)[: len(layer.log_scale_near)]
    x, mask = torch.randn(2, 17, 24, dtype=torch.float64), padding(2, 17)
    x = torch.where(mask[..., None], x, 0)
    q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = (torch.nn.functional.normalize(y, dim=-1) for y in (q * 1.0, k))
    q = q * layer.temperature.sigmoid()
    q, k = (torch.from_numpy(layer.rotary.rotate(y.detach().numpy())) for y in (q, k))
    s = q @ k.repeat_interleave(3, dim=1).mT
    t = torch.arange(17) - torch.arange(17)[:, None]
    if near:
        s = torch.where(t.abs() < near, layer.log_scale_near.exp()[:, None, None] * s, 2.0 * s)
    else:
        assert layer.log_scale_near is None
        s = 2.0 * s
    P = torch.where(mask[:, None, None] & (t <= 0), s, -math.inf).softmax(-1)
    seen = (mask[:, None, None] & (t <= 0)).any(-1, keepdim=True)
    O = torch.where(seen, P, 0) @ v.repeat_interleave(3, dim=1)
    y = layer(x, mask)
    torch.testing.assert_close(y, layer.o_proj(O.transpose(1, 2).flatten(2)), rtol=0, atol=1e-12)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize(
    "head_dim, bound, rotary, eps",
    [(16, 2.0, None, 1e-1), (8, 4.0, ropecy.Rotary(8, rotary_dim=4), 1e-1), (8, 2.0, None, 1e-2)],
)
def test_near_and_far_by_the_polynomial_at_8192_tokens(head_dim, bound, rotary, eps, monkeypatch):
    """Chosen by method auto with the layer's own near field, and its gradients are those of exact attention."""
    torch.manual_seed(3)
    layer = RoPEAttention(head_dim, 1, bound=bound, rotary=rotary, eps=eps)
    assert layer.near == 64 and layer.method == "auto"
    engines = []

    def watch(Q, K, V, R, options):
        found = differentiable(Q, K, V, R, options)
        engines.append((found.certificate.engine, found.certificate.error))
        return found

    monkeypatch.setattr("ropecy.torch.operators.differentiable", watch)
    x = torch.randn(1, 8192, head_dim)
    found = gradients(lambda x: layer(x), [x.requires_grad_()]), [p.grad.clone() for p in layer.parameters()]
    assert engines[0][0] == "polynomial" and engines[0][1] <= eps
    layer.method = "exact"
    layer.zero_grad()
    exact = gradients(lambda x: layer(x), [x]), [p.grad.clone() for p in layer.parameters()]
    assert engines[1][0] == "exact"
    for name, places in {"O": slice(1), "gradients": slice(1, None)}.items():
        ours, theirs = (torch.cat([X.flatten() for X in (both[0] + both[1])[places]]) for both in (found, exact))
        assert torch.linalg.norm(ours - theirs) <= eps * torch.linalg.norm(theirs), name


def test_layer_plans_without_data():
    layer = RoPEAttention(32, 4, bound=1.0)
    plan = layer.plan(100_000)
    assert plan.engine == "polynomial"
    assert plan.certificate.error <= layer.eps and plan.gradient_certificate.error <= layer.eps
    assert plan.certificate.bound == pytest.approx(1.0, rel=1e-4)
    with pytest.raises(ropecy.BoundedEntryError):
        RoPEAttention(32, 4, bound=40.0, method="polynomial").plan(1000)
    with pytest.raises(ValueError, match="bound: got None"):
        RoPEAttention(32, 4).plan(1000)


def test_layer_trains_by_the_polynomial_engine(monkeypatch):
    """A few steps of gradient descent by either engine go the same way."""
    torch.manual_seed(3)
    exact = RoPEAttention(16, 2, bound=1.0, method="exact")
    poly = copy.deepcopy(exact)
    poly.method = "polynomial"
    x, y = torch.randn(2, 2, 128, 16)
    for layer in (exact, poly):
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (layer(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert layer.temperature.grad.any()
    for a, b in zip(exact.parameters(), poly.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_kv_heads": 3}, "num_kv_heads: got 3"),
        ({"num_heads": 5}, "num_heads: got 5"),
        ({"rotary": ropecy.Rotary(4)}, "rotary: got a Rotary of width 4, wants head_dim = 8"),
        ({"bound": 0.0}, "bound: got 0.0"),
        ({"embed_dim": 0}, "embed_dim: got 0, wants at least 1"),
        ({"num_heads": 0}, "num_heads: got 0"),
        ({"num_kv_heads": 0}, "num_kv_heads: got 0"),
        ({"head_dim": 0}, "head_dim: got 0"),
        ({"near": -1}, "near: got -1"),
    ],
)
def test_layer_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        RoPEAttention(**({"embed_dim": 32, "num_heads": 4} | arguments))


def test_near_of_another_kind_is_refused():
    for options, message in (({"near": 2.5}, "near: got"), ({"near_by_head": 1.5}, "near_by_head: got")):
        with pytest.raises(TypeError, match=message):
            RoPEAttention(32, 4, bound=1.0, **options)


def test_layer_saves_and_compiles():
    torch.manual_seed(3)
    layer = RoPEAttention(32, 4, num_kv_heads=2, bound=1.0, method="exact").double()
    twin = RoPEAttention(32, 4, num_kv_heads=2, bound=1.0, method="exact").double()
    twin.load_state_dict(layer.state_dict())
    (x,) = tensors((2, 11, 32))
    check_same(torch.compile(twin, fullgraph=True, backend="aot_eager"), layer, [x], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bound", [None, 1.0])
def test_layer_under_autocast(bound):
    torch.manual_seed(3)
    layer = RoPEAttention(32, 4, num_kv_heads=2, bound=bound, method="exact")
    x = torch.randn(2, 11, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), layer(x), rtol=0, atol=2e-2)
    half.float().square().sum().backward()
    assert all(p.grad.any() for p in layer.parameters())
