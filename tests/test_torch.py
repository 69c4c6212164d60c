"""ropecy.torch against PyTorch's own attention, and what PyTorch asks of an operator."""

import copy
import math
import os
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import ropecy  # noqa: E402
from ropecy.torch import RoPEAttention, scaled_dot_product_attention  # noqa: E402

SDPA = torch.nn.functional.scaled_dot_product_attention
EXACT = {"method": "exact"}


def tensors(*shapes, dtype=torch.float64, grad=True):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


def gradients(function, inputs, seed=11):
    """function's result and the gradients of its inner product with random numbers."""
    for x in inputs:
        x.grad = None
    out = function(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    (out * weights).sum().backward()
    return [out.detach()] + [x.grad for x in inputs]


def check_same(ours, theirs, inputs, **tolerance):
    for a, b in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


LAYOUTS = {
    "plain": ([(2, 3, 37, 8)] * 3, {}),
    "causal": ([(2, 3, 37, 8)] * 3, {"is_causal": True}),
    "top left": ([(2, 3, 20, 8), (2, 3, 37, 8), (2, 3, 37, 5)], {"is_causal": True}),
    "scale": ([(2, 3, 20, 8), (2, 3, 37, 8), (2, 3, 37, 5)], {"scale": -0.7}),
    "grouped": ([(2, 6, 37, 8), (2, 2, 37, 8), (2, 2, 37, 8)], {"enable_gqa": True, "is_causal": True}),
    "one head": ([(2, 3, 37, 8), (1, 1, 37, 8), (1, 1, 37, 8)], {}),
    "no heads": ([(37, 8), (37, 8), (37, 4)], {"is_causal": True}),
    "three axes": ([(4, 37, 8)] * 3, {}),
    "five axes": ([(2, 2, 3, 17, 8)] * 3, {"is_causal": True}),
    "one row": ([(2, 3, 1, 8), (2, 3, 37, 8), (2, 3, 37, 8)], {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sdpa(layout):
    shapes, options = LAYOUTS[layout]
    check_same(
        lambda *x: scaled_dot_product_attention(*x, **options, **EXACT),
        lambda *x: SDPA(*x, **options),
        tensors(*shapes),
        rtol=0,
        atol=1e-10,
    )


def padding(b, n):
    """True for the first few, for the last few, and for all keys."""
    counts = torch.tensor([n // 2, n // 3, n] * b)[:b, None]
    places = torch.arange(n)
    left = torch.arange(b)[:, None] % 2 == 1
    return torch.where(left, places >= n - counts, places < counts)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["(b, n)", "(b, 1, 1, n)", "(n,)", "(1, n)", "(1, 1, 1, n)", "(b, h, 1, n)"])
def test_padding(form, causal):
    Q, K, V = tensors(*[(3, 2, 33, 8)] * 3)
    full = padding(3, 33)[:, None, None].expand(3, 2, 1, 33)
    if form in ("(n,)", "(1, n)", "(1, 1, 1, n)"):
        full = full[:1, :1].expand(3, 2, 1, 33)
    mask = {
        "(b, n)": full[:, 0, 0],
        "(b, 1, 1, n)": full[:, :1],
        "(n,)": full[0, 0, 0],
        "(1, n)": full[0, 0],
        "(1, 1, 1, n)": full[:1, :1],
        "(b, h, 1, n)": full,
    }[form]
    seen = full & torch.ones(33, 33, dtype=torch.bool).tril() if causal else full
    check_same(
        lambda *x: scaled_dot_product_attention(*x, mask, is_causal=causal, **EXACT),
        lambda *x: SDPA(*x, seen),
        [Q, K, V],
        rtol=0,
        atol=1e-10,
    )


def test_row_without_keys_is_zero():
    Q, K, V = tensors(*[(2, 2, 9, 8)] * 3)
    mask = torch.tensor([[False] * 9, [True] * 9])
    out, dQ, dK, dV = gradients(lambda *x: scaled_dot_product_attention(*x, mask, **EXACT), [Q, K, V])
    for x in (out, dQ, dK, dV):
        assert not x[0].any() and x[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    """No further from float64 than PyTorch's own attention is in this dtype, give or take."""
    inputs = tensors(*[(2, 2, 65, 16)] * 3, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    ours = gradients(lambda *x: scaled_dot_product_attention(*x, is_causal=True, **EXACT), inputs)
    theirs = gradients(lambda *x: SDPA(*x, is_causal=True), inputs)
    truth = gradients(lambda *x: SDPA(*x, is_causal=True), wide)
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert a.dtype == dtype
        assert (a - c).abs().max() <= 3 * (b - c).abs().max()


def test_bfloat16_is_computed_in_float32():
    inputs = tensors(*[(2, 65, 16)] * 3, dtype=torch.bfloat16, grad=False)
    stored = scaled_dot_product_attention(*inputs, **EXACT)
    assert torch.equal(stored, scaled_dot_product_attention(*(x.float() for x in inputs), **EXACT).bfloat16())


@pytest.mark.parametrize("how", ["transposed", "fortran", "every second", "expanded"])
def test_strides(how):
    base = {
        "transposed": lambda: [x.transpose(1, 2) for x in tensors(*[(2, 21, 3, 8)] * 3, grad=False)],
        "fortran": lambda: [x.mT.contiguous().mT for x in tensors(*[(2, 3, 21, 8)] * 3, grad=False)],
        "every second": lambda: [x[..., ::2, ::2] for x in tensors(*[(2, 3, 42, 16)] * 3, grad=False)],
        "expanded": lambda: [x.expand(2, 3, 21, 8) for x in tensors((2, 1, 21, 8), (1, 1, 21, 8), (1, 8), grad=False)],
    }[how]()
    plain = [x.contiguous().requires_grad_() for x in base]
    strided = [x.detach().requires_grad_() for x in base]

    def run(*x):
        return scaled_dot_product_attention(*x, is_causal=True, **EXACT)

    for a, b in zip(gradients(run, strided), gradients(run, plain), strict=True):
        assert torch.equal(a, b)


def test_no_copies(monkeypatch):
    """The arrays that ropecy gets are the tensors' memory, and the result's memory is ropecy's."""
    met = {}

    def watch(Q, K, V, **options):
        met["in"] = [X.__array_interface__["data"][0] for X in (Q, K, V)]
        O = ropecy.attention(Q, K, V, **options)
        met["out"] = O.__array_interface__["data"][0]
        return O

    monkeypatch.setattr("ropecy.torch.attention", watch)
    inputs = tensors(*[(2, 21, 3, 8)] * 3)
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs), **EXACT)
    assert met["in"] == [x.data_ptr() for x in inputs]
    assert met["out"] == out.data_ptr()


def rotary_options(n, n_k):
    R = ropecy.Rotary(8, pairing="interleaved", rotary_dim=6, scaling={"rope_type": "linear", "factor": 2.0})
    return {"rotary": R, "q_positions": torch.arange(n) + 5, "k_positions": torch.arange(n_k) * 2, "window": (9, 3)}


def test_options_are_those_of_ropecy_attention():
    Q, K, V = tensors((2, 3, 20, 8), (2, 3, 31, 8), (2, 3, 31, 4), grad=False)
    options = rotary_options(20, 31)
    ours = scaled_dot_product_attention(Q, K, V, is_causal=True, q_offset=4, scale=0.3, **options, **EXACT)
    arrays = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    R = arrays.pop("rotary")
    theirs = ropecy.attention(*(x.numpy() for x in (Q, K, V)), R, causal=True, q_offset=4, scale=0.3, **arrays, **EXACT)
    assert np.array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "q_offset": 2}, "rotary", "mask"])
def test_gradcheck(options):
    if options == "rotary":
        options = rotary_options(4, 7)
    elif options == "mask":
        options = {"attn_mask": padding(2, 7)[:, None, None]}
    inputs = tensors((2, 4, 4, 8), (2, 2, 7, 8), (2, 2, 7, 3))

    def run(*x):
        return scaled_dot_product_attention(*x, enable_gqa=True, threads=1, **options, **EXACT)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "q_offset": 3}, "mask"])
def test_gradcheck_with_a_near_field(options, method):
    """By the near scores' scale, too, where it is negative as well as where it is 0."""
    if options == "mask":
        options = {"attn_mask": padding(2, 8)[:, None, None], "is_causal": True, "q_offset": 3}
    Q, K, V = tensors((2, 2, 5, 2), (2, 1, 8, 2), (2, 1, 8, 2))
    options |= {"rotary": ropecy.Rotary(2), "scale": 0.05, "eps": 1e-9, "method": method, "enable_gqa": True}

    def run(Q, K, V, scale_near):
        return scaled_dot_product_attention(Q, K, V, near=(2, scale_near), threads=1, **options)

    for scale_near in (0.7, 0.0, -1.0):
        inputs = (Q, K, V, torch.tensor(scale_near, dtype=torch.float64, requires_grad=True))
        assert torch.autograd.gradcheck(run, inputs)


def test_near_field_by_a_number_or_a_tensor():
    Q, K, V = tensors(*[(2, 3, 40, 8)] * 3)

    def run(scale_near):
        return lambda *x: scaled_dot_product_attention(*x, near=(5, scale_near), is_causal=True, **EXACT)

    check_same(run(1.5), run(torch.tensor(1.5, requires_grad=True)), [Q, K, V], rtol=0, atol=0)
    theirs = ropecy.attention(*(x.detach().numpy() for x in (Q, K, V)), scale=8**-0.5, near=(5, 1.5), causal=True)
    np.testing.assert_allclose(run(1.5)(Q, K, V).detach().numpy(), theirs, rtol=0, atol=1e-12)
    scale_near = torch.tensor(1.5, requires_grad=True)  # of another dtype than Q
    run(scale_near)(Q, K, V).sum().backward()
    assert scale_near.grad.dtype == torch.float32 and scale_near.grad.shape == ()


def test_gradient_by_the_polynomial_engine():
    inputs = tensors(*[(1, 2, 300, 4)] * 3)

    def small(method):
        return lambda *x: scaled_dot_product_attention(*x, scale=0.02, eps=1e-6, method=method)

    exact = gradients(small("exact"), inputs)
    for a, b in zip(gradients(small("polynomial"), inputs), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        assert not torch.equal(a, b)


def test_second_derivatives_are_refused():
    Q, K, V = tensors(*[(2, 5, 4)] * 3)
    (dQ,) = torch.autograd.grad(scaled_dot_product_attention(Q, K, V, **EXACT).sum(), Q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first order only"):
        dQ.sum().backward()


def operator_arguments(dtype=torch.float64, masked=False, near=False):
    inputs = tensors((2, 4, 6, 8), (2, 2, 9, 8), (2, 2, 9, 3), dtype=dtype)
    mask = padding(2, 9)[:, None] if masked else None
    near = (torch.tensor(1.5, requires_grad=True), 3) if near else (None, None)
    return (*inputs, mask, None, None, *near, None, 0.3, True, None, 3, 1e-3, "exact", None)


@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype, masked, near):
    arguments = operator_arguments(dtype, masked, near)
    torch.library.opcheck(torch.ops.ropecy.attention.default, arguments, atol=1e-2, rtol=1e-2)
    (grad,) = tensors((2, 4, 6, 3), dtype=dtype, grad=False)
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(torch.ops.ropecy.attention_backward.default, (grad, *arguments))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    R = ropecy.Rotary(8)

    def model(Q, K, V, log_scale, mask):
        O = scaled_dot_product_attention(Q * 1.5, K, V, mask, is_causal=True, rotary=R, enable_gqa=True, **EXACT)
        near = 3, log_scale.exp()
        return O.sin() + scaled_dot_product_attention(Q, K, V, mask, near=near, enable_gqa=True, **EXACT)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for n in (9, 12):  # the second shape is compiled with symbolic sizes
        inputs = tensors((2, 4, n, 8), (2, 2, n, 8), (2, 2, n, 3), ())
        check_same(
            lambda *x, n=n: compiled(*x, padding(2, n)),
            lambda *x, n=n: model(*x, padding(2, n)),
            inputs,
            rtol=1e-12,
            atol=1e-12,
        )


def test_compiled_code_tells_rotations_apart():
    Q, K, V = tensors(*[(1, 2, 9, 8)] * 3, grad=False)
    compiled = torch.compile(
        lambda R: scaled_dot_product_attention(Q, K, V, rotary=R, **EXACT), backend="aot_eager", fullgraph=True
    )
    for base in (100.0, 10000.0, 100.0):
        R = ropecy.Rotary(8, base=base)
        assert torch.equal(compiled(R), scaled_dot_product_attention(Q, K, V, rotary=R, **EXACT))


@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (0, None, None, None), (1, 3, None, 1), (None, 0, 2, None)])
@pytest.mark.parametrize("lead", [(), (2,), (2, 4)])
def test_vmap(lead, axes):
    """Of the function, with gradients outside; and of the backward operator, where each element has its own."""
    shapes = [(*lead, 7, 4), (*lead, 9, 4), (*lead, 9, 3), (9,)]
    axes = [None if axis is None else min(axis, len(shape)) for axis, shape in zip(axes, shapes, strict=True)]
    sizes = [s if a is None else (*s[:a], 5, *s[a:]) for s, a in zip(shapes, axes, strict=True)]
    inputs = tensors(*sizes[:3])
    mask = torch.arange(math.prod(sizes[3])).reshape(sizes[3]) % 4 != 1

    def run(*x):
        return scaled_dot_product_attention(*x, is_causal=True, q_offset=2, **EXACT)

    def one_by_one(function, *x):
        def of(i):
            return [t if a is None else t.select(a, i) for t, a in zip(x, axes, strict=True)]

        return [function(*of(i)) for i in range(5)]

    check_same(
        lambda *x: torch.func.vmap(run, in_dims=tuple(axes))(*x, mask),
        lambda *x: torch.stack(one_by_one(run, *x, mask)),
        inputs,
        rtol=1e-12,
        atol=1e-12,
    )

    def backward(Q, K, V, mask):
        dO = torch.linspace(-1, 1, math.prod((*lead, 7, 3)), dtype=torch.float64).reshape(*lead, 7, 3)
        options = (None, None, None, None, None, 0.3, True, None, 2, 1e-3, "exact", None)
        return torch.ops.ropecy.attention_backward(dO, Q, K, V, mask, *options)

    inputs = [x.detach() for x in inputs]
    found = torch.func.vmap(backward, in_dims=tuple(axes))(*inputs, mask)
    expected = zip(*one_by_one(backward, *inputs, mask), strict=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, torch.stack(b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [None, 0])
def test_vmap_with_a_near_field(axis):
    """Each element has a gradient of its own by scale_near, whether that is its own or everybody's."""
    Q, K, V = tensors((5, 2, 4, 7, 4), (2, 2, 9, 4), (5, 2, 2, 9, 3))
    near = torch.linspace(0.5, 2, 5, dtype=torch.float64).requires_grad_()
    near = near if axis == 0 else near[2].detach().requires_grad_()

    def run(Q, K, V, scale_near):
        return scaled_dot_product_attention(Q, K, V, near=(3, scale_near), is_causal=True, enable_gqa=True, **EXACT)

    axes = (0, None, 0, axis)

    def one_by_one(function, Q, K, V, near):
        return [function(Q[i], K, V[i], near if axis is None else near[i]) for i in range(5)]

    vmapped = torch.func.vmap(run, in_dims=axes)
    inputs = [Q, K, V, near]
    check_same(vmapped, lambda *x: torch.stack(one_by_one(run, *x)), inputs, rtol=1e-12, atol=1e-12)

    def backward(Q, K, V, scale_near):
        dO = torch.linspace(-1, 1, 2 * 4 * 7 * 3, dtype=torch.float64).reshape(2, 4, 7, 3)
        options = (None, None, None, scale_near, 3, None, 0.3, True, None, 2, 1e-3, "exact", None)
        return torch.ops.ropecy.attention_backward(dO, Q, K, V, *options)

    inputs = [x.detach() for x in inputs]
    found = torch.func.vmap(backward, in_dims=axes)(*inputs)
    for a, b in zip(found, zip(*one_by_one(backward, *inputs), strict=True), strict=True):
        torch.testing.assert_close(a, torch.stack(b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("near", [False, True])
def test_jacobian_by_batched_gradients(near):
    inputs = tensors(*[(2, 3, 4)] * 3, *[()] * near)

    def run(Q, K, V, *scale_near):
        return scaled_dot_product_attention(Q, K, V, near=(2, *scale_near) if near else None, **EXACT)

    torch.testing.assert_close(
        torch.autograd.functional.jacobian(run, tuple(inputs), vectorize=True),
        torch.autograd.functional.jacobian(run, tuple(inputs)),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p: got 0.1"),
        ({"attn_mask": torch.ones(9, 9, dtype=torch.bool)}, NotImplementedError, r"attn_mask: got shape \(9, 9\)"),
        ({"attn_mask": torch.ones(2, 1, 9, 9, dtype=torch.bool)}, NotImplementedError, "attn_mask: .* n x n_k"),
        ({"attn_mask": torch.zeros(2, 1, 1, 9)}, TypeError, "attn_mask: got torch.float32"),
        ({"attn_mask": torch.ones(2, 8, dtype=torch.bool)}, ValueError, r"attn_mask: got shape \(2, 8\)"),
        ({"key": torch.ones(2, 2, 9, 8)}, ValueError, "key: got 2 heads beside 4 of query, .*enable_gqa"),
        ({"value": torch.ones(2, 4, 9, 8).half()}, TypeError, "value: got torch.float16, wants torch.float32"),
        ({"query": torch.ones(2, 4, 9, 8).long()}, TypeError, "query: got torch.int64"),
        ({"query": torch.ones(8)}, ValueError, "query: got shape"),
        ({"key": torch.full((2, 4, 9, 8), math.nan)}, ValueError, "K: got NaN"),
        ({"window": 0}, ValueError, "window: got 0"),
        ({"near": 3}, TypeError, r"near: got 3, wants a pair \(w, scale_near\)"),
        ({"near": (3, torch.ones(2))}, ValueError, r"near: got a scale_near of shape \(2,\), wants a number"),
        ({"near": (0, 1.0)}, ValueError, "near: got 0"),
        ({"near": (3, math.nan)}, ValueError, "near: got nan"),
        ({"method": "fastest"}, ValueError, "method: got"),
    ],
)
def test_refusals(change, error, message):
    arguments = dict.fromkeys(("query", "key", "value"), torch.ones(2, 4, 9, 8)) | change
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(**arguments)


def test_mask_that_may_mean_two_things():
    x = torch.ones(9, 4, 9, 8)
    with pytest.raises(ValueError, match=r"may be \(batch, n_k\) or \(n, n_k\); .*attn_mask\[:, None, None, :\]"):
        scaled_dot_product_attention(x, x, x, torch.ones(9, 9, dtype=torch.bool))


def test_threads_are_torchs_unless_told(monkeypatch):
    met = []
    monkeypatch.setattr("ropecy.torch.attention", lambda Q, K, V, **how: met.append(how["threads"]) or Q)
    x = torch.ones(1, 4, 4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        scaled_dot_product_attention(x, x, x)
    finally:
        torch.set_num_threads(before)
    scaled_dot_product_attention(x, x, x, threads=3)
    assert met == [1, 3]


class Attended(torch.utils.data.Dataset):
    """Examples that are results of attention, computed where they are asked for."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        x = torch.linspace(-1, 1, 2 * 64 * 8).reshape(2, 64, 8) * (i + 1)
        return scaled_dot_product_attention(x, x, x, is_causal=True, threads=2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_workers_after_fork():
    data = Attended()
    alone = torch.stack([data[i] for i in range(4)])  # OpenMP threads exist before the fork
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(loader)), alone)


def test_importing_ropecy_imports_no_torch():
    code = "import sys, ropecy; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def scores_of(layer, x, monkeypatch):
    """The largest score that the layer forms of x."""
    met = []

    def watch(Q, K, V, **options):
        rows = [options["R"].rotate(X.astype(np.float64)) for X in (Q, np.repeat(K, Q.shape[-3] // K.shape[-3], -3))]
        met.append(float(np.abs(options["scale"] * rows[0] @ rows[1].swapaxes(-1, -2)).max()))
        return ropecy.attention(Q, K, V, **options)

    monkeypatch.setattr("ropecy.torch.attention", watch)
    layer(x)
    return met[0]


def test_layer_is_sdpa_on_rotated_rows():
    torch.manual_seed(3)
    layer = RoPEAttention(24, 6, num_kv_heads=2, bias=True).double()
    x, mask = torch.randn(2, 17, 24, dtype=torch.float64), padding(2, 17)
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


@pytest.mark.parametrize("near", [None, 0, 5])
def test_near_field_of_a_bounded_layer(near):
    """The far scores' products at a temperature of their own; without it, the bounded layer."""
    torch.manual_seed(3)
    layer = RoPEAttention(24, 6, num_kv_heads=2, bound=2.0, near=near, method="exact").double()
    x, mask = torch.randn(2, 17, 24, dtype=torch.float64), padding(2, 17)
    q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = (torch.nn.functional.normalize(y, dim=-1) for y in (q * 1.0, k))
    q = q * layer.temperature.sigmoid()
    q, k = (torch.from_numpy(layer.rotary.rotate(y.detach().numpy())) for y in (q, k))
    s = q @ k.repeat_interleave(3, dim=1).mT
    t = torch.arange(17) - torch.arange(17)[:, None]
    if near:
        assert layer.log_scale_near.exp() > 0
        s = torch.where(t.abs() < near, layer.log_scale_near.exp() * s, 2.0 * s)
    else:
        assert layer.log_scale_near is None
        s = 2.0 * s
    P = torch.where(mask[:, None, None] & (t <= 0), s, -math.inf).softmax(-1)
    seen = (mask[:, None, None] & (t <= 0)).any(-1, keepdim=True)
    O = torch.where(seen, P, 0) @ v.repeat_interleave(3, dim=1)
    torch.testing.assert_close(layer(x, mask), layer.o_proj(O.transpose(1, 2).flatten(2)), rtol=0, atol=1e-12)


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

    def watch(Q, K, V, **options):
        O, vjp = ropecy.attention_vjp(Q, K, V, **options)
        engines.append((vjp.certificate.engine, vjp.certificate.error))
        return O, vjp

    monkeypatch.setattr("ropecy.torch.attention_vjp", watch)
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
        ({"near": -1}, "near: got -1"),
    ],
)
def test_layer_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        RoPEAttention(**({"embed_dim": 32, "num_heads": 4} | arguments))


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


def test_the_bound_of_a_layer_that_names_none():
    narrow, wide = (RoPEAttention(8 * h, 8, head_dim=h, bound=True) for h in (8, 16))
    assert (narrow.bound, narrow.rotary.rotary_dim, narrow.near) == (4.0, 4, 64)
    assert (wide.bound, wide.rotary.rotary_dim, wide.near) == (2.0, 16, 64)
    kept = RoPEAttention(64, 8, bound=True, rotary=ropecy.Rotary(8))
    assert (kept.bound, kept.rotary.rotary_dim) == (4.0, 8)
    with pytest.raises(ValueError, match="bound: got False, wants a positive number"):
        RoPEAttention(64, 8, bound=False)
