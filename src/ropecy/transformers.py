"""transformers: models whose attention is ropecy's, by ``attn_implementation="ropecy"`` after `register`.

Queries and keys arrive rotated, by whatever scaling rule the model has, so this is attention on rotated rows. Masks
stay descriptions (causal, a window, keys that are kept, sequences packed into a row) and n x n ones are never formed.

There is no cache made of `ropecy.DecodeState`. A model hands its attention what ``Cache.update`` returns, tensors of
all keys and values, and neither the cache nor a state, so one would have to be smuggled through them, while masks
are made for keys that are gone. A running sum can't be cropped either, nor can padding be taken out of it, which
assisted decoding and batches of prompts do; and keys of pretrained models are far past any `bound`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from . import _validate
from .torch import scaled_dot_product_attention

__all__ = ["register"]

# What models hand to their attention that changes the result and that nothing here does.
_REFUSED = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices", "cache")


def register(name: str = "ropecy", *, eps: float = 1e-3, method: str = "auto") -> None:
    """Make ``attn_implementation=name`` mean attention by ropecy, in every model of transformers that takes one.

    Parameters
    ----------
    name : str
        Several names may stand for several settings.
    eps, method
        As in `ropecy.attention`. Decoding, one query at a time, is exact under every method.

    Raises
    ------
    TypeError, ValueError
        eps or method is not what `ropecy.attention` takes.

    Notes
    -----
    Forward and backward of causal and two-sided attention, grouped queries, padding on either side, sliding windows,
    packed sequences (position_ids that restart, without a mask and a cache), dynamic and static caches. What else would
    change the result is a NotImplementedError that names it, when the model is run: dropout, soft caps, sinks, position
    biases, four-dimensional masks, attention weights as an output. Tokens that padding hides may see no key, and
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
    _validate.check_method(eps=eps, certify="proof", method=method, degree=None, seed=None)
    AttentionInterface.register(name, partial(_attention, eps=eps, method=method))
    AttentionMaskInterface.register(name, _mask)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    eps: float,
    method: str,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query (b, h, n, d), key and value (b, h_k, n_k, _), the result (b, n, h, d_v).

    `attention_mask` is what `_mask` made.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name}: {type(module).__name__} wants it in its attention, ropecy has none")
    if kwargs.get("output_attentions"):
        raise NotImplementedError("output_attentions: got True, wants False: attention weights are never formed")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = sliding_window
    if window is not None and not causal:
        # As for FlashAttention: the window's own token counts, on both sides.
        window = (window - 1, window - 1)
    run = partial(
        scaled_dot_product_attention,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=True,
        window=window,
        eps=eps,
        method="exact" if query.shape[-2] == 1 else method,
    )
    if attention_mask is None:
        lengths = kwargs.get("cu_seq_lens_q")
        if lengths is not None and len(lengths) > 2:
            raise NotImplementedError(
                "cu_seq_lens_q: got packed sequences, wants position_ids that restart beside them"
            )
        out = run(query, key, value, q_offset=key.shape[-2] - query.shape[-2])
    elif attention_mask.dim() != 2:
        raise NotImplementedError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, wants (batch, n): n x n masks are never formed"
        )
    elif attention_mask.dtype != torch.bool:
        out = _packed(run, query, key, value, attention_mask)
    else:
        # A static cache has room for more keys than there are.
        n_k = attention_mask.shape[1]
        key, value = key[..., :n_k, :], value[..., :n_k, :]
        out = run(query, key, value, attention_mask[:, None, None], q_offset=n_k - query.shape[-2])
    return out.transpose(1, 2).contiguous(), None


def _packed(run: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, sequence: Tensor) -> Tensor:
    """Each sequence attends to itself; sequence (b, n) numbers them along a row."""
    rows = []
    for q, k, v, numbers in zip(query, key, value, sequence, strict=True):
        _, lengths = torch.unique_consecutive(numbers, return_counts=True)
        parts = (x.split(lengths.tolist(), dim=-2) for x in (q, k, v))
        rows.append(torch.cat([run(*part) for part in zip(*parts, strict=True)], dim=-2))
    return torch.stack(rows)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """Which keys there are: None for all, True for those kept (b, n_k), or the numbers of packed sequences (b, n).

    The last query is at the last of these keys. Causality and windows reach the attention by themselves.
    """
    causal, sequence = _describe(mask_function)
    if sequence is not None:
        return sequence
    n_k = min(kv_length, int(q_offset) + q_length - int(kv_offset)) if causal else kv_length
    if attention_mask is None:
        return None if n_k == kv_length else torch.ones(batch_size, n_k, dtype=torch.bool, device=device)
    kept = attention_mask.to(torch.bool)
    if kept.shape[1] != n_k:  # generate() makes the mask of a static cache beforehand, and it comes here again
        kept = kept[:, int(kv_offset) : int(kv_offset) + n_k]
        kept = torch.nn.functional.pad(kept, (0, n_k - kept.shape[1]))
    return None if n_k == kv_length and kept.all() else kept


def _describe(mask_function: Callable[..., Any]) -> tuple[bool, Tensor | None]:
    """Whether it is causal, and the numbers of packed sequences where it has them.

    transformers gives masks as functions of two indices, put together from known ones; of what is none of these, an
    image's block or a chunk, nothing would reach the attention.
    """
    if mask_function in (causal_mask_function, bidirectional_mask_function):
        return mask_function is causal_mask_function, None
    name = mask_function.__qualname__.partition(".")[0]
    cells = mask_function.__closure__ or ()
    inside = dict(zip(mask_function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))
    if name == "and_masks":
        parts = [_describe(part) for part in inside["mask_functions"]]
        return any(causal for causal, _ in parts), next((s for _, s in parts if s is not None), None)
    if name == "remap_positions_for_packed_sequence":
        return _describe(inside["mask_function"])
    if name == "packed_sequence_mask_function":
        return False, inside["packed_sequence_mask"]
    if name in ("sliding_window_overlay", "sliding_window_bidirectional_overlay"):
        return False, None
    raise NotImplementedError(
        f"attention_mask: the model makes it by {mask_function.__qualname__}, and ropecy knows causal masks, sliding "
        "windows, padding and packed sequences"
    )
