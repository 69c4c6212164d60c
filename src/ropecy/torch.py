"""PyTorch: scaled_dot_product_attention and an attention layer, on CPU tensors without copies.

Forward and backward are each a custom operator of torch.library, ``ropecy::attention`` and
``ropecy::attention_backward``, so autograd, torch.compile and vmap see them. Derivatives are of first order only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor, nn

from . import attention, attention_vjp
from . import plan as make_plan
from .plan import Plan
from .rotary import Rotary

__all__ = ["RoPEAttention", "scaled_dot_product_attention"]

# Where temperatures start: of sigmoid, so that scores are within 0.88 B. From 0, or beside a near field twice as sharp
# as the far one, a layer took far longer to recall what is far.
_TEMPERATURE = 2.0
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    rotary: Rotary | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    near: tuple[int, float | Tensor] | None = None,
    q_offset: int = 0,
    eps: float = 1e-3,
    method: str = "auto",
    threads: int | None = None,
) -> Tensor:
    r"""softmax(scale Q R_{j-i} K^T) V, as torch.nn.functional's function of this name and as `ropecy.attention`.

    Parameters
    ----------
    query, key, value : (..., n, d), (..., n_k, d), (..., n_k, d_v) tensors
        On the CPU and of one dtype: float32 or float64, computed in themselves, or float16 or bfloat16, computed in
        float32. Any strides. The axis before n is the head axis.
    attn_mask : bool tensor, optional
        True for keys that are kept: (batch, n_k) beside (batch, ..., n, d), or what broadcasts to (..., 1, n_k). Beside
        `is_causal` and `window` it combines by "and".
    dropout_p : float
        0 only.
    is_causal : bool
        Row i sees the keys j <= i + q_offset, so with n != n_k aligned at the top left, as in PyTorch.
    scale : float, optional
        By default 1/sqrt(d), as in PyTorch (the rest of ropecy has 1/d).
    enable_gqa : bool
        Whether key and value may have fewer heads than query: head h uses key head h // (heads / key heads).
    rotary : Rotary, optional
        Rotates query and key by their positions; by default they come as they are.
    q_positions, k_positions, window, q_offset, eps, method
        As in `ropecy.attention`; positions are integer tensors.
    near : (int, float or tensor), optional
        (w, scale_near) as in `ropecy.attention`; where scale_near is a tensor of one number, it has a gradient.
    threads : int, optional
        By default ``torch.get_num_threads()``.

    Returns
    -------
    (..., n, d_v) tensor
        Of query's dtype, contiguous. Rows that see no key are 0.

    Raises
    ------
    TypeError
        dtypes that disagree, a mask that is not bool, a `near` that is no pair.
    NotImplementedError
        Dropout, a mask that differs from query to query, a device other than the CPU.
    ValueError
        All that `ropecy.attention` refuses, NaN and Inf among it; a mask that might mean two things.

    Notes
    -----
    Time and memory as `ropecy.attention` and `ropecy.attention_vjp`. Backward keeps query, key and value only and
    computes forward again, so it costs that much more. A derivative of the gradient is an error.

    Examples
    --------
    >>> Q, K, V = torch.ones(3, 2, 4, 100, 8)
    >>> scaled_dot_product_attention(Q, K, V, is_causal=True, rotary=Rotary(8)).shape
    torch.Size([2, 4, 100, 8])
    """
    if dropout_p != 0:
        raise NotImplementedError(f"dropout_p: got {dropout_p}, wants 0.0: attention weights are never formed")
    tensors = {"query": query, "key": key, "value": value}
    for name, x in tensors.items():
        if x.device.type not in ("cpu", "meta"):
            raise NotImplementedError(f"{name}: got a tensor on {x.device}, wants one on the CPU")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}: got {x.dtype}, wants float32, float64, float16 or bfloat16")
        if x.dtype != query.dtype:
            raise TypeError(f"{name}: got {x.dtype}, wants {query.dtype} as query has")
        if x.dim() < 2:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, wants (..., rows, width)")
        if not enable_gqa and x.dim() > 2 and query.dim() > 2 and 1 != x.shape[-3] != query.shape[-3] != 1:
            raise ValueError(
                f"{name}: got {x.shape[-3]} heads beside {query.shape[-3]} of query, wants as many, or enable_gqa=True"
            )
    key_mask = None if attn_mask is None else _key_mask(attn_mask, query, key)
    if window is not None:
        window = list(window) if isinstance(window, (tuple, list)) else [window]
    if near is not None and not (isinstance(near, tuple | list) and len(near) == 2):
        raise TypeError(f"near: got {near!r}, wants a pair (w, scale_near)")
    width, scale_near = near or (None, None)
    if scale_near is not None and not isinstance(scale_near, Tensor):
        scale_near = torch.tensor(scale_near, dtype=torch.float64)
    if scale_near is not None and scale_near.dim():
        raise ValueError(f"near: got a scale_near of shape {tuple(scale_near.shape)}, wants a number, shape ()")
    return _attention(
        query,
        key,
        value,
        key_mask,
        q_positions,
        k_positions,
        scale_near,
        width,
        None if rotary is None else _encode(rotary),
        query.shape[-1] ** -0.5 if scale is None else scale,
        is_causal,
        window,
        q_offset,
        eps,
        method,
        threads,
    )


class RoPEAttention(nn.Module):
    r"""Causal self-attention with rotary positions, whose scores may be bounded by construction.

    Without `bound` it is the usual layer: scores <q, k>/sqrt(d), computed exactly. With ``bound=B``, q and k are
    normalised to length 1 and a temperature t_h = B sigmoid(.), learnt for each head, multiplies their product, so that
    \|score\| <= B whatever the weights and the data are, and `plan` knows the certificate before it sees any. The
    `near` tokens before and after a token are apart from that: there the same products have a temperature that knows no
    bound, learnt from B on, and the exact engine computes them, in one softmax with what the polynomial makes of the
    rest.

    Parameters
    ----------
    embed_dim, num_heads : int
        Width of the tokens, and query heads.
    num_kv_heads : int, optional
        Heads of keys and values, a divisor of `num_heads`, by default as many.
    head_dim : int, optional
        By default embed_dim / num_heads.
    rotary : Rotary, optional
        By default ``Rotary(head_dim)``.
    bound : float or True, optional
        B. True is 2.0, and for heads of width 8 or less 4.0 with half of that rotated by default: what was tried.
    near : int or None
        w, beside a bound: scores of tokens \|j - i\| < w are scale_near t_h <q, k> / B, scale_near > 0. None or 0 is
        no near field.
    causal : bool
        Token i sees the tokens j <= i.
    bias : bool
        Of the projections.
    eps : float
        As in `ropecy.attention`.
    method : str, optional
        As in `ropecy.attention`, by default "auto" with a bound and "exact" without one.

    Raises
    ------
    ValueError
        Sizes that don't fit each other, a bound that is not positive, a near field of negative width.

    Notes
    -----
    A bounded far field averages and does not retrieve: among n keys, one gets at most the share e^2B / (n - 1 + e^2B)
    of the weight, 1.3% at B = 2 and 42% at B = 4 for n = 4,096, and less where the near field's sharper scores take
    theirs first. Byte-level models of 0.85 million parameters lost 0.8 bits a byte with B = 2 in every head and 0.4
    with B = 4, against unbounded scores, without a near field; one of 64 won that back, by what it sees itself. Exact
    attention is the default for that reason.

    Examples
    --------
    >>> layer = RoPEAttention(32, 4, bound=1.0)
    >>> layer(torch.ones(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    >>> layer.plan(100_000).engine
    'polynomial'
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary: Rotary | None = None,
        bound: float | bool | None = None,
        near: int | None = 64,
        causal: bool = True,
        bias: bool = False,
        eps: float = 1e-3,
        method: str | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: got {num_kv_heads}, wants a divisor of num_heads = {num_heads}")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(f"num_heads: got {num_heads}, wants a divisor of embed_dim = {embed_dim}, or head_dim")
            head_dim = embed_dim // num_heads
        if rotary is not None and rotary.d != head_dim:
            raise ValueError(f"rotary: got a Rotary of width {rotary.d}, wants head_dim = {head_dim}")
        if bound is True:
            bound = 4.0 if head_dim <= 8 else 2.0
            if rotary is None and head_dim <= 8:
                rotary = Rotary(head_dim, rotary_dim=max(2, head_dim // 4 * 2))
        if bound is not None and not bound > 0:
            raise ValueError(f"bound: got {bound}, wants a positive number")
        if near is not None and near < 0:
            raise ValueError(f"near: got {near}, wants a number of tokens, or None")
        self.head_dim = head_dim
        self.rotary = Rotary(head_dim) if rotary is None else rotary
        self.bound = bound
        self.near = None if bound is None else near or None
        self.causal = causal
        self.eps = eps
        self.method = method or ("exact" if bound is None else "auto")
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias)
        if bound is None:
            self.register_parameter("temperature", None)
        else:
            self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), _TEMPERATURE))
        if self.near is None:
            self.register_parameter("log_scale_near", None)
        else:
            self.log_scale_near = nn.Parameter(torch.tensor(math.log(bound)))
        # An attention factor a multiplies rotated coordinates on both sides: R_0 has a^2 there.
        self._gain = max(1.0, float(self.rotary[0].max()))

    def forward(self, x: Tensor, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Attention of the tokens x (batch, n, embed_dim) among themselves.

        Parameters
        ----------
        x : (batch, n, embed_dim) tensor
        key_mask : (batch, n) bool tensor, optional
            True for tokens that are kept.
        positions : (n,) or (batch, n) integer tensor, optional
            By default 0 to n - 1.

        Returns
        -------
        (batch, n, embed_dim) tensor
        """
        q, k, v, scale = self._heads(x)
        if positions is not None and positions.dim() == 2:
            positions = positions[:, None]
        o = scaled_dot_product_attention(
            q,
            k,
            v,
            None if key_mask is None else key_mask[:, None, None],
            is_causal=self.causal,
            scale=scale,
            near=None if self.near is None else (self.near, self.log_scale_near.exp()),
            enable_gqa=True,
            rotary=self.rotary,
            q_positions=positions,
            k_positions=positions,
            eps=self.eps,
            method=self.method,
        )
        return self.o_proj(o.transpose(-3, -2).flatten(-2))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, float | None]:
        """q, k, v (batch, heads, n, head_dim) before rotation, and the scale of scores, None for PyTorch's."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.bound is None:
            return q, k, v, None
        # Autocast computes norms in float32, and what is attended has one dtype.
        q = (nn.functional.normalize(q, dim=-1) * torch.sigmoid(self.temperature)).to(v.dtype)
        return q, nn.functional.normalize(k, dim=-1).to(v.dtype), v, self.bound / self._gain

    def plan(self, n: int) -> Plan:
        """The plan of one head, with certificates of forward and backward that hold for every input of n tokens.

        It is that of scores which attain the bound, in float32, and of values no larger than their range; rounding in
        the near field goes by what its temperature is now.

        Raises
        ------
        ValueError
            The layer has no bound.
        BoundedEntryError
            `method` can't certify eps under this bound.
        """
        if self.bound is None:
            raise ValueError("bound: got None, wants the layer made with a bound, for a plan without data")
        rows = np.zeros((n, self.head_dim), np.float32)
        rows[:, 0] = np.where(np.arange(n) % 2, -1, 1)
        options = {"scale": self.bound, "causal": self.causal, "eps": self.eps, "method": self.method}
        if self.near is not None:
            options["near"] = self.near, self._gain * self.log_scale_near.exp().item()
        return make_plan(rows, rows, np.maximum(rows, 0), grad=True, threads=torch.get_num_threads(), **options)

    def extra_repr(self) -> str:
        """What PyTorch prints of the layer beside its parts."""
        return (
            f"rotary={self.rotary}, bound={self.bound}, near={self.near}, causal={self.causal}, eps={self.eps}, "
            f"method={self.method!r}"
        )


def _key_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask with its query axis left out: (n_k,), or all leading axes beside it."""
    shape, n, n_k = tuple(attn_mask.shape), query.shape[-2], key.shape[-2]
    if attn_mask.dtype != torch.bool:
        raise TypeError(f"attn_mask: got {attn_mask.dtype}, wants bool, True for a key that is kept")
    wants = f"(batch, {n_k}) or (..., 1, {n_k}), one row of keys for all queries"
    if shape[-1:] != (n_k,):
        raise ValueError(f"attn_mask: got shape {shape}, wants {wants}")
    leads = query.dim() - 2
    if len(shape) == 1 or shape[:-1] == (1,) * (len(shape) - 1):
        return attn_mask.reshape(n_k)
    if len(shape) == 2:
        batch = query.shape[0] if leads else 1
        if shape[0] == n and batch == n:
            raise ValueError(
                f"attn_mask: got shape {shape}, which may be (batch, n_k) or (n, n_k); wants "
                f"(batch, {'1, ' * leads}n_k), by attn_mask[:, {'None, ' * leads}:]"
            )
        if shape[0] == batch:
            return attn_mask.reshape((batch,) + (1,) * (leads - 1) + (n_k,))
    elif shape[-2] == 1:
        missing = leads - (len(shape) - 2)
        return attn_mask.reshape((1,) * missing + shape[:-2] + (n_k,))
    raise NotImplementedError(
        f"attn_mask: got shape {shape}, a mask of {shape[-2]} rows for {n} queries; wants {wants}: "
        "masks of n x n_k are never formed; is_causal, window and q_offset describe them"
    )


# A custom operator takes no Rotary, so that it goes through as text. Compiled code holds the text as a constant,
# guarded by the object's identity.
@torch.compiler.assume_constant_result
def _encode(rotary: Rotary) -> str:
    _, fields = rotary.__reduce__()
    return json.dumps(fields, default=lambda x: x.tolist())


@lru_cache(maxsize=64)
def _decode(rotary: str) -> Rotary:
    return Rotary(*json.loads(rotary))


def _array(x: Tensor) -> np.ndarray:
    """x's own memory; halves become float32, in which they are computed anyway."""
    return (x.float() if x.dtype.itemsize == 2 and x.is_floating_point() else x).numpy(force=True)


def _tensor(x: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(like.dtype)


def _options(
    key_mask, q_positions, k_positions, scale_near, width,
    rotary, scale, causal, window, q_offset, eps, method, threads,
):
    """What the operators are given beside Q, K and V, as the keyword arguments of `ropecy.attention`."""
    optional = {"key_mask": key_mask, "q_positions": q_positions, "k_positions": k_positions}
    return {name: None if x is None else _array(x) for name, x in optional.items()} | {
        "R": None if rotary is None else _decode(rotary),
        "scale": scale,
        "causal": causal,
        "window": window if window is None or len(window) > 1 else window[0],
        "near": None if width is None else (width, scale_near.item()),
        "q_offset": q_offset,
        "eps": eps,
        "method": method,
        "threads": torch.get_num_threads() if threads is None else threads,
    }


# torch.library reads the schema from annotations, where it knows Optional and no "X | None" of every Python.
@torch.library.custom_op("ropecy::attention", mutates_args=(), device_types="cpu")
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Optional[Tensor],  # noqa: UP045
    q_positions: Optional[Tensor],  # noqa: UP045
    k_positions: Optional[Tensor],  # noqa: UP045
    scale_near: Optional[Tensor],  # noqa: UP045
    width: Optional[int],  # noqa: UP045
    rotary: Optional[str],  # noqa: UP045
    scale: float,
    causal: bool,
    window: Optional[Sequence[int]],  # noqa: UP045
    q_offset: int,
    eps: float,
    method: str,
    threads: Optional[int],  # noqa: UP045
) -> Tensor:
    options = _options(
        key_mask, q_positions, k_positions, scale_near, width,
        rotary, scale, causal, window, q_offset, eps, method, threads,
    )
    return _tensor(attention(_array(query), _array(key), _array(value), **options), query)


@torch.library.custom_op("ropecy::attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Optional[Tensor],  # noqa: UP045
    q_positions: Optional[Tensor],  # noqa: UP045
    k_positions: Optional[Tensor],  # noqa: UP045
    scale_near: Optional[Tensor],  # noqa: UP045
    width: Optional[int],  # noqa: UP045
    rotary: Optional[str],  # noqa: UP045
    scale: float,
    causal: bool,
    window: Optional[Sequence[int]],  # noqa: UP045
    q_offset: int,
    eps: float,
    method: str,
    threads: Optional[int],  # noqa: UP045
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = _options(
        key_mask, q_positions, k_positions, scale_near, width,
        rotary, scale, causal, window, q_offset, eps, method, threads,
    )
    _, vjp = attention_vjp(_array(query), _array(key), _array(value), **options)
    g = vjp(_array(grad))
    near = query if scale_near is None else scale_near
    dscale_near = torch.tensor(0.0 if scale_near is None else g.dscale_near, dtype=near.dtype)
    return _tensor(g.dQ, query), _tensor(g.dK, key), _tensor(g.dV, value), dscale_near


@_attention.register_fake
def _(query, key, value, *options):
    tensors = (query, key, value)
    lead = torch.broadcast_shapes(*(x.shape[:-3] for x in tensors))
    if any(x.dim() > 2 for x in tensors):
        lead = (*lead, max(x.shape[-3] for x in tensors if x.dim() > 2))
    return query.new_empty((*lead, query.shape[-2], value.shape[-1]))


@_attention_backward.register_fake
def _(grad, query, key, value, key_mask, q_positions, k_positions, scale_near, *options):
    near = query if scale_near is None else scale_near
    return *(x.new_empty(x.shape) for x in (query, key, value)), near.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, dscale_near = _attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    near = None if ctx.saved_tensors[6] is None else dscale_near
    return (*gradients, None, None, None, near, *[None] * len(ctx.options))


def _second_order(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("ropecy has derivatives of first order only: attention's gradient has none of its own")


_attention.register_autograd(_backward, setup_context=_setup_context)
_attention_backward.register_autograd(_second_order)


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
    """The operator's result for each element of vmap's batch: one call has one scale_near, and one gradient by it."""
    places = range(info.batch_size)
    return [
        operator(*(x if axis is None else x.select(axis, i) for x, axis in zip(inputs, in_dims, strict=True)))
        for i in places
    ]


@_attention.register_vmap
def _(info, in_dims, *inputs):
    if in_dims[6] is not None:
        return torch.stack(_one_by_one(_attention, info, in_dims, inputs)), 0
    tensors = _batched(info, in_dims, inputs, rows=3, expand=False)
    return _attention(*tensors, *inputs[6:]), 0


@_attention_backward.register_vmap
def _(info, in_dims, *inputs):
    # Each batch element has gradients of its own, also of what all of them share.
    if inputs[7] is not None:
        each = _one_by_one(_attention_backward, info, in_dims, inputs)
        return tuple(torch.stack(parts) for parts in zip(*each, strict=True)), (0, 0, 0, 0)
    *gradients, dscale_near = _attention_backward(*_batched(info, in_dims, inputs, rows=4, expand=True), *inputs[7:])
    shapes = (
        x.shape if axis is None else x.movedim(axis, 0).shape[1:]
        for x, axis in zip(inputs[1:4], in_dims[1:4], strict=True)
    )
    gradients = [g.reshape(info.batch_size, *shape) for g, shape in zip(gradients, shapes, strict=True)]
    return (*gradients, dscale_near), (0, 0, 0, None)
