"""Attention as models of transformers call it, and its registration under a name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from ..certificate import Certificate
from ..problem.arguments import check_method
from ..torch import scaled_dot_product_attention, varlen_attn
from .described_mask import Band, DescribedMask
from .mask_functions import describe

# Arguments by which some models change the result of their attention, and which ropecy doesn't have.
_REFUSED = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices", "cache")
# A dense mask hides a key by adding this number, or a lower one, to its scores, which makes its weight 0 in all dtypes.
_HIDDEN = -1e4


def register(
    name: str = "ropecy",
    *,
    eps: float = 1e-3,
    method: str = "auto",
    on_certificate: Callable[[torch.nn.Module, Certificate], None] | None = None,
) -> None:
    """Make ``attn_implementation=name`` mean attention by ropecy, in every model of transformers that takes one.

    Parameters
    ----------
    name : str
        Several names may stand for several settings.
    eps, method
        As in `ropecy.attention`. Decoding, one query at a time, is exact under every method.
    on_certificate : callable, optional
        ``on_certificate(module, certificate)`` is called whenever a module of the model has computed its attention,
        once for each sequence where they are packed, with the certificate of that very result. `module.layer_idx` is
        the layer's number in most models. This breaks the graphs of torch.compile.

    Raises
    ------
    TypeError, ValueError
        eps or method is not what `ropecy.attention` takes, on_certificate is not callable.

    Notes
    -----
    Forward and backward of causal and two-sided attention, grouped queries, padding on either side, windows on one side
    or both, chunks, packed sequences (position_ids that restart, without a mask and a cache, or ``cu_seq_lens_q`` for
    one row), dynamic and static caches, torch.compile. What else would change the result is a NotImplementedError that
    names it, when the model is run: dropout, soft caps, sinks, position biases, masks of n x n_k numbers, masks made by
    functions that are none of these, attention weights as an output. Tokens that padding hides may see no key, and
    attention is 0 for them, where other implementations give an average that nothing should read.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> register()
    >>> config = LlamaConfig(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
    >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="ropecy")
    >>> model(torch.ones(1, 5, dtype=torch.long)).logits.shape
    torch.Size([1, 5, 32000])
    """
    check_method(eps=eps, certify="proof", method=method, degree=None, seed=None)
    if on_certificate is not None and not callable(on_certificate):
        raise TypeError(f"on_certificate: got {on_certificate!r}, wants what is called with a module and a certificate")
    AttentionInterface.register(name, partial(_attention, eps=eps, method=method, on_certificate=on_certificate))
    AttentionMaskInterface.register(name, describe)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    eps: float,
    method: str,
    on_certificate: Callable[[torch.nn.Module, Certificate], None] | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query (b, h, n, d), key and value (b, h_k, n_k, _) -> (b, n, h, d_v).

    `is_causal` and `sliding_window` count only where there is no mask, since a mask already says what they say.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name}: {type(module).__name__} wants it in its attention, ropecy has none")
    if kwargs.get("output_attentions"):
        raise NotImplementedError("output_attentions: got True, wants False: attention weights are never formed")
    n, n_k = query.shape[-2], key.shape[-2]
    kept = sequence = None
    if attention_mask is None:
        band = _band_without_mask(module, n, n_k, is_causal, sliding_window)
    elif isinstance(attention_mask, DescribedMask):
        band, kept, sequence = _described(attention_mask, n, n_k)
    else:
        band, kept = Band(), _kept_keys(attention_mask, n_k)
    lengths = kwargs.get("cu_seq_lens_q")
    if sequence is None and lengths is not None and len(lengths) > 2:
        sequence = _numbers(lengths, kwargs.get("cu_seq_lens_k"), query, key)
    how = {"scale": scaling, "enable_gqa": True, "eps": eps, "method": "exact" if n == 1 else method}
    run = partial(scaled_dot_product_attention, dropout_p=dropout, **how)
    if on_certificate is not None:
        run = partial(_telling, run, partial(on_certificate, module))
    if sequence is None:
        out = _attend(run, query, key, value, kept, band)
    elif kept is None and on_certificate is None and not dropout and _is_diagonal(band, n, n_k):
        out = _attend_together(sequence, query, key, value, band, how)
    else:
        out = _attend_packed(sequence, run, query, key, value, kept, band)
    return out.transpose(1, 2).contiguous(), None


def _telling(run: Callable[..., Any], tell: Callable[[Certificate], None], *inputs: Any, **options: Any) -> Tensor:
    """The result of `run`, after its certificate has been passed to `tell`."""
    out, certificate = run(*inputs, **options, return_certificate=True)
    tell(certificate)
    return out


def _band_without_mask(
    module: torch.nn.Module, n: int, n_k: int, is_causal: bool | None, sliding_window: int | None
) -> Band:
    """The band that transformers' own attention by PyTorch uses for these arguments; refused where that is unclear."""
    owner = type(module).__name__
    if sliding_window is not None and sliding_window < n_k:
        raise NotImplementedError(
            f"sliding_window: {owner} wants one of {sliding_window} without a mask that says where it lies, ropecy "
            "takes windows from the mask"
        )
    if n == 1:
        return Band()
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if causal is None:
        raise NotImplementedError(
            f"is_causal: {owner} gives its attention neither a mask nor is_causal, ropecy wants one of them"
        )
    return Band(high=0) if causal else Band()


def _described(mask: DescribedMask, n: int, n_k: int) -> tuple[Band, Tensor | None, Tensor | None]:
    """Band, kept keys and sequences of a mask, if it is one for n queries and n_k keys."""
    rows, keys = mask.shape[2:]
    one_for_all = rows == 1 and mask.band.low is None and mask.band.high is None
    if keys != n_k or (rows != n and not one_for_all):
        raise NotImplementedError(
            f"attention_mask: got one of {rows} queries and {keys} keys beside {n} queries and {n_k} keys"
        )
    return mask.band, mask.kept, mask.sequence


def _kept_keys(mask: Tensor, n_k: int) -> Tensor:
    """Which keys (b, n_k) a dense mask (b, 1, 1, n_k) keeps: those with True, or with 0 in an additive mask."""
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != 1 or mask.shape[3] != n_k:
        raise NotImplementedError(
            f"attention_mask: got shape {tuple(mask.shape)}, wants (batch, 1, 1, {n_k}): n x n masks are never formed"
        )
    mask = mask[:, 0, 0]
    if mask.dtype == torch.bool:
        return mask
    kept = mask == 0
    if not (kept | (mask <= _HIDDEN)).all():
        raise NotImplementedError(
            f"attention_mask: got a bias of keys, wants 0 for those that are kept and {_HIDDEN:.0f} or less for others"
        )
    return kept


def _numbers(lengths: Tensor, key_lengths: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """The number (1, n) of each token's sequence; `lengths` has the index where each sequence begins, and then n."""
    same = key_lengths is None or torch.equal(lengths, key_lengths)
    if query.shape[0] != 1 or key.shape[-2] != query.shape[-2] or not same or lengths[-1] != query.shape[-2]:
        raise NotImplementedError(
            f"cu_seq_lens_q: got packed sequences of {int(lengths[-1])} tokens beside {query.shape[0]} rows of "
            f"{key.shape[-2]} keys, wants one row of the same sequences, with use_cache=False"
        )
    return torch.repeat_interleave(lengths.diff())[None]


def _attend(
    run: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, kept: Tensor | None, band: Band
) -> Tensor:
    """Attention within a band, over the keys that are in the band of some query: views of key and value, not copies."""
    n, n_k = query.shape[-2], key.shape[-2]
    low, high, offset = band
    start = 0 if low is None else min(max(0, offset + low), n_k)
    end = n_k if high is None else min(max(start, offset + n - 1 + high), n_k - 1) + 1
    if start or end != n_k:
        key, value = key[..., start:end, :], value[..., start:end, :]
        kept = None if kept is None else kept[:, start:end]
        offset, n_k = offset - start, end - start
    # A bound past the last key of every query is left out, for more engines can compute attention without it.
    if high is not None and offset + high >= n_k - 1:
        high = None
    if low is not None and offset + n - 1 + low <= 0:
        low = None
    window = None
    if low is not None or high not in (0, None):
        window = 1 - low if high == 0 else (n_k + n if low is None else -low, n_k + n if high is None else high)
    mask = None if kept is None else kept[:, None, None]
    return run(query, key, value, mask, is_causal=high == 0, window=window, q_offset=offset)


def _is_diagonal(band: Band, n: int, n_k: int) -> bool:
    """Whether the last query is the token of the last key, and a query may see its own."""
    low, high, offset = band
    return n + offset == n_k and (low is None or low <= 0) and (high is None or high >= 0)


def _attend_together(
    sequence: Tensor, query: Tensor, key: Tensor, value: Tensor, band: Band, how: dict[str, Any]
) -> Tensor:
    """`_attend_packed` in one call, for a band that `_is_diagonal`, where no key is hidden."""
    low, high, offset = band
    lengths = zip(*(_lengths_of(row, offset) for row in sequence), strict=True)
    q_lengths, k_lengths = (torch.cat(each) for each in lengths)
    out = varlen_attn(
        *(x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)),
        *(torch.nn.functional.pad(each.cumsum(0), (1, 0)) for each in (q_lengths, k_lengths)),
        int(q_lengths.max()),
        int(k_lengths.max()),
        window_size=(-1 if low is None else -low, -1 if high is None else high),
        **how,
    )
    return out.unflatten(0, (len(query), -1)).transpose(1, 2)


def _lengths_of(sequence: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """How many queries and how many keys each sequence of a row has; its first `offset` keys have no queries."""
    numbers, lengths = torch.unique_consecutive(sequence, return_counts=True)
    if len(numbers.unique()) < len(numbers):
        raise NotImplementedError("attention_mask: got packed sequences in pieces, wants each in one piece")
    ends = lengths.cumsum(0)
    return (ends - offset).clamp(min=0).minimum(lengths), lengths


def _attend_packed(
    sequence: Tensor,
    run: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Tensor | None,
    band: Band,
) -> Tensor:
    """Attention of each packed sequence to itself. `sequence` (b, n_k) has the number of each key's sequence; the token
    of query i is that of key i + offset.
    """
    n, offset = query.shape[-2], band.offset
    rows = []
    for place in range(len(query)):
        _, lengths = _lengths_of(sequence[place], offset)
        q, k, v = (x[place, None] for x in (query, key, value))
        ends = lengths.cumsum(0).tolist()
        parts = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            first, last = max(0, start - offset), min(n, end - offset)
            if first < last:
                mask = None if kept is None else kept[place, None, start:end]
                own = band._replace(offset=offset + first - start)
                parts.append(_attend(run, q[..., first:last, :], k[..., start:end, :], v[..., start:end, :], mask, own))
        rows.append(torch.cat(parts, dim=-2))
    return torch.cat(rows)
