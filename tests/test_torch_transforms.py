"""PyTorch's transforms: forward mode, torch.func, checkpoints; and gradient scalers, which send NaN backward."""

from functools import partial

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch_cases import EXACT, padding, rotary_options, tensors  # noqa: E402

import ropecy  # noqa: E402
from ropecy.torch import RoPEAttention, scaled_dot_product_attention  # noqa: E402

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0], "factor": 4.0}
LONGROPE |= {"original_max_position_embeddings": 16}


def dense(q, k, v, causal=False):
    """The definition, with PyTorch's scale, in operations that have all derivatives."""
    s = q @ k.mT / q.shape[-1] ** 0.5
    seen = torch.ones(s.shape[-2:], dtype=torch.bool).tril() if causal else torch.ones((), dtype=torch.bool)
    return s.masked_fill(~seen, -torch.inf).softmax(-1) @ v


FORWARD = {
    "plain": {},
    "scale 0": {"scale": 0.0},
    "causal": {"is_causal": True, "q_offset": 2},
    "a window past the keys": {"window": (3, 1), "q_offset": 7},
    "rotary": rotary_options(4, 7),
    "half": {"rotary": ropecy.Rotary(8, rotary_dim=4, scaling=LONGROPE), "is_causal": True, "q_offset": 20},
    "padding": {"attn_mask": padding(2, 7)[:, None, None], "is_causal": True},
    "mask of a head": {"attn_mask": torch.arange(2 * 4 * 7).reshape(2, 4, 1, 7) % 3 != 1},
    "a head without keys": {"attn_mask": torch.arange(4).reshape(1, 4, 1, 1).expand(2, 4, 1, 7) != 1},
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode(name, monkeypatch):
    """Dual numbers against differences of attention, in blocks of fewer rows than there are."""
    monkeypatch.setattr("ropecy.torch.derivatives._TILE", 2 * 4 * 7 * 3)
    inputs = tensors((2, 4, 4, 8), (2, 2, 7, 8), (2, 2, 7, 3))

    def run(*x):
        return scaled_dot_product_attention(*x, enable_gqa=True, threads=1, **FORWARD[name], **EXACT)

    torch.autograd.gradcheck(run, inputs, check_backward_ad=False, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("scale_near", [0.7, 0.0, [-1.0, 0.5]])
def test_forward_mode_with_a_near_field(scale_near):
    near = torch.tensor(scale_near, dtype=torch.float64, requires_grad=True)

    def run(Q, K, V, near):
        return scaled_dot_product_attention(Q, K, V, near=(2, near), is_causal=True, q_offset=3, threads=1, **EXACT)

    inputs = (*tensors((2, 5, 2), (2, 8, 2), (2, 8, 2)), near)
    torch.autograd.gradcheck(run, inputs, check_backward_ad=False, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("shapes", [[(5, 4), (7, 4), (7, 3)], [(2, 3, 5, 4), (1, 1, 7, 4), (1, 7, 3)], [(3, 0, 4)] * 3])
def test_forward_mode_by_one_argument(shapes):
    """Arguments without a tangent, leading axes that broadcast, no rows at all."""
    inputs = tensors(*shapes, grad=False)
    for place, x in enumerate(inputs):

        def of(attend, place=place):
            return lambda y: attend(*inputs[:place], y, *inputs[place + 1 :])

        attends = partial(scaled_dot_product_attention, **EXACT), dense
        ours, theirs = (torch.func.jvp(of(attend), (x,), (x.cos(),)) for attend in attends)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_mode_of_other_dtypes(dtype):
    """Computed in float32, rounded once; under autocast too."""
    inputs = tensors(*[(2, 3, 33, 8)] * 3, dtype=dtype, grad=False)
    tangents = tuple(x.flip(-2) for x in inputs)

    def run(*x):
        return scaled_dot_product_attention(*x, is_causal=True, **EXACT)

    _, found = torch.func.jvp(run, tuple(inputs), tangents)
    wide = [tuple(x.double() for x in each) for each in (inputs, tangents)]
    _, expected = torch.func.jvp(partial(dense, causal=True), *wide)
    assert found.dtype == dtype
    size = expected.abs().max()
    assert (found - expected).abs().max() <= max(torch.finfo(dtype).eps, 1e-5) * size
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, cast = torch.func.jvp(run, tuple(inputs), tangents)
    assert cast.dtype == torch.bfloat16
    assert (cast - expected).abs().max() <= 0.1 * size


def test_forward_mode_is_exact_or_refused():
    x, *_ = tensors(*[(2, 40, 4)] * 3, grad=False)
    for method in ("polynomial", "fft"):
        with pytest.raises(
            NotImplementedError, match=f"method: got '{method}', wants 'auto' or 'exact'.* forward mode"
        ):
            torch.func.jvp(lambda q, m=method: scaled_dot_product_attention(q, x, x, scale=0.01, method=m), (x,), (x,))


@pytest.mark.parametrize("near", [False, True])
def test_func(near):
    """grad, vjp, jacrev, jacfwd, each with vmap around and inside, against PyTorch's attention."""
    Q, K, V = tensors((4, 3, 5, 4), (4, 3, 7, 4), (4, 3, 7, 2), grad=False)
    more = {"near": (2, 1.5)} if near else {}
    close = torch.arange(7) - torch.arange(5)[:, None]

    def ours(q, k, v):
        return scaled_dot_product_attention(q, k, v, window=(3, 9), scale=0.5, **more, **EXACT)

    def theirs(q, k, v):
        s = torch.where(close.abs() < 2, 1.5 if near else 0.5, 0.5) * (q @ k.mT)
        return s.masked_fill(close < -3, -torch.inf).softmax(-1) @ v

    f = torch.func
    transforms = {
        "grad": lambda g: f.grad(lambda *x: g(*x).sin().sum(), argnums=(0, 1, 2))(Q, K, V),
        "vjp": lambda g: f.vjp(g, Q, K, V)[1](theirs(Q, K, V).cos()),
        "jacrev": lambda g: f.jacrev(g, argnums=1)(Q[0], K[0], V[0]),
        "jacfwd": lambda g: f.jacfwd(g, argnums=(0, 1))(Q[0], K[0], V[0]),
        "vmap of grad": lambda g: f.vmap(f.grad(lambda *x: g(*x).sin().sum()), in_dims=(0, None, 0))(Q, K[0], V),
        "vmap of jvp": lambda g: f.vmap(lambda q, k: f.jvp(lambda q: g(q, k, V[0]), (q,), (q.cos(),)))(Q, K),
        "grad of vmap": lambda g: f.grad(lambda q: f.vmap(g, in_dims=(0, 0, None))(q, K, V[0]).sin().sum())(Q),
        "reverse over forward": lambda g: f.jacrev(f.jacfwd(lambda q: g(q, K[0], V[0]).sum()))(Q[0]),
    }
    for name, transform in transforms.items():
        torch.testing.assert_close(transform(ours), transform(theirs), rtol=0, atol=1e-10, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("name", ["jvp", "dual numbers", "grad", "vmap of grad", "vmap"])
def test_compiled_transforms(name):
    """What torch.compile finds inside a graph, it computes outside of it; vmap stays inside."""
    Q, K, V = tensors(*[(2, 5, 4)] * 3, grad=False)
    f, dual = torch.func, torch.autograd.forward_ad

    def run(q, k=K, v=V):
        return scaled_dot_product_attention(q, k, v, is_causal=True, **EXACT)

    def by_dual_numbers(q):
        with dual.dual_level():
            return dual.unpack_dual(run(dual.make_dual(q, q.cos()))).tangent

    transform = {
        "jvp": lambda q: f.jvp(run, (q,), (q.cos(),))[1],
        "dual numbers": by_dual_numbers,
        "grad": f.grad(lambda q: run(q).sin().sum()),
        "vmap of grad": f.vmap(f.grad(lambda q: run(q, K[0], V[0]).sin().sum())),
        "vmap": f.vmap(lambda q: run(q, K[0], V[0])),
    }[name]
    expected = transform(Q)
    assert expected.any()
    torch._dynamo.reset()
    compiled = torch.compile(transform, backend="aot_eager", fullgraph=name == "vmap")
    torch.testing.assert_close(compiled(Q), expected, rtol=0, atol=1e-12)
    if name != "vmap":
        torch._dynamo.reset()
        with pytest.raises(Exception, match="ropecy's attention is in no graph"):
            torch.compile(transform, backend="aot_eager", fullgraph=True)(Q)


def test_func_with_a_layer():
    """A gradient for each sample, by functional_call and vmap."""
    torch.manual_seed(3)
    layer = RoPEAttention(16, 2, bound=1.0, near=3, method="exact").double()
    x = torch.randn(5, 9, 16, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x[None],)).sin().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(5):
        layer.zero_grad()
        layer(x[i : i + 1]).sin().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(each[name][i], p.grad, rtol=0, atol=1e-10)


def test_second_derivatives_by_forward_mode_are_refused():
    """Forward over reverse, where a derivative of the gradient would be needed; not 0 without a word."""
    Q, K, V = tensors(*[(2, 5, 4)] * 3, grad=False)

    def total(q):
        return scaled_dot_product_attention(q, K, V, **EXACT).sin().sum()

    with pytest.raises(NotImplementedError, match=r"first order only.*jacrev\(torch.func.jacfwd"):
        torch.func.jacfwd(torch.func.jacrev(total))(Q)
    with pytest.raises(NotImplementedError, match="first order only"):
        torch.func.grad(lambda q: torch.func.grad(total)(q).sum())(Q)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, compiled):
    layer = RoPEAttention(16, 2, bound=1.0, near=3, method="exact").double()
    (x,) = tensors((2, 9, 16))
    layer(x).sin().sum().backward()
    expected = [x.grad, *(p.grad for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    torch.utils.checkpoint.checkpoint(run, x, use_reentrant=reentrant).sin().sum().backward()
    for a, b in zip([x.grad, *(p.grad for p in layer.parameters())], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradient_checkpointing_of_a_model():
    transformers = pytest.importorskip("transformers")
    from ropecy.transformers import register

    register()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(vocab_size=32, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="ropecy").train()
    tokens = torch.arange(20).reshape(2, 10)
    found = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens, use_cache=False).logits.square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_lost_gradients(key_heads, dtype, value):
    """NaN and Inf in dO: NaN for what they reach, and everything else is what it was."""
    shapes = (3, 4, 5, 8), (3, key_heads, 7, 8), (1, key_heads, 7, 2)
    inputs = tensors(*shapes, dtype=dtype)
    near = torch.tensor([0.5, 1.0, -1.0, 0.0] if key_heads == 2 else 0.5, requires_grad=True)
    out = scaled_dot_product_attention(*inputs, enable_gqa=True, near=(2, near), **EXACT)
    grad = torch.ones_like(out)
    whole = torch.autograd.grad(out, [*inputs, near], grad, retain_graph=True)
    grad[1, 2, 3, 1] = value
    lost = torch.autograd.grad(out, [*inputs, near], grad)
    head = 2 * key_heads // 4
    reached = [torch.zeros(x.shape, dtype=torch.bool) for x in (*inputs, near)]
    reached[0][1, 2, 3] = reached[1][1, head] = reached[2][0, head] = True
    reached[3][2 if near.dim() else ()] = True
    for found, before, where in zip(lost, whole, reached, strict=True):
        assert torch.equal(found.isnan(), where)
        if found.shape[0:1] == (3,):
            torch.testing.assert_close(found[~where], before[~where], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_scaler_skips_a_step(compiled, dtype):
    """Training goes on: the step whose gradients overflow is left out and the scale falls."""
    torch.manual_seed(3)
    layer = RoPEAttention(16, 2, bound=1.0)
    run = torch.compile(layer, backend="aot_eager") if compiled else layer
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(2, 9, 16)
    for scale, skipped in ((2.0**120, True), (2.0, False)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        before = [p.detach().clone() for p in layer.parameters()]
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = 1e3 * run(x).float().square().sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(p, b) for p, b in zip(layer.parameters(), before, strict=True)) == skipped
        assert (scaler.get_scale() < scale) == skipped
    assert all(p.isfinite().all() for p in layer.parameters())


def test_inputs_that_are_not_finite_are_still_refused():
    for place, name in enumerate("QKV"):
        inputs = tensors(*[(2, 5, 4)] * 3)
        inputs[place].data[0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match=f"{name}: got NaN"):
            scaled_dot_product_attention(*inputs)
    _, vjp = ropecy.attention_vjp(*(x.detach().numpy() for x in tensors(*[(2, 5, 4)] * 3)))
    with pytest.raises(ValueError, match="dO: got NaN"):
        vjp(torch.full((2, 5, 4), torch.nan, dtype=torch.float64).numpy())


def test_modes_subclasses_and_tracers_see_the_operator():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    class Tagged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            names.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    q = torch.randn(2, 5, 4)
    names = []
    expected = scaled_dot_product_attention(q, q, q)
    assert not names
    with Seen():
        torch.testing.assert_close(scaled_dot_product_attention(q, q, q), expected, rtol=0, atol=0)
    assert "ropecy.attention.default" in names
    names.clear()
    tagged = q.as_subclass(Tagged)
    with torch.no_grad():
        torch.testing.assert_close(scaled_dot_product_attention(tagged, q, q).as_subclass(torch.Tensor), expected)
    assert "ropecy.attention.default" in names
    traced = torch.jit.trace(lambda x: scaled_dot_product_attention(x, x, x), q)
    other = torch.randn(2, 5, 4)
    torch.testing.assert_close(traced(other), scaled_dot_product_attention(other, other, other))


def test_negative_views_and_tensors_that_require_gradients_without_recording():
    q = torch.randn(2, 5, 4)
    negative = torch.complex(torch.zeros(2, 5, 4), q).conj().imag
    assert negative.is_neg()
    expected = scaled_dot_product_attention(-q, q, q)
    torch.testing.assert_close(scaled_dot_product_attention(negative, q, q), expected, rtol=0, atol=0)
    with torch.no_grad():
        leaf = (-q).requires_grad_()
        torch.testing.assert_close(scaled_dot_product_attention(leaf, q, q), expected, rtol=0, atol=0)
        parameter = torch.nn.Parameter(-q)
        torch.testing.assert_close(scaled_dot_product_attention(parameter, q, q), expected, rtol=0, atol=0)
