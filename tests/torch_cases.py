"""Tensors, masks and options that the tests of ropecy.torch share, and what compares two functions of them."""

import torch

import ropecy

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


def padding(b, n):
    """True for the first few, for the last few, and for all keys."""
    counts = torch.tensor([n // 2, n // 3, n] * b)[:b, None]
    places = torch.arange(n)
    left = torch.arange(b)[:, None] % 2 == 1
    return torch.where(left, places >= n - counts, places < counts)


def rotary_options(n, n_k):
    R = ropecy.Rotary(8, pairing="interleaved", rotary_dim=6, scaling={"rope_type": "linear", "factor": 2.0})
    return {"rotary": R, "q_positions": torch.arange(n) + 5, "k_positions": torch.arange(n_k) * 2, "window": (9, 3)}
