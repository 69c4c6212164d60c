"""The operators ``ropecy::attention`` and ``ropecy::attention_backward``: the functions of NumPy for torch.library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attention import attention, differentiable
from ..certificate import Certificate
from ..rotary import Rotary
from .threads import torch_threads

try:
    from ml_dtypes import bfloat16
except ImportError:
    bfloat16 = None


# A custom operator takes no Rotary, so that it goes through as text. Compiled code holds the text as a constant,
# guarded by the object's identity.
@torch.compiler.assume_constant_result
def encode(rotary: Rotary) -> str:
    _, fields = rotary.__reduce__()
    return json.dumps(fields, default=lambda x: x.tolist())


@lru_cache(maxsize=64)
def decode(rotary: str) -> Rotary:
    return Rotary(*json.loads(rotary))


def _memory(x: Tensor) -> np.ndarray:
    """x's own memory, where it holds x's numbers and not their negatives."""
    try:
        return x.numpy()
    except RuntimeError:  # it has a gradient, or is to be negated first
        return x.numpy(force=True)


def array(x: Tensor) -> np.ndarray:
    """x's own memory; halves become float32, in which they are computed anyway."""
    return _memory(x.float() if x.dtype.itemsize == 2 and x.is_floating_point() else x)


def stored(x: Tensor) -> np.ndarray:
    """x's own memory as it is stored, bfloat16 too where NumPy has been taught that type."""
    if x.dtype != torch.bfloat16:
        return _memory(x)
    if bfloat16 is None:
        return array(x)
    return x.detach().resolve_neg().view(torch.uint16).numpy().view(bfloat16)


def tensor(x: np.ndarray, like: Tensor) -> Tensor:
    x = np.ascontiguousarray(x)
    if bfloat16 is not None and x.dtype == bfloat16:
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    out = torch.from_numpy(x)
    return out if out.dtype == like.dtype else out.to(like.dtype)


def _keywords(key_mask, q_positions, k_positions, scale_near, *options):
    """What the operators are given beside Q, K and V, as the keyword arguments of `ropecy.attention`."""
    width, rotary, scale, causal, window, q_offset, lengths, eps, method, threads = options
    optional = {"key_mask": key_mask, "q_positions": q_positions, "k_positions": k_positions}
    return {name: None if x is None else array(x) for name, x in optional.items()} | {
        "R": None if rotary is None else decode(rotary),
        "scale": scale,
        "causal": causal,
        "window": window if window is None or len(window) > 1 else window[0],
        "near": None if width is None else (width, scale_near.tolist()),
        "q_offset": q_offset,
        "lengths": None if lengths is None else tuple(array(lengths)),
        "eps": eps,
        "method": method,
        "threads": torch.get_num_threads() if threads is None else threads,
    }


# Where the operator leaves certificates, which are no tensors, for the call around it: a list, if they are wanted.
_collected: ContextVar[list[Certificate] | None] = ContextVar("collected", default=None)


@contextmanager
def collect_certificates() -> Iterator[list[Certificate]]:
    """A list that gets the certificate of each ``ropecy::attention`` which this thread computes inside the block."""
    found: list[Certificate] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? q_positions, Tensor? k_positions, "
    "Tensor? scale_near, SymInt? width, str? rotary, float scale, bool causal, SymInt[]? window, SymInt q_offset, "
    "Tensor? lengths, float eps, str method, SymInt? threads"
)


# What torch.library.custom_op would put around each call, which looks whether results share memory with inputs, takes a
# third of a short attention's time.
library = torch.library.Library("ropecy", "DEF")
library.define(f"attention({_INPUTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
library.define(
    f"attention_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
)
attention_operator = torch.ops.ropecy.attention.default
backward_operator = torch.ops.ropecy.attention_backward.default


@torch.library.impl(library, "attention", "CPU")
def compute_attention(query, key, value, *given):
    found = _collected.get()
    how = _keywords(*given)
    arrays = [stored(x) for x in (query, key, value)]
    with torch_threads:
        if found is None:
            return tensor(attention(*arrays, **how), query)
        O, certificate = attention(*arrays, **how, return_certificate=True)
    found.append(certificate)
    return tensor(O, query)


@torch.library.impl(library, "attention_backward", "CPU")
def _backward(grad, query, key, value, *given):
    *gradients, dscale_near = differentiate(grad, query, key, value, _keywords(*given))
    scale_near = given[3]
    return *gradients, dscale_near.to((query if scale_near is None else scale_near).dtype)


def differentiate(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, how: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and scale_near, 0 if there is none; `how` is keywords of `attention_vjp`."""
    with torch_threads:
        evaluation = differentiable(stored(query), stored(key), stored(value), how.pop("R"), how)
    # A gradient scaler looks for NaN in gradients, by which it knows that it has to skip a step.
    lost = ~grad.isfinite().all(-1, keepdim=True)
    any_lost = bool(lost.any())
    kept = stored(grad.masked_fill(lost, 0) if any_lost else grad)
    with torch_threads:
        g = evaluation.vjp(kept)
    dscale_near = torch.tensor(0.0 if how["near"] is None else g["dscale_near"], dtype=torch.float64)
    dQ, dK, dV = tensor(g["dQ"], query), tensor(g["dK"], key), tensor(g["dV"], value)
    if any_lost:
        nan = torch.zeros_like(lost, dtype=grad.dtype).masked_fill(lost, torch.nan)
        of_heads = nan.sum((-2, -1)).reshape(-1, *dscale_near.shape).sum(0)
        dQ, dscale_near = _spoilt(dQ, nan), dscale_near + of_heads
        dK, dV = (_spoilt(x, nan.sum(-2, keepdim=True)) for x in (dK, dV))
    return dQ, dK, dV, dscale_near


def _spoilt(gradient: Tensor, nan: Tensor) -> Tensor:
    """gradient, NaN where nan (..., heads, rows or 1, 1) is it for a head or batch element that shares it."""
    heads = gradient.shape[-3] if gradient.dim() > 2 else 1
    if nan.dim() > 2 and 1 < heads < nan.shape[-3]:
        nan = nan.unflatten(-3, (heads, -1)).sum(-3)
    return gradient + nan.sum_to_size(*gradient.shape[:-2], *nan.shape[-2:])


@torch.library.register_fake("ropecy::attention", lib=library)
def _(query, key, value, *options):
    tensors = (query, key, value)
    lead = torch.broadcast_shapes(*(x.shape[:-3] for x in tensors))
    if any(x.dim() > 2 for x in tensors):
        lead = (*lead, max(x.shape[-3] for x in tensors if x.dim() > 2))
    return query.new_empty((*lead, query.shape[-2], value.shape[-1]))


@torch.library.register_fake("ropecy::attention_backward", lib=library)
def _(grad, query, key, value, key_mask, q_positions, k_positions, scale_near, *options):
    near = query.new_empty(()) if scale_near is None else scale_near.new_empty(scale_near.shape)
    return *(x.new_empty(x.shape) for x in (query, key, value)), near


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What backward needs: the tensors among the inputs of ``ropecy::attention``, and its options."""
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def input_gradients(ctx: Any, grad: Tensor, backward: Any = backward_operator) -> tuple[Tensor | None, ...]:
    """A gradient, or None, for each input of ``ropecy::attention``."""
    # Under checkpoint, saved tensors are computed again when they are asked for, and may be asked for once.
    tensors = ctx.saved_tensors
    *gradients, dscale_near = backward(grad, *tensors, *ctx.options)
    near = None if tensors[6] is None else dscale_near
    return (*gradients, None, None, None, near, *[None] * len(ctx.options))


torch.library.register_autograd("ropecy::attention", input_gradients, setup_context=save_inputs, lib=library)


def _batched(info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...], rows: int, expand: bool) -> list[Any]:
    """Tensors with vmap's axis first, then 1s up to the rank of the others: `rows` of them (..., n, width), then three
    that may be None, (..., n); ``expand`` lets those that have no such axis have it all the same.
    """
    rank = max(x.dim() - (axis is not None) for x, axis in zip(inputs[:rows], in_dims, strict=False))
    tensors = []
    for place, (x, axis) in enumerate(zip(inputs[: rows + 3], in_dims, strict=False)):
        own_rank = rank if place < rows else rank - 1
        if x is None or (axis is None and place >= rows and x.dim() == 1):
            tensors.append(x)
            continue
        x = x.unsqueeze(0) if axis is None else x.movedim(axis, 0)
        x = x.reshape(x.shape[:1] + (1,) * (own_rank - x.dim() + 1) + x.shape[1:])
        tensors.append(x.expand(info.batch_size, *x.shape[1:]) if expand and place < rows else x)
    return tensors


def _one_by_one(operator: Any, info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> list[Any]:
    """The operator's result for each element of vmap's batch: a call has a scale_near and a gradient by it."""

    def element(x: Any, axis: Any, i: int) -> Any:
        return x.select(axis, i) if isinstance(axis, int) else x  # of a list, the axis is a list

    return [
        operator(*(element(x, axis, i) for x, axis in zip(inputs, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]


@torch.library.register_vmap("ropecy::attention", lib=library)
def _(info, in_dims, *inputs):
    if in_dims[6] is not None:
        return torch.stack(_one_by_one(attention_operator, info, in_dims, inputs)), 0
    tensors = _batched(info, in_dims, inputs, rows=3, expand=False)
    return attention_operator(*tensors, *inputs[6:]), 0


@torch.library.register_vmap("ropecy::attention_backward", lib=library)
def _(info, in_dims, *inputs):
    # Each batch element has gradients of its own, also of what all of them share.
    if inputs[7] is not None:
        each = _one_by_one(backward_operator, info, in_dims, inputs)
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0, 0, 0, 0)
    *gradients, dscale_near = backward_operator(*_batched(info, in_dims, inputs, rows=4, expand=True), *inputs[7:])
    shapes = (
        x.shape if axis is None else x.movedim(axis, 0).shape[1:]
        for x, axis in zip(inputs[1:4], in_dims[1:4], strict=True)
    )
    gradients = [g.reshape(info.batch_size, *shape) for g, shape in zip(gradients, shapes, strict=True)]
    return (*gradients, dscale_near), (0, 0, 0, None)
