"""Derivatives by ropecy.torch, and what PyTorch asks of an operator: opcheck, torch.compile, vmap."""

import math

import pytest

torch = pytest.importorskip("torch")

from torch_cases import EXACT, check_same, gradients, padding, rotary_options, tensors  # noqa: E402

import ropecy  # noqa: E402
from ropecy.torch import scaled_dot_product_attention  # noqa: E402


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

    for scale_near in (0.7, 0.0, [-1.0, 0.0]):
        inputs = (Q, K, V, torch.tensor(scale_near, dtype=torch.float64, requires_grad=True))
        assert torch.autograd.gradcheck(run, inputs)


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
    scales = {"one": 1.5, "of heads": [1.5, -0.5, 0.0, 1.0]}
    near = (torch.tensor(scales[near], requires_grad=True), 3) if near else (None, None)
    return (*inputs, mask, None, None, *near, None, 0.3, True, None, 3, None, 1e-3, "exact", None)


@pytest.mark.parametrize("near", [None, "one", "of heads"])
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
        inputs = tensors((2, 4, n, 8), (2, 2, n, 8), (2, 2, n, 3), (4,))
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
        options = (None, None, None, None, None, 0.3, True, None, 2, None, 1e-3, "exact", None)
        return torch.ops.ropecy.attention_backward(dO, Q, K, V, mask, *options)

    inputs = [x.detach() for x in inputs]
    found = torch.func.vmap(backward, in_dims=tuple(axes))(*inputs, mask)
    expected = zip(*one_by_one(backward, *inputs, mask), strict=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, torch.stack(b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (4,)])
@pytest.mark.parametrize("axis", [None, 0])
def test_vmap_with_a_near_field(axis, shape):
    """Each element has a gradient of its own by scale_near, whether that is its own or everybody's."""
    Q, K, V = tensors((5, 2, 4, 7, 4), (2, 2, 9, 4), (5, 2, 2, 9, 3))
    near = torch.linspace(0.5, 2, 5 * math.prod(shape), dtype=torch.float64).reshape(5, *shape).requires_grad_()
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
        options = (None, None, None, scale_near, 3, None, 0.3, True, None, 2, None, 1e-3, "exact", None)
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
