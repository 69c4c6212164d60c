"""Packed sequences in PyTorch: lengths= of scaled_dot_product_attention, against each sequence by itself."""

import pytest

torch = pytest.importorskip("torch")

import ropecy  # noqa: E402
from ropecy.torch import RoPEAttention, scaled_dot_product_attention  # noqa: E402

Q_LENGTHS, K_LENGTHS = [20, 0, 35, 20], [20, 3, 40, 20]
EXACT = {"method": "exact"}


def _tensors(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    shapes = (2, 4, sum(Q_LENGTHS), 8), (2, 2, sum(K_LENGTHS), 8), (2, 2, sum(K_LENGTHS), 5)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def _one_by_one(Q, K, V, **options):
    q, k, v = Q.split(Q_LENGTHS, -2), K.split(K_LENGTHS, -2), V.split(K_LENGTHS, -2)
    return torch.cat([scaled_dot_product_attention(*one, **options) for one in zip(q, k, v, strict=True)], dim=-2)


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "rotary": {"is_causal": True, "rotary": ropecy.Rotary(8)},
    "near": {"near": (3, 0.7)},
    "near of heads": {"near": (3, [0.7, -0.5, 0.0, 2.0])},
    "window": {"window": 5},
}


@pytest.mark.parametrize("as_given", [list, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
@pytest.mark.parametrize("name", OPTIONS)
def test_each_sequence_is_what_it_is_alone(name, as_given):
    options = {**OPTIONS[name], **EXACT, "enable_gqa": True}
    lengths = as_given(Q_LENGTHS), as_given(K_LENGTHS)
    inputs = _tensors()
    found = scaled_dot_product_attention(*inputs, lengths=lengths, **options)
    expected = _one_by_one(*inputs, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    dO = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(O, inputs, dO) for O in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_one_vector_of_lengths_is_that_of_queries_and_keys():
    Q = _tensors()[0]
    found = scaled_dot_product_attention(Q, Q, Q, lengths=Q_LENGTHS, **EXACT)
    assert torch.equal(found, scaled_dot_product_attention(Q, Q, Q, lengths=(Q_LENGTHS, Q_LENGTHS), **EXACT))
    two = scaled_dot_product_attention(Q, Q, Q, lengths=[40, 35], **EXACT)
    assert torch.equal(two, scaled_dot_product_attention(Q, Q, Q, lengths=torch.tensor([40, 35]), **EXACT))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    def function(Q, K, V, q_lengths, k_lengths):
        lengths = q_lengths, k_lengths
        return scaled_dot_product_attention(Q, K, V, lengths=lengths, is_causal=True, enable_gqa=True, **EXACT).sin()

    inputs = _tensors()
    lengths = torch.tensor(Q_LENGTHS), torch.tensor(K_LENGTHS)
    expected = function(*inputs, *lengths)
    found = torch.compile(function, backend=backend, fullgraph=True)(*inputs, *lengths)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(O.sum(), inputs) for O in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_bfloat16_is_rounded_once():
    inputs = [x.detach().bfloat16() for x in _tensors()]
    options = {"lengths": (Q_LENGTHS, K_LENGTHS), "enable_gqa": True, **EXACT}
    found = scaled_dot_product_attention(*inputs, **options)
    expected = scaled_dot_product_attention(*(x.float() for x in inputs), **options)
    torch.testing.assert_close(found, expected.bfloat16(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("options", [{}, {"bound": 1.0}, {"bound": 1.0, "near": 0, "causal": False}])
def test_a_layer_of_packed_documents(options):
    torch.manual_seed(1)
    layer = RoPEAttention(32, 4, eps=1e-6, **options).double()
    x, documents = torch.randn(2, 70, 32, dtype=torch.float64), [30, 0, 25, 15]
    found = layer(x, lengths=torch.tensor(documents))
    expected = torch.cat([layer(each) for each in x.split(documents, 1) if each.shape[1]], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    ours, theirs = (torch.autograd.grad(y.sin().sum(), list(layer.parameters())) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_what_is_refused():
    Q = _tensors()[0]
    for lengths, error, message in (
        ([20, 20], ValueError, r"lengths: got 2 that add up to 40, wants 75 as there are queries"),
        (torch.tensor([[75]]), ValueError, r"lengths: got torch.int64 of shape \(1, 1\), wants a vector of integers"),
        (torch.tensor([75.0]), TypeError, r"lengths: got dtype torch.float32, wants integers"),
        (([75], 75), ValueError, r"lengths: got torch.int64 of shape \(\), wants a vector of integers"),
        (([75], [70, 5]), ValueError, r"lengths: got 1 lengths of queries and 2 of keys, wants one of each a sequence"),
        ([80, -5], ValueError, r"lengths: got -5, wants integers of at least 0"),
    ):
        with pytest.raises(error, match=message):
            scaled_dot_product_attention(Q, Q, Q, lengths=lengths)
    with pytest.raises(NotImplementedError, match=r"lengths: got packed sequences, wants None for a derivative in"):
        torch.func.jvp(lambda x: scaled_dot_product_attention(x, x, x, lengths=[75]), (Q,), (Q,))
