"""RoPEAttention in use: padding, certificates, weights of another bound, and the defaults that go with bound=True."""

import io
import pickle
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch_cases import gradients, padding  # noqa: E402

import ropecy  # noqa: E402
from ropecy.torch import RoPEAttention  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bound", [None, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e4])
def test_padded_tokens_are_never_read(value, bound, dtype):
    """Whatever they hold: every output, gradient and certificate is what it is with 0 there."""
    torch.manual_seed(3)
    layer = RoPEAttention(16, 2, bound=bound, bias=True, method="auto", eps=0.1).to(dtype)
    mask = padding(3, 40)
    clean = torch.randn(3, 40, 16).to(dtype) * mask[..., None]
    found = []
    for hidden in (0, value):
        x = clean.masked_fill(~mask[..., None], hidden).requires_grad_()
        layer.zero_grad()
        y, certificate = layer(x, mask, return_certificate=True)
        y.float().square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters()), certificate.error])
    *tensors, error = zip(*found, strict=True)
    assert error[0] == error[1]
    for a, b in tensors:
        assert a.isfinite().all() and torch.equal(a, b)
    assert not tensors[1][0][~mask].any()


def test_tokens_that_are_kept_must_be_finite():
    layer, x = RoPEAttention(16, 2), torch.zeros(2, 9, 16)
    x[1, 3, 5] = torch.nan
    with pytest.raises(ValueError, match="x: got NaN or Inf in a token that is kept"):
        layer(x)
    with pytest.raises(ValueError, match="x: got NaN or Inf in a token that is kept"):
        layer(x, torch.arange(9).expand(2, 9) < 4)
    layer.k_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"[QK]: got NaN"):
        layer(torch.ones(2, 9, 16))


def test_masks_of_a_layer():
    layer, x = RoPEAttention(16, 2), torch.zeros(2, 9, 16)
    with pytest.raises(TypeError, match=r"key_mask: got torch\.float32, wants bool"):
        layer(x, torch.ones(2, 9))
    for shape in ((9,), (2, 8), (3, 9), (2, 1, 9)):
        with pytest.raises(ValueError, match=r"key_mask: got shape .*, wants \(batch, n\) = \(2, 9\)"):
            layer(x, torch.ones(shape, dtype=torch.bool))
    torch.testing.assert_close(layer(x, torch.ones(1, 9, dtype=torch.bool)), layer(x))


def test_positions_separate_nothing():
    """Two documents in a row, positions from 0 in each: the second sees the first; in rows of their own not."""
    torch.manual_seed(3)
    layer = RoPEAttention(16, 2).double()
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    packed = layer(x, positions=torch.arange(20) % 10)
    apart = layer(x.reshape(2, 10, 16)).reshape(1, 20, 16)
    torch.testing.assert_close(packed[:, :10], apart[:, :10])
    assert (packed[:, 10:] - apart[:, 10:]).abs().max() > 1e-3
    assert "Positions do not say which tokens see each other" in RoPEAttention.forward.__doc__
    # Their lengths do.
    torch.testing.assert_close(layer(x, lengths=[10, 10]), apart)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_certificate_of_a_layer(method):
    layer = RoPEAttention(16, 2, bound=1.0, near=3, method=method)
    x = torch.randn(2, 50, 16)
    y, certificate = layer(x, return_certificate=True)
    assert torch.equal(y, layer(x))
    assert certificate.engine == method and certificate.error <= 1e-3
    assert certificate.rows_truncation.shape == (2, 2, 50)


def saved(layer):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def test_weights_of_another_bound():
    weak, strong, none = (RoPEAttention(16, 2, bound=b) for b in (1.0, 2.0, None))
    for layer in (weak, strong, none):
        weights = saved(torch.nn.Sequential(layer))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.nn.Sequential(RoPEAttention(16, 2, bound=layer.bound)).load_state_dict(weights)
        half = {name: x.half() for name, x in weights.items()}  # as a script that casts what it saves
        torch.nn.Sequential(RoPEAttention(16, 2, bound=layer.bound)).load_state_dict(half)
        for other in {1.0, 2.0, None} - {layer.bound}:
            message = rf"weights of 0\. were trained with bound={layer.bound}, this layer has bound={other}"
            with pytest.raises(RuntimeError, match=message):
                torch.nn.Sequential(RoPEAttention(16, 2, bound=other)).load_state_dict(weights, strict=False)
    assert strong.bound == 2.0


def test_weights_and_layers_of_before():
    """A state_dict that says nothing of a bound loads, with a warning where there is one; pickles find the layer."""
    for bound in (1.0, None):
        layer = RoPEAttention(16, 2, bound=bound)
        before = {name: x for name, x in layer.state_dict().items() if name in dict(layer.named_parameters())}
        other = RoPEAttention(16, 2, bound=bound)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            other.load_state_dict(before)
        assert [str(w.message)[:24] for w in caught] == ["bound: the weights of th"] * (bound is not None)
        x = torch.randn(2, 5, 16)
        assert torch.equal(layer(x), other(x))
        text = pickle.dumps(layer, protocol=0).replace(b"ropecy.torch.layer", b"ropecy.torch")
        assert torch.equal(layer(x), pickle.loads(text)(x))


def test_the_bound_of_a_layer_that_names_none():
    narrow, wide = (RoPEAttention(8 * h, 8, head_dim=h, bound=True) for h in (8, 16))
    assert (narrow.bound, narrow.rotary.rotary_dim, narrow.near) == (4.0, 4, 64)
    assert (wide.bound, wide.rotary.rotary_dim, wide.near) == (2.0, 16, 64)
    kept = RoPEAttention(64, 8, bound=True, rotary=ropecy.Rotary(8))
    assert (kept.bound, kept.rotary.rotary_dim) == (4.0, 8)
    assert (kept.eps, RoPEAttention(64, 8, bound=2.0).eps) == (0.1, 1e-3)
    assert RoPEAttention(64, 8, bound=True, eps=0.2).eps == 0.2
    with pytest.raises(ValueError, match="bound: got False, wants a positive number"):
        RoPEAttention(64, 8, bound=False)


@pytest.mark.parametrize("head_dim", [2, 4, 8, 12, 16, 24, 32, 48, 64])
def test_the_defaults_of_a_bound_fit_each_other(head_dim):
    """The polynomial engine, whatever the instruction set, from 20,000 tokens on."""
    plan = RoPEAttention(2 * head_dim, 2, bound=True).plan(20_000)
    assert plan.engine == "polynomial" and plan.certificate.error <= 0.1 and plan.advice == ()


def test_a_layer_of_the_default_bound_runs_by_the_polynomial():
    torch.manual_seed(3)
    layer = RoPEAttention(16, 2, bound=True)
    x = torch.randn(1, 8192, 16)
    y, certificate = layer(x, return_certificate=True)
    assert certificate.engine == "polynomial" and certificate.error <= layer.eps
    found = gradients(lambda x: layer(x), [x.requires_grad_()])
    layer.method = "exact"
    for ours, exact in zip(found, gradients(lambda x: layer(x), [x]), strict=True):
        assert torch.linalg.norm(ours - exact) <= layer.eps * torch.linalg.norm(exact)


def test_plans_say_what_would_help():
    """Each change that is named does let the polynomial in; the least that does."""
    layer = RoPEAttention(32, 1, bound=4.0)
    plan = layer.plan(20_000)
    assert plan.engine == "exact"
    names = [advice.name for advice in plan.advice]
    assert "bound=1 and eps=0.1, as bound=True has them" in names
    assert any(name.startswith("head_dim=") for name in names)
    assert f"instead   {names[0]}: degree" in str(plan)
    for advice in plan.advice:
        assert advice.certificate.engine == "polynomial" and advice.seconds > 0
    assert RoPEAttention(32, 1, bound=1.0, eps=0.1).plan(20_000).engine == "polynomial"
    few = RoPEAttention(64, 1, bound=True).plan(500)
    longer = few.advice[0].name
    assert few.engine == "exact" and longer.endswith(" tokens")
    n = int(longer.split()[0].replace(",", ""))
    assert RoPEAttention(64, 1, bound=True).plan(n).engine == "polynomial"
