"""The work that the benchmarks share: random rows in the regime, |score| <= 1, and the engines that do it."""

import numpy as np

import ropecy

EPS = 1e-3
RIVALS = ("polynomial", "exact", "sdpa")


def arrays(n, d, dtype="float32"):
    """Q and K of root mean square 1, normal V and dO: (n, d) each. In place, for peaks of memory are measured too."""
    rng = np.random.default_rng(0)
    Q, K, V, dO = (rng.standard_normal((n, d), dtype) for _ in range(4))
    for X in (Q, K):
        X /= np.sqrt(np.einsum("ij,ij->i", X, X) / d)[:, None]
    return Q, K, V, dO


def forward(rival, n, d, causal):
    """A function of no arguments that computes attention."""
    Q, K, V, _ = arrays(n, d)
    R = ropecy.Rotary(d)
    if rival == "sdpa":
        q, k, v = _tensors(R.rotate(Q), R.rotate(K), V)
        return lambda: _sdpa(q, k, v, causal)
    return lambda: ropecy.attention(Q, K, V, R, causal=causal, eps=EPS, method=rival)


def forward_and_backward(rival, n, d, causal):
    """A function of no arguments that computes attention and dQ, dK, dV."""
    Q, K, V, dO = arrays(n, d)
    R = ropecy.Rotary(d)
    if rival == "sdpa":
        q, k, v, do = _tensors(R.rotate(Q), R.rotate(K), V, dO)
        import torch

        inputs = [x.requires_grad_() for x in (q, k, v)]
        return lambda: torch.autograd.grad(_sdpa(*inputs, causal), inputs, do)

    def run():
        _, vjp = ropecy.attention_vjp(Q, K, V, R, causal=causal, eps=EPS, method=rival)
        return vjp(dO)

    return run


def _tensors(*arrays):
    """(1, 1, n, d) tensors; without torch, asv skips what asks for them."""
    try:
        import torch
    except ImportError:
        raise NotImplementedError("torch is not installed") from None
    torch.set_num_threads(ropecy.info()["threads"])
    return [torch.from_numpy(X)[None, None] for X in arrays]


def _sdpa(q, k, v, causal):
    from torch.nn.functional import scaled_dot_product_attention

    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=1 / q.shape[-1])
