"""The operator ``ropecy::varlen_attention`` and its backward: attention of sequences side by side, or in pages.

Sequences with few queries are decoded in one call, their keys read where they lie; the others are `ropecy.attention` of
packed sequences.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from ..attention import attention
from ..engines.exact import few_packed
from ..machine.threads import MOST_THREADS
from ..problem.arguments import check_method
from ..problem.checks import check_integer
from ..problem.packed import counted
from ..problem.request import Request
from .derivatives import Gradient, refuse_second_order
from .operators import decode, differentiate, library, stored
from .threads import torch_threads

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor? cu_seq_k, Tensor? seqused_k, "
    "Tensor? block_table, SymInt max_q, SymInt max_k, SymInt[] window_size, str? rotary, float scale, float eps, "
    "str method, SymInt? threads"
)

library.define(f"varlen_attention({_INPUTS}) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag)
library.define(
    f"varlen_attention_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
)
_operator = torch.ops.ropecy.varlen_attention.default
_backward_operator = torch.ops.ropecy.varlen_attention_backward.default


class _Options(NamedTuple):
    """What the operators are given beside tensors and the lengths of sequences."""

    window_size: list[int]
    rotary: str | None
    scale: float
    request: Request
    threads: int


def _given(query: Tensor, key: Tensor, *given: Any) -> tuple[few_packed.Sequences, _Options]:
    """Where sequences lie, checked, and how to compute them."""
    *places, window_size, rotary, scale, eps, method, threads = given
    request = Request(**check_method(eps=eps, certify="proof", method=method, degree=None, seed=None))
    threads = torch.get_num_threads() if threads is None else check_integer("threads", threads, least=1)
    left, right = window_size
    band = None if left < 0 else -left, None if right < 0 else right
    options = _Options(window_size, rotary, scale, request, min(threads, MOST_THREADS))
    return few_packed.Sequences(*_places(len(query), key.shape, *places), band, scale), options


def _places(
    tokens: int,
    shape: torch.Size,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    seqused_k: Tensor | None,
    block_table: Tensor | None,
    *most: int,
) -> tuple[np.ndarray, ...]:
    """q_starts, k_starts, n_k and pages of `few_packed.Sequences`, checked."""
    q_starts = _starts("cu_seq_q", cu_seq_q, tokens)
    n = np.diff(q_starts)
    if block_table is None:
        k_starts = _starts("cu_seq_k", cu_seq_k, shape[0])
        pages, k_starts, room = np.zeros((len(n), 1), np.int32), k_starts[:-1], np.diff(k_starts)
    else:
        pages, k_starts = np.ascontiguousarray(block_table.numpy()), np.zeros(len(n), np.intp)
        room = np.full(len(n), pages.shape[1] * shape[1])
    n_k = room if seqused_k is None else seqused_k.numpy().astype(np.intp)
    for s in np.flatnonzero((n_k < 0) | (n_k > room))[:1]:
        raise ValueError(f"seqused_k: got {n_k[s]} for sequence {s}, wants a number from 0 to {room[s]}, its keys")
    for name, longest, found in (("max_q", most[0], n), ("max_k", most[1], n_k)):
        if len(found) and found.max() > longest:
            raise ValueError(f"{name}: got {longest}, wants {found.max()} at least, the length of a sequence")
    if block_table is not None:
        _check_pages(pages, n_k, shape)
    return q_starts, k_starts, n_k, pages


def _starts(name: str, cu_seq: Tensor, tokens: int) -> np.ndarray:
    """Where each sequence begins, and the last one ends."""
    starts = cu_seq.numpy().astype(np.intp)
    if starts[0] != 0:
        raise ValueError(f"{name}: got {starts[0]} at first, wants 0, where the first sequence begins")
    for s in np.flatnonzero(np.diff(starts) < 0)[:1]:
        raise ValueError(f"{name}: got {starts[s + 1]} after {starts[s]}, wants numbers that do not fall")
    if starts[-1] > tokens:
        raise ValueError(f"{name}: got {starts[-1]} at last, wants {tokens} at most, the number of tokens")
    return starts


def _check_pages(pages: np.ndarray, n_k: np.ndarray, shape: torch.Size) -> None:
    """Refuses numbers that are read and are none of a page."""
    count, page = shape[:2]
    wrong = (pages < 0) | (pages >= count)
    wrong &= np.arange(pages.shape[1]) < -(-n_k // max(1, page))[:, None]
    for s, place in np.argwhere(wrong)[:1]:
        raise ValueError(
            f"block_table: got page {pages[s, place]} for sequence {s}, wants one from 0 to {count - 1}, for there are "
            f"{count}"
        )


@torch.library.impl(library, "varlen_attention", "CPU")
def _forward(query: Tensor, key: Tensor, value: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    sequences, options = _given(query, key, *given)
    o, lse, right = _decode(query, key, value, sequences, options)
    rest = np.flatnonzero(~right)
    if len(rest):
        n, n_k = np.diff(sequences.q_starts)[rest], sequences.n_k[rest]
        rows, keys = _rows(sequences.q_starts[rest], n), _rows(sequences.k_starts[rest], n_k)
        k, v = (_of_keys(x, keys, n_k, sequences.pages[rest]) for x in (key, value))
        inputs = (stored(x.transpose(0, 1)) for x in (query[rows], k, v))
        with torch_threads:
            found, found_lse = attention(*inputs, **_keywords(n, n_k, options), return_lse=True)
        o[rows], lse[rows] = found.swapaxes(0, 1), found_lse.T
    end = sequences.q_starts[-1]
    o[end:], lse[end:] = 0, -np.inf
    lse = torch.from_numpy(np.ascontiguousarray(lse.T))
    return torch.from_numpy(o).to(query.dtype), lse.to(torch.promote_types(query.dtype, torch.float32))


def _decode(
    query: Tensor, key: Tensor, value: Tensor, sequences: few_packed.Sequences, options: _Options
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """O, lse, and of which sequences they are right: those with few queries, or with none at all."""
    if options.rotary is None and options.request.method in ("auto", "exact"):
        q, k, v = (stored(x) for x in (query, key, value))
        k, v = (x if x.ndim == 4 else x[None] for x in (k, v))
        with torch_threads:
            return few_packed.forward(q, k, v, sequences, options.request, options.threads)
    dtype = np.float64 if query.dtype == torch.float64 else np.float32
    o = np.empty((*query.shape[:2], value.shape[-1]), dtype)
    return o, np.empty(query.shape[:2]), np.diff(sequences.q_starts) == 0


def _rows(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray | slice:
    """The rows of sequences that begin at these rows, as an index: a slice where no other row is between them."""
    at = counted(lengths) + np.repeat(starts, lengths)
    return slice(at[0], at[-1] + 1) if len(at) and (np.diff(at) == 1).all() else at


def _of_keys(x: Tensor, rows: np.ndarray | slice, n_k: np.ndarray, pages: np.ndarray) -> Tensor:
    """The rows of keys or values: a view where they lie one after the other, else a copy."""
    if x.dim() == 3:
        return x[rows]
    at = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
    numbers = pages[np.repeat(np.arange(len(n_k)), n_k), at // x.shape[1]]
    return x[torch.from_numpy(numbers).long(), torch.from_numpy(at % x.shape[1])]


def _keywords(n: np.ndarray, n_k: np.ndarray, options: _Options) -> dict[str, Any]:
    """The keywords of `ropecy.attention` for sequences of so many queries and keys."""
    left, right = options.window_size
    window, most = None, int(n.sum() + n_k.sum())
    if left >= 0 or right > 0:
        window = most if left < 0 else left, most if right < 0 else right
    return {
        "R": None if options.rotary is None else decode(options.rotary),
        "scale": options.scale,
        "causal": right == 0,
        "window": window,
        "near": None,
        "q_offset": n_k - n,
        "lengths": (n, n_k),
        "eps": options.request.eps,
        "method": options.request.method,
        "threads": options.threads,
    }


@torch.library.impl(library, "varlen_attention_backward", "CPU")
def _backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *given: Any) -> tuple[Tensor, ...]:
    sequences, options = _given(query, key, *given)
    n, n_k = np.diff(sequences.q_starts), sequences.n_k
    ends = n.sum(), n.sum(), n_k.sum(), n_k.sum()
    inputs = (x[:end].transpose(0, 1) for x, end in zip((grad, query, key, value), ends, strict=True))
    *found, _ = differentiate(*inputs, _keywords(n, n_k, options))
    gradients = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    for to, dX in zip(gradients, found, strict=True):
        to[: dX.shape[1]] = dX.transpose(0, 1)
    return gradients


@torch.library.register_fake("ropecy::varlen_attention", lib=library)
def _(query, key, value, *given):
    lse = query.new_empty(query.shape[1::-1], dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty((*query.shape[:2], value.shape[-1])), lse


@torch.library.register_fake("ropecy::varlen_attention_backward", lib=library)
def _(grad, query, key, value, *given):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, backward: Any = _backward_operator) -> tuple[Tensor | None, ...]:
    found = backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*found, *[None] * (4 + len(ctx.options)))


torch.library.register_autograd(
    "ropecy::varlen_attention", lambda ctx, grad, _: _gradients(ctx, grad), setup_context=_save, lib=library
)
torch.library.register_autograd("ropecy::varlen_attention_backward", refuse_second_order, lib=library)


class PackedAttention(Function):
    """``ropecy::varlen_attention`` with derivatives in reverse mode, as `derivatives.attend` takes it."""

    compute = staticmethod(_forward)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return _operator(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad, partial(Gradient.apply, _backward_operator))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(
            "varlen_attn: got a derivative in forward mode, wants one in reverse mode (backward, torch.func.vjp); "
            "scaled_dot_product_attention has both, of one sequence"
        )
