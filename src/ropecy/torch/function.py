"""scaled_dot_product_attention: what it is given, checked and put into the forms that the operators take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..certificate import Certificate
from ..problem.packed import as_two, check_as_many, check_integers, check_vector
from ..rotary import Rotary
from .derivatives import Attention, attend
from .operators import collect_certificates, encode

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
    near: tuple[int, float | Sequence[float] | Tensor] | None = None,
    q_offset: int = 0,
    lengths: Tensor | Sequence[int] | tuple[Tensor | Sequence[int], Tensor | Sequence[int]] | None = None,
    eps: float = 1e-3,
    method: str = "auto",
    threads: int | None = None,
    return_certificate: bool = False,
) -> Tensor | tuple[Tensor, Certificate]:
    r"""softmax(scale Q R_{j-i} K^T) V, as torch.nn.functional's function of this name and as `ropecy.attention`.

    Parameters
    ----------
    query, key, value : (..., n, d), (..., n_k, d), (..., n_k, d_v) tensors
        On the CPU and of one dtype: float32 or float64, computed in themselves, or float16 or bfloat16, computed in
        float32. Under ``torch.autocast("cpu")`` all but float64 are cast to its dtype, as PyTorch's attention casts
        them. Any strides. The axis before n is the head axis.
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
    lengths : (s,) integers or a pair of such, optional
        Rows are sequences packed side by side, each of which sees itself alone, as in `ropecy.attention`: their
        lengths, or (those of queries, those of keys). All leading axes have the same sequences.
    near : (int, float or tensor), optional
        (w, scale_near) as in `ropecy.attention`: one number, or one for each query head, shape (heads,). Where
        scale_near is a tensor, it has a gradient.
    threads : int, optional
        By default ``torch.get_num_threads()``.
    return_certificate : bool
        Return the certificate too, that of this very result: nothing is planned twice. Under vmap, which may compute
        the elements of its batch one by one, it is the worst of theirs. It breaks the graph of torch.compile.

    Returns
    -------
    O : (..., n, d_v) tensor
        Of query's dtype, contiguous. Rows that see no key are 0.
    certificate : ropecy.certificate.Certificate
        If `return_certificate`: the engine, and the error of O that is certified, which counts that O is stored in
        float16 or bfloat16 (the latter where ml_dtypes is installed).

    Raises
    ------
    TypeError
        dtypes that disagree, a mask that is not bool, a `near` that is no pair.
    NotImplementedError
        Dropout, a mask that differs from query to query, a device other than the CPU; a derivative of
        the gradient; a derivative in forward mode by the polynomial or the fft engine, or of packed sequences.
    ValueError
        All that `ropecy.attention` refuses, NaN and Inf in query, key and value among it; a mask that might mean two
        things.

    Notes
    -----
    Time and memory as `ropecy.attention` and `ropecy.attention_vjp`. Backward keeps query, key and value only and
    computes forward again, so it costs that much more. NaN and Inf in the gradient that backward is given make
    gradients NaN, as a gradient scaler wants it: of the query's row, and of key and value of its head.

    Derivatives in forward mode (torch.func.jvp and jacfwd, dual numbers) are computed exactly, pair by pair, in time
    n n_k (3 d + 3 d_v), and may be differentiated again: torch.func.jacrev(torch.func.jacfwd(f)) is the Hessian.

    Examples
    --------
    >>> Q, K, V = torch.ones(3, 2, 4, 100, 8)
    >>> scaled_dot_product_attention(Q, K, V, is_causal=True, rotary=Rotary(8)).shape
    torch.Size([2, 4, 100, 8])
    """
    if dropout_p != 0:
        raise NotImplementedError(f"dropout_p: got {dropout_p}, wants 0.0: attention weights are never formed")
    query, key, value = of_one_dtype(query, key, value)
    _check_shapes(query, key, value, enable_gqa)
    key_mask = None if attn_mask is None else _key_mask(attn_mask, query, key)
    if window is not None:
        window = list(window) if isinstance(window, (tuple, list)) else [window]
    width, scale_near = _near(near, (query, key, value))
    inputs = (query, key, value, key_mask, q_positions, k_positions, scale_near)
    for name, x in zip(("attn_mask", "q_positions", "k_positions", "near"), inputs[3:], strict=True):
        # An operator that has a tensor without numbers computes none.
        if x is not None and query.is_cpu and not x.is_cpu:
            raise NotImplementedError(f"{name}: got a tensor on {x.device}, wants one on the CPU")
    options = (
        width,
        None if rotary is None else encode(rotary),
        query.shape[-1] ** -0.5 if scale is None else scale,
        is_causal,
        window,
        q_offset,
        None if lengths is None else _lengths(lengths),
        eps,
        method,
        threads,
    )
    if return_certificate:
        return _certified(inputs, options)
    return attend(Attention, *inputs, *options)


@torch.compiler.disable(reason="ropecy's return_certificate: a certificate is no tensor, so that no graph can hold it")
def _certified(inputs: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> tuple[Tensor, Certificate]:
    """The result, and the worst certificate of the operator's calls that made it."""
    with collect_certificates() as found:
        out = attend(Attention, *inputs, *options)
    if not found:
        raise NotImplementedError("return_certificate: got tensors without numbers, wants numbers to be certified")
    return out, max(found, key=lambda certificate: certificate.error)


def of_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value of one dtype, which under autocast is the one that PyTorch's own attention casts them to."""
    tensors = {"query": query, "key": key, "value": value}
    autocast = torch.is_autocast_enabled("cpu")
    for name, x in tensors.items():
        if not (x.is_cpu or x.is_meta):
            raise NotImplementedError(f"{name}: got a tensor on {x.device}, wants one on the CPU")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}: got {x.dtype}, wants float32, float64, float16 or bfloat16")
        if autocast and x.dtype != torch.float64:
            tensors[name] = x.to(torch.get_autocast_dtype("cpu"))
    query, key, value = tensors.values()
    for name, x in tensors.items():
        if x.dtype != query.dtype:
            raise TypeError(f"{name}: got {x.dtype}, wants {query.dtype} as query has")
    return query, key, value


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    of_query = query.shape
    for name, shape in (("query", of_query), ("key", key.shape), ("value", value.shape)):
        if len(shape) < 2:
            raise ValueError(f"{name}: got shape {tuple(shape)}, wants (..., rows, width)")
        if name != "value" and shape[-1] == 0:
            raise ValueError(f"{name}: got shape {tuple(shape)}, wants rows of at least one entry, to form scores")
        if not enable_gqa and len(shape) > 2 and len(of_query) > 2 and 1 != shape[-3] != of_query[-3] != 1:
            raise ValueError(
                f"{name}: got {shape[-3]} heads beside {of_query[-3]} of query, wants as many, or enable_gqa=True"
            )


def _lengths(lengths: Any) -> Tensor:
    """The lengths of queries and those of keys, (2, s)."""
    found = [torch.as_tensor(part, device="cpu") for part in as_two(lengths)]
    for part in found:
        check_vector("lengths", str(part.dtype), tuple(part.shape))
        kind = part.is_floating_point() or part.is_complex() or part.dtype == torch.bool
        check_integers("lengths", part.dtype, not kind or not part.numel())
    check_as_many(*(len(part) for part in found))
    return torch.stack([part.long() for part in found])


def _near(
    near: tuple[int, float | Sequence[float] | Tensor] | None, tensors: tuple[Tensor, ...]
) -> tuple[int | None, Tensor | None]:
    """The near field's width, and its scale as a tensor of one number, or of one for each head of the result."""
    if near is None:
        return None, None
    if not (isinstance(near, tuple | list) and len(near) == 2):
        raise TypeError(f"near: got {near!r}, wants a pair (w, scale_near)")
    width, scale_near = near
    if not isinstance(scale_near, Tensor):
        scale_near = _numbers(scale_near)
    shape, heads = tuple(scale_near.shape), max([1] + [x.shape[-3] for x in tensors if x.dim() > 2])
    if shape not in ((), (heads,)):
        raise ValueError(f"near: got a scale_near of shape {shape}, wants a number, shape (), or shape ({heads},)")
    # Where there is one head there may be no axis of heads.
    return width, scale_near.reshape(()) if heads == 1 else scale_near


def _numbers(scale_near: Any) -> Tensor:
    """A number, or numbers of which some may be tensors that gradients are wanted of, as a tensor."""
    try:
        if isinstance(scale_near, tuple | list):
            return torch.stack([torch.as_tensor(each, dtype=torch.float64) for each in scale_near])
        return torch.tensor(scale_near, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"near: got scale_near = {scale_near!r}, wants a number, or one for each head") from None


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
