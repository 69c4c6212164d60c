"""First derivatives for PyTorch: reverse mode by the backward operator, forward mode by attention's definition.

An operator of torch.library has no forward-mode derivative (it would be 0 without a word), and the transforms of
torch.func do not take it. So attention is `Attention`, an autograd.Function around the operator. torch.compile takes no
Function with a forward mode: its graphs hold the operator itself, and break where a transform is around it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import Function, forward_ad
from torch.nn import Parameter

from ..problem.arguments import band
from ..rotary import Rotary
from .operators import (
    attention_operator,
    backward_operator,
    compute_attention,
    decode,
    input_gradients,
    library,
    save_inputs,
)

# Scores that forward mode holds at once.
_TILE = 2**22


class Attention(Function):
    """``ropecy::attention`` with derivatives in both modes; it takes what the operator takes, in the same order.

    Attributes
    ----------
    compute : callable
        What the operator, which `forward` is, does with tensors on the CPU.
    """

    generate_vmap_rule = True
    compute = staticmethod(compute_attention)

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return attention_operator(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save_inputs(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:7])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return input_gradients(ctx, grad, partial(Gradient.apply, backward_operator))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        if ctx.options[6] is not None:
            raise NotImplementedError("lengths: got packed sequences, wants None for a derivative in forward mode")
        if ctx.options[-2] in ("polynomial", "fft"):
            raise NotImplementedError(
                f"method: got {ctx.options[-2]!r}, wants 'auto' or 'exact' for a derivative in forward mode, which is "
                "computed exactly, pair by pair; derivatives in reverse mode (backward, torch.func.vjp) take any method"
            )
        with torch.autocast("cpu", enabled=False):
            return _tangent(ctx.saved_tensors, tangents[:7], ctx.options)


def attend(function: Any, *inputs: Any) -> Any:
    """What `Attention`, or a function like it, gives for its inputs, whether it is being compiled or not. The first
    seven of them are tensors or None.
    """
    if not torch.compiler.is_compiling():
        if _may_be_differentiated(inputs):
            return function.apply(*inputs)
        # To apply a Function takes longer than a short attention, and the operator's own way through PyTorch, which
        # would record nothing and change nothing here, a third of it.
        if _means_itself(inputs):
            return function.compute(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return function.forward(*inputs)
    return _attend_outside_graphs(function, *inputs) if _inside_derivative() else function.forward(*inputs)


def _may_be_differentiated(inputs: tuple[Any, ...]) -> bool:
    """Whether forward mode or a transform of torch.func is around the call, or gradients are recorded of an input."""
    if forward_ad._current_level >= 0 or peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:7])


def _means_itself(inputs: tuple[Any, ...]) -> bool:
    """Whether an operator of these inputs is but the function of their numbers: none is a subclass, no mode and no
    tracer sees what is called.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or torch.jit.is_tracing():
        return False
    return all(x is None or (type(x) in (Tensor, Parameter) and x.is_cpu) for x in inputs[:7])


@torch.compiler.disable(
    reason="ropecy's attention is in no graph together with forward mode or torch.func's grad or vjp"
)
def _attend_outside_graphs(function: Any, *inputs: Any) -> Any:
    return function.apply(*inputs)


@torch.compiler.assume_constant_result
def _inside_derivative() -> bool:
    """Whether what is being compiled is itself inside forward mode or a transform of torch.func other than vmap."""
    transforms = retrieve_all_functorch_interpreters()
    return forward_ad._current_level >= 0 or any(each.key() != TransformType.Vmap for each in transforms)


class Gradient(Function):
    """An operator that computes gradients, of its inputs; its own derivatives are refused in both modes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, *inputs: Any) -> tuple[Tensor, ...]:
        return operator(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        refuse_second_order(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        refuse_second_order(ctx, *tangents)


def refuse_second_order(ctx: Any, *_: Any) -> None:
    """A derivative of the gradient, in either mode."""
    raise NotImplementedError(
        "ropecy has derivatives of first order only: attention's gradient has none of its own; second derivatives come "
        "from forward mode by reverse mode, torch.func.jacrev(torch.func.jacfwd(f)), or from PyTorch's own attention"
    )


torch.library.register_autograd("ropecy::attention_backward", refuse_second_order, lib=library)


def _tangent(tensors: tuple[Any, ...], tangents: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    r"""The derivative of O = P V along the tangents of query, key, value and scale_near; where there is none, it is 0.

    With dS for that of the scores, dO_i = sum_j P_ij (dS_ij - sum_k P_ik dS_ik) V_j + sum_j P_ij dV_j. Rows are taken
    in blocks, with the keys that the band leaves them: time n n_k (3 d + 3 d_v), memory `_TILE` scores. All of it is
    made of PyTorch's operations, so that it can be mapped by vmap and differentiated again.
    """
    query, key, value, key_mask, q_positions, k_positions, scale_near = tensors
    width, rotary, scale, causal, window, q_offset, *_ = options
    (q, dq), (k, dk), (v, dv) = _rows(tensors[:3], tangents[:3])
    n, n_k = q.shape[-2], k.shape[-2]
    if key_mask is not None:
        k, dk, v, dv = (torch.where(key_mask[..., None], x, 0) for x in (k, dk, v, dv))
    if rotary is not None:
        q_positions = torch.arange(n) + q_offset if q_positions is None else q_positions
        k_positions = torch.arange(n_k) if k_positions is None else k_positions
        length = max(1, *(1 + int(p.max()) for p in (q_positions, k_positions) if p.numel()))
        q, dq = (_rotate(x, q_positions, decode(rotary), length) for x in (q, dq))
        k, dk = (_rotate(x, k_positions, decode(rotary), length) for x in (k, dk))
    lo, hi = band(causal, window if window is None or len(window) > 1 else window[0])
    heads = math.prod(torch.broadcast_shapes(*(x.shape[:-2] for x in (q, k, v))))
    step = max(1, _TILE // max(1, heads * n_k))
    parts = []
    for start in range(0, n, step):
        rows, stop = slice(start, start + step), min(n, start + step)
        first = 0 if lo is None else min(n_k, max(0, start + q_offset + lo))
        last = n_k if hi is None else max(first, min(n_k, stop + q_offset + hi))
        keys = slice(first, last)
        t = torch.arange(first, last) - (torch.arange(start, stop)[:, None] + q_offset)
        seen = (t >= (-math.inf if lo is None else lo)) & (t <= (math.inf if hi is None else hi))
        if key_mask is not None:
            seen = seen & key_mask[..., None, keys]
        products = q[..., rows, :] @ k[..., keys, :].mT
        tangent = dq[..., rows, :] @ k[..., keys, :].mT + q[..., rows, :] @ dk[..., keys, :].mT
        if width is None:
            S, dS = scale * products, scale * tangent
        else:
            near = t.abs() < width
            scales = torch.where(near, scale_near.to(q.dtype)[..., None, None], scale)
            S, dS = scales * products, scales * tangent
            if tangents[6] is not None:
                dS = dS + torch.where(near, tangents[6].to(q.dtype)[..., None, None], 0) * products
        P = seen * torch.softmax(S.masked_fill(~seen, torch.finfo(q.dtype).min), dim=-1)
        W = P * dS
        O = P @ v[..., keys, :]
        parts.append(W @ v[..., keys, :] - W.sum(-1, keepdim=True) * O + P @ dv[..., keys, :])
    return torch.cat(parts, dim=-2).to(query.dtype) if parts else query.new_zeros((*q.shape[:-1], v.shape[-1]))


def _rows(tensors: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...]) -> list[tuple[Tensor, Tensor]]:
    """Each of query, key, value and its tangent in the dtype computed in, with a head for each of the result's."""
    heads = max((x.shape[-3] for x in tensors if x.dim() > 2), default=1)

    def spread(x: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        shared = x.dim() > 2 and 1 < x.shape[-3] < heads
        return x.repeat_interleave(heads // x.shape[-3], dim=-3) if shared else x

    pairs = zip(tensors, tangents, strict=True)
    return [(spread(x), spread(torch.zeros_like(x) if dx is None else dx)) for x, dx in pairs]


def _rotate(x: Tensor, positions: Tensor, R: Rotary, length: int) -> Tensor:
    """`Rotary.rotate` of PyTorch's operations, with the frequencies of a call of so many positions."""
    theta, factor = R._frequencies(length)
    angle = positions[..., None] * torch.tensor(theta)
    cos, sin = ((factor * part).to(x.dtype) for part in (angle.cos(), angle.sin()))
    pairs = len(theta)
    turning, kept = x[..., : 2 * pairs], x[..., 2 * pairs :]
    split = (2, pairs) if R.pairing == "half" else (pairs, 2)
    a, b = turning.unflatten(-1, split).unbind(-2 if R.pairing == "half" else -1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-2 if R.pairing == "half" else -1)
    return torch.cat((turned.flatten(-2), kept), dim=-1)
