"""The functions by which transformers says what queries see, read into a description of the mask.

transformers gives a mask as a function of two indices, put together from others. `describe` reads it into a band of
differences of the indices, the keys that are kept, and the sequences that are packed into a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers import masking_utils

from .described_mask import Band, DescribedMask

_Function = Callable[..., Any]


@dataclass(frozen=True)
class _Pattern:
    """What a function of a query's and a key's index says: a band of their differences, kept keys, and sequences."""

    low: int | None = None
    high: int | None = None
    kept: Tensor | None = None
    sequence: Tensor | None = None

    def __and__(self, other: _Pattern) -> _Pattern:
        lows = [x.low for x in (self, other) if x.low is not None]
        highs = [x.high for x in (self, other) if x.high is not None]
        kept = other.kept if self.kept is None else self.kept if other.kept is None else self.kept & other.kept
        if self.sequence is not None and other.sequence is not None:
            raise NotImplementedError("attention_mask: the model packs sequences in two ways at once, ropecy in one")
        sequence = other.sequence if self.sequence is None else self.sequence
        return _Pattern(max(lows, default=None), min(highs, default=None), kept, sequence)


class _Indices(NamedTuple):
    """The queries and keys that a mask is wanted for, by the indices that transformers gives them."""

    batch: int
    q_length: int
    q_start: int
    k_length: int
    k_start: int
    device: torch.device | str

    def queries(self) -> Tensor:
        return torch.arange(self.q_start, self.q_start + self.q_length, device=self.device)

    def keys(self) -> Tensor:
        return torch.arange(self.k_start, self.k_start + self.k_length, device=self.device)


def describe(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: _Function = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **_: Any,
) -> DescribedMask:
    """The mask of a model, with the arguments by which transformers asks for it (`AttentionMaskInterface`).

    Raises
    ------
    NotImplementedError
        `mask_function` is neither a band of differences of the two indices, nor packed sequences, nor chunks.
    """
    indices = _Indices(batch_size, q_length, int(q_offset), kv_length, int(kv_offset), device)
    offset = indices.q_start - indices.k_start
    pattern = _read(mask_function, indices)
    if pattern.sequence is not None and not 0 <= offset <= kv_length - q_length:
        raise NotImplementedError(
            f"attention_mask: got packed sequences of {q_length} queries from {offset} on and {kv_length} keys, wants "
            "queries that are among the keys"
        )
    if attention_mask is not None:
        kept = attention_mask[:, indices.k_start : indices.k_start + kv_length].to(torch.bool)
        kept = torch.nn.functional.pad(kept, (0, kv_length - kept.shape[1])).expand(batch_size, -1)
        pattern = pattern & _Pattern(kept=kept)
    kept = pattern.kept
    if kept is not None and not torch.compiler.is_compiling():
        reached = kv_length if pattern.high is None else offset + q_length + pattern.high
        if kept[:, : max(reached, 0)].all():
            kept = None
    shape = (batch_size, 1, q_length, kv_length)
    return DescribedMask(shape, dtype, device, Band(pattern.low, pattern.high, offset), kept, pattern.sequence)


def _read(function: _Function, indices: _Indices, packed: bool = False) -> _Pattern:
    """The pattern of `function`. `packed` says that another function already keeps packed sequences apart."""
    if function is masking_utils.causal_mask_function:
        return _Pattern(high=0)
    if function is masking_utils.bidirectional_mask_function:
        return _Pattern()
    name, inside = _maker(function)
    if name == "and_masks":
        parts = inside["mask_functions"]
        packed = packed or any(_maker(part)[0] == "packed_sequence_mask_function" for part in parts)
        pattern = _Pattern()
        for part in parts:
            pattern = pattern & _read(part, indices, packed)
        return pattern
    if name == "or_masks":
        parts = [part for part in inside["mask_functions"] if not _adds_no_block(part)]
        if len(parts) == 1:
            return _read(parts[0], indices, packed)
    if name == "sliding_window_overlay":
        return _Pattern(low=1 - inside["sliding_window"])
    if name == "sliding_window_bidirectional_overlay":
        return _Pattern(-inside["sliding_window"], inside["sliding_window"])
    if indices.q_length == 1 and not packed:
        return _Pattern(kept=_evaluate(function, indices))
    if name == "packed_sequence_mask_function":
        return _Pattern(sequence=inside["packed_sequence_mask"].expand(indices.batch, -1))
    if name == "remap_positions_for_packed_sequence" and packed:
        # Within a sequence positions differ by as much as indices do, so that a band of either is one of the other.
        pattern = _read(inside["mask_function"], indices, packed)
        if pattern.sequence is None:
            return pattern
    elif name == "chunked_overlay" and not packed:
        before = inside["left_padding"][:, None].to(indices.device)
        chunk = torch.div(indices.keys() - before, inside["chunk_size"], rounding_mode="floor")
        return _Pattern(sequence=chunk.expand(indices.batch, -1))
    elif _knows_only_numbers(function):
        return _measure(function, indices)
    _refuse(function)


def _refuse(function: _Function) -> NoReturn:
    """Raise NotImplementedError with the name of the function."""
    name = getattr(function, "__qualname__", repr(function))
    raise NotImplementedError(
        f"attention_mask: the model makes it by {name}, and ropecy knows causal masks, windows, padding, packed "
        "sequences and chunks"
    )


def _maker(function: _Function) -> tuple[str, dict[str, Any]]:
    """The name of the function of transformers that made this one, and the variables it holds; "" for any other."""
    if inspect.isfunction(function) and function.__module__ == masking_utils.__name__:
        return function.__qualname__.partition(".")[0], _held(function)
    return "", {}


def _held(function: Any) -> dict[str, Any]:
    """The variables of a closure, by name."""
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _knows_only_numbers(function: Any) -> bool:
    """Whether a function holds no tensor, so that it is the same for every row of a batch and in every call."""
    if isinstance(function, tuple | list):
        return all(_knows_only_numbers(x) for x in function)
    if not inspect.isfunction(function):
        return function is None or isinstance(function, bool | int | float | str)
    plain = not function.__defaults__ and not function.__kwdefaults__
    return plain and all(_knows_only_numbers(x) for x in _held(function).values())


def _adds_no_block(function: _Function) -> bool:
    """Whether a function lets the tokens of an image see each other, where there are no images but only text."""
    name, inside = _maker(function)
    return name == "blockwise_overlay" and bool((inside["block_sequence_ids"] < 0).all())


def _evaluate(function: _Function, indices: _Indices) -> Tensor:
    """Which keys (b, n_k) the query sees, where there is one query only."""
    batch = torch.arange(indices.batch, device=indices.device)[:, None]
    seen = function(batch, torch.zeros_like(batch), indices.queries()[:, None], indices.keys()[None])
    return torch.as_tensor(seen, device=indices.device).expand(indices.batch, indices.k_length)


def _measure(function: _Function, indices: _Indices) -> _Pattern:
    """The band of a function, from O(n + n_k) of its values; NotImplementedError where these are not those of a band.

    In a band the last query sees the farthest back and the first one the farthest ahead, which gives its two bounds.
    Checked are all keys of these two queries, and for each query the keys at both edges of the band and next to them.
    """
    queries, keys = indices.queries(), indices.keys()
    zero = torch.zeros((), dtype=torch.long, device=indices.device)

    def seen(i: Tensor, j: Tensor) -> Tensor:
        value = torch.as_tensor(function(zero, zero, i, j), device=indices.device)
        return value.expand(torch.broadcast_shapes(i.shape, j.shape)).to(torch.bool)

    first, last = keys[seen(queries[:1], keys)], keys[seen(queries[-1:], keys)]
    if not len(first) or not len(last):
        _refuse(function)
    low = None if last[0] == keys[0] else int(last[0] - queries[-1])
    high = None if first[-1] == keys[-1] else int(first[-1] - queries[0])
    if (low or 0) > 0 or (high or 0) < 0:
        _refuse(function)
    edges = [t for edge, out in ((low, -1), (high, 1)) if edge is not None for t in (edge, edge + out)]
    rows = queries[:, None]
    columns = rows + torch.tensor([0, *edges], device=indices.device)
    columns = torch.cat([columns.clamp(keys[0], keys[-1]), keys[[0, -1]].expand(len(rows), 2)], 1)
    for i, j in ((rows, columns), (queries[[0, -1]][:, None], keys)):
        band = torch.ones(torch.broadcast_shapes(i.shape, j.shape), dtype=torch.bool, device=indices.device)
        if low is not None:
            band &= j - i >= low
        if high is not None:
            band &= j - i <= high
        if not torch.equal(seen(i, j), band):
            _refuse(function)
    return _Pattern(low, high)
