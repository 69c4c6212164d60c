"""ropecy.torch's function against PyTorch's own attention, and what it refuses."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch_cases import EXACT, SDPA, check_same, gradients, padding, rotary_options, tensors  # noqa: E402

import ropecy  # noqa: E402
from ropecy.torch import scaled_dot_product_attention  # noqa: E402

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

    monkeypatch.setattr("ropecy.torch.operators.attention", watch)
    inputs = tensors(*[(2, 21, 3, 8)] * 3)
    out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs), **EXACT)
    assert met["in"] == [x.data_ptr() for x in inputs]
    assert met["out"] == out.data_ptr()


def test_options_are_those_of_ropecy_attention():
    Q, K, V = tensors((2, 3, 20, 8), (2, 3, 31, 8), (2, 3, 31, 4), grad=False)
    options = rotary_options(20, 31)
    ours = scaled_dot_product_attention(Q, K, V, is_causal=True, q_offset=4, scale=0.3, **options, **EXACT)
    arrays = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    R = arrays.pop("rotary")
    theirs = ropecy.attention(*(x.numpy() for x in (Q, K, V)), R, causal=True, q_offset=4, scale=0.3, **arrays, **EXACT)
    assert np.array_equal(ours.numpy(), theirs)


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


def test_near_field_by_a_number_of_each_head():
    Q, K, V = tensors(*[(2, 3, 40, 8)] * 3)

    def run(scale_near, rows=(Q, K, V)):
        return scaled_dot_product_attention(*rows, near=(5, scale_near), is_causal=True, **EXACT)

    numbers = [1.5, -0.5, 0.0]
    scale_near = torch.tensor(numbers, requires_grad=True)
    found = run(scale_near)
    assert torch.equal(found, run(numbers)) and torch.equal(found, run(np.array(numbers)))
    for head, number in enumerate(numbers):
        assert torch.allclose(found[:, head], run(number)[:, head], rtol=0, atol=1e-12)
    found.sum().backward()
    assert scale_near.grad.dtype == torch.float32 and scale_near.grad.shape == (3,)
    each = [torch.tensor(number, requires_grad=True) for number in numbers]
    run(each).sum().backward()
    assert torch.equal(torch.stack([number.grad for number in each]), scale_near.grad)
    one = torch.tensor([1.5], requires_grad=True)
    alone = [x[0, 0] for x in (Q, K, V)]
    result = run(one, alone)
    assert torch.equal(result, run(1.5, alone))
    result.sum().backward()
    assert one.grad.shape == (1,)


AUTOCAST = [(None, None, None), (None, torch.bfloat16, torch.float16), (torch.float16, None, torch.bfloat16)]


@pytest.mark.parametrize("dtypes", AUTOCAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, dtypes):
    """Cast as PyTorch's own attention casts them, with gradients in each argument's own dtype."""
    shapes = [(2, 2, 33, 16)] * 3
    inputs = [x.detach().to(own or torch.float32) for x, own in zip(tensors(*shapes), dtypes, strict=True)]
    inputs = [x.requires_grad_() for x in inputs]
    with torch.autocast("cpu", dtype=dtype):
        ours, theirs = (gradients(attend, inputs) for attend in (scaled_dot_product_attention, SDPA))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0.05)
    doubled = [inputs[0], *tensors(*shapes[1:])]
    for attend in (scaled_dot_product_attention, SDPA):  # float64 is left alone, and fits nothing else
        with torch.autocast("cpu", dtype=dtype), pytest.raises((TypeError, RuntimeError), match=r"dtype|wants"):
            attend(*doubled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_certificate(dtype, monkeypatch):
    """That of the result beside it, of one call; and it holds."""
    inputs = tensors(*[(2, 3, 300, 4)] * 3, dtype=dtype)
    options = {"scale": 0.02, "eps": 1e-2, "method": "polynomial"}
    calls = []

    def count(*arrays, **how):
        calls.append(how)
        return ropecy.attention(*arrays, **how)

    monkeypatch.setattr("ropecy.torch.operators.attention", count)
    O, certificate = scaled_dot_product_attention(*inputs, **options, return_certificate=True)
    assert len(calls) == 1 and certificate.engine == "polynomial" and certificate.rows_truncation.shape == (2, 3, 300)
    assert torch.equal(O, scaled_dot_product_attention(*inputs, **options))
    exact = scaled_dot_product_attention(*(x.double() for x in inputs), **options | EXACT)
    spread = inputs[2].amax(-2).sub(inputs[2].amin(-2)).max()
    assert (O - exact).abs().max() <= (certificate.error + torch.finfo(dtype).eps) * spread
    O.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    # Whatever raises inside leaves no collector behind.
    with pytest.raises(ropecy.BoundedEntryError):
        scaled_dot_product_attention(*inputs, scale=40.0, method="polynomial", return_certificate=True)
    assert isinstance(scaled_dot_product_attention(*inputs), torch.Tensor)


def test_certificate_under_vmap_and_compile():
    Q, K, V = tensors(*[(3, 2, 30, 4)] * 3, grad=False)
    near = torch.tensor([0.5, 5.0, 0.1], dtype=torch.float64)
    found = []

    def run(q, k, v, scale_near):
        O, certificate = scaled_dot_product_attention(
            q, k, v, near=(3, scale_near), return_certificate=True, eps=1e-6, **EXACT
        )
        found.append(certificate)
        return O

    torch.func.vmap(run)(Q, K, V, near)
    one_by_one = [run(*x) is None or found[-1].error for x in zip(Q, K, V, near, strict=True)]
    assert found[0].error == max(one_by_one) > min(one_by_one)
    with pytest.raises(NotImplementedError, match="return_certificate: got tensors without numbers"):
        x = torch.empty(2, 3, 4, device="meta")
        scaled_dot_product_attention(x, x, x, return_certificate=True)
    found.clear()
    more = Q, K, V, 1.0
    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(*more), run(*more), rtol=0, atol=1e-12)
    assert found[0].error == found[1].error
    with pytest.raises(Exception, match="return_certificate: a certificate is no tensor"):
        whole = torch.compile(fullgraph=True, backend="aot_eager")(lambda: run(*more))
        whole()


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
        ({"query": torch.ones(2, 4, 9, 0), "key": torch.ones(2, 4, 9, 0)}, ValueError, r"query: got shape .*, 0\)"),
        ({"query": torch.ones(2, 4, 9, 8), "key": torch.ones(2, 4, 9, 0)}, ValueError, r"key: got shape .*, 0\)"),
        ({"key": torch.full((2, 4, 9, 8), math.nan)}, ValueError, "K: got NaN"),
        ({"window": 0}, ValueError, "window: got 0"),
        ({"near": 3}, TypeError, r"near: got 3, wants a pair \(w, scale_near\)"),
        ({"near": (3, torch.ones(2))}, ValueError, r"near: got a scale_near of shape \(2,\), wants a number"),
        ({"near": (3, torch.ones(1))}, ValueError, r"near: got .*\(1,\), wants a number, shape \(\), or shape \(4,\)"),
        ({"near": (3, torch.ones(4, 1))}, ValueError, r"near: got a scale_near of shape \(4, 1\), wants a number"),
        ({"near": (3, "x")}, TypeError, "near: got scale_near = 'x', wants a number, or one for each head"),
        ({"near": (3, torch.ones(4, device="meta"))}, NotImplementedError, "near: got a tensor on meta"),
        (
            {"rotary": ropecy.Rotary(8), "k_positions": torch.ones(9, dtype=torch.long, device="meta")},
            NotImplementedError,
            "k_positions: got a tensor on meta, wants one on the CPU",
        ),
        (
            {"attn_mask": torch.ones(9, dtype=torch.bool, device="meta")},
            NotImplementedError,
            "attn_mask: got a tensor on meta, wants one on the CPU",
        ),
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
    monkeypatch.setattr("ropecy.torch.operators.attention", lambda Q, K, V, **how: met.append(how["threads"]) or Q)
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
    alone = torch.stack([data[i] for i in range(4)])  # threads exist before the fork
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(loader)), alone)


def test_importing_ropecy_imports_no_torch():
    code = "import sys, ropecy; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cache_of_halves_is_read_as_it_is_stored(dtype, monkeypatch):
    torch.manual_seed(0)
    query = torch.randn(2, 4, 1, 16).to(dtype)
    # As transformers lays tokens out, in a cache with room for more.
    key, value = (torch.randn(2, 300, 2, 16).to(dtype).transpose(1, 2)[:, :, :200] for _ in range(2))
    expected = SDPA(*(x.double() for x in (query, key, value)), enable_gqa=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", None)
        out = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0.51 * torch.finfo(dtype).eps)
    key[1, 1, 150, 3] = torch.nan
    with pytest.raises(ValueError, match=r"K: got NaN at index \(1, 1, 150, 3\)"):
        scaled_dot_product_attention(query, key, value, enable_gqa=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 8, 9, 40])
def test_a_certificate_counts_storing_in_half_precision_for_few_queries_and_many(n, dtype):
    pytest.importorskip("ml_dtypes")
    query, key, value = (torch.rand(2, rows, 8).to(dtype) for rows in (n, 60, 60))
    out, certificate = scaled_dot_product_attention(query, key, value + 3, return_certificate=True)
    exact = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), (value + 3).double())
    spread = float((value + 3).double().max() - (value + 3).double().min())
    assert 1e-4 < certificate.storing < certificate.rounding
    assert float((out.double() - exact).abs().max()) <= certificate.error * spread
    assert torch.equal(out, scaled_dot_product_attention(query, key, value + 3))
