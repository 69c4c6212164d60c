"""varlen_attn: what it is given, checked and put into the forms that the operator takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rotary import Rotary
from .derivatives import attend
from .function import of_one_dtype
from .operators import encode
from .packed import PackedAttention


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    rotary: Rotary | None = None,
    eps: float = 1e-3,
    method: str = "auto",
    threads: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""softmax(scale Q R_{j-i} K^T) V of N sequences that lie side by side, as torch.nn.attention.varlen's function.

    Parameters
    ----------
    query : (T_q, H_q, d) tensor
        All queries of the first sequence, then those of the second. On the CPU, float32, float64, float16 or bfloat16.
    key, value : (T_k, H_k, d), (T_k, H_k, d_v) tensors
        Of query's dtype, side by side as the queries are; or, with `block_table`, (pages, page, H_k, _): keys in pages
        of equal size.
    cu_seq_q : (N + 1,) int32 or int64 tensor
        Sequence s has the queries from cu_seq_q[s] to cu_seq_q[s + 1], and may have none. Rows past the last are 0.
    cu_seq_k : (N + 1,) int32 or int64 tensor or None
        The same of keys; with `block_table` it is not used and may be None.
    max_q, max_k : int
        No sequence has more queries, or keys.
    return_aux : torch.nn.attention.varlen.AuxRequest, optional
        If ``return_aux.lse`` is True, `lse` is returned too.
    scale : float, optional
        By default 1/sqrt(d).
    window_size : (int, int)
        (left, right): query i of n sees the keys j of n_k with -left <= j - (i + n_k - n) <= right; -1 is no bound. So
        (-1, 0) is causal, aligned at the bottom right.
    enable_gqa : bool
        Whether H_k may be less than H_q: head h uses key head h // (H_q / H_k).
    seqused_k : (N,) int32 or int64 tensor, optional
        How many keys sequence s has, its first ones.
    block_table : (N, _) int32 tensor, optional
        The pages of each sequence, in their order; it wants `seqused_k`. What is past its last page in use is not read.
    num_splits : int, optional
        Has no effect: how work is cut depends on the number of keys alone.
    rotary : Rotary, optional
        Rotates keys by their positions in their sequence, from 0, and query i as key i + n_k - n; by default they come
        as they are.
    eps, method
        As in `ropecy.attention`, of each sequence.
    threads : int, optional
        By default ``torch.get_num_threads()``.

    Returns
    -------
    O : (T_q, H_q, d_v) tensor
        Of query's dtype, contiguous. Rows that see no key are 0.
    lse : (H_q, T_q) tensor
        The log of the sum of exp of the scores, -inf where there is no key; float32, float64 if query is. It has no
        gradient.

    Raises
    ------
    TypeError
        dtypes that disagree, lengths or pages that are not integers.
    NotImplementedError
        A device other than the CPU, a derivative in forward mode or of the gradient.
    RuntimeError
        A gradient with `seqused_k` or `block_table`.
    ValueError
        Shapes and numbers of heads that do not fit, lengths and pages that are not there; and all that
        `ropecy.attention` refuses, NaN and Inf in what is read among it.

    Notes
    -----
    A sequence of at most 8 queries a head, and of at most 32 of all heads that share a key head, is decoded, if there
    is no `rotary`: those of its keys and values that a query sees are read once, where they lie and as they are stored,
    paged or not, near the rate of memory, and threads share the work by parts of 512 keys. Other sequences are one
    call of `ropecy.attention` with their `lengths`, for which their keys are copied from pages. The result of a
    sequence is bitwise the same whatever the size of pages and for every number of threads, and, where it is computed
    exactly, whatever is beside it; sequences of one shape may share a polynomial.

    Examples
    --------
    >>> query, key, value = torch.randn(3, 90, 2, 16)
    >>> ends = torch.tensor([0, 20, 90])
    >>> varlen_attn(query, key, value, ends, ends, 70, 70, window_size=(-1, 0)).shape
    torch.Size([90, 2, 16])
    """
    query, key, value = of_one_dtype(query, key, value)
    _check_shapes(query, key, value, block_table)
    _check_heads(query.shape[1], key.shape[-2], enable_gqa)
    _check_places(cu_seq_q, cu_seq_k, seqused_k, block_table)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        for name, x in (("seqused_k", seqused_k), ("block_table", block_table)):
            if x is not None:
                raise RuntimeError(f"{name}: got one beside a tensor that requires a gradient, it is inference-only")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, lse = attend(
        PackedAttention, query, key, value, cu_seq_q, cu_seq_k, seqused_k, block_table, max_q, max_k,
        _window(window_size), None if rotary is None else encode(rotary), scale, eps, method, threads,
    )  # fmt: skip
    return (out, lse) if return_aux is not None and return_aux.lse else out


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, block_table: Tensor | None) -> None:
    keys = "(tokens, heads, width)" if block_table is None else "(pages, page, heads, width), as block_table has pages"
    if query.dim() != 3 or query.shape[-1] == 0:
        raise ValueError(f"query: got shape {tuple(query.shape)}, wants (tokens, heads, width), a width of at least 1")
    for name, x in (("key", key), ("value", value)):
        if x.dim() != (3 if block_table is None else 4):
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, wants {keys}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key: got width {key.shape[-1]}, wants {query.shape[-1]} as query has")
    if value.shape[:-1] != key.shape[:-1]:
        wants = f"({', '.join(map(str, key.shape[:-1]))}, _)"
        raise ValueError(f"value: got shape {tuple(value.shape)}, wants {wants} beside key")


def _check_heads(heads: int, key_heads: int, enable_gqa: bool) -> None:
    if not enable_gqa and heads != key_heads:
        raise ValueError(f"key: got {key_heads} heads beside {heads} of query, wants as many, or enable_gqa=True")
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"key: got {key_heads} heads, wants a divisor of the {heads} heads of query")


def _check_places(
    cu_seq_q: Tensor, cu_seq_k: Tensor | None, seqused_k: Tensor | None, block_table: Tensor | None
) -> None:
    """The forms of what says where sequences are; numbers are looked at when there are some."""
    if block_table is None and cu_seq_k is None:
        raise ValueError("cu_seq_k: got None, wants where the keys of each sequence begin, or a block_table")
    if block_table is not None and seqused_k is None:
        raise ValueError("seqused_k: got None beside block_table, wants the number of keys of each sequence")
    _check_integers("cu_seq_q", cu_seq_q, None)
    count = cu_seq_q.shape[0] - 1
    if block_table is None:
        _check_integers("cu_seq_k", cu_seq_k, count + 1)
    if seqused_k is not None:
        _check_integers("seqused_k", seqused_k, count)
    if block_table is not None:
        if block_table.dtype != torch.int32:
            raise TypeError(f"block_table: got {block_table.dtype}, wants int32")
        if block_table.dim() != 2 or block_table.shape[0] != count:
            raise ValueError(f"block_table: got shape {tuple(block_table.shape)}, wants ({count}, pages)")


def _check_integers(name: str, x: Tensor, count: int | None) -> None:
    """So many of them, or at least one."""
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got {x.dtype}, wants int32 or int64")
    if x.dim() != 1 or x.shape[0] != (max(1, x.shape[0]) if count is None else count):
        wants = "(sequences + 1,)" if count is None else f"({count},)"
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, wants {wants}")


def _window(window_size: tuple[int, int]) -> list[int]:
    if not (isinstance(window_size, tuple | list) and len(window_size) == 2):
        raise ValueError(f"window_size: got {window_size!r}, wants a pair (left, right)")
    if min(window_size) < -1:
        raise ValueError(f"window_size: got {tuple(window_size)}, wants numbers of keys, or -1 for no bound")
    return list(window_size)
