"""What transformers says of a mask, kept as a description: a tensor whose n x n_k entries exist only if they are read.

transformers gives a mask as a function of two indices, put together from others. `describe` reads that function into a
band of differences of the indices, the keys that are kept, and the sequences packed into a row. A model may slice the
mask, or move it, before its attention has it, or compute with it in code of its own; so it must be a tensor. Slices and
copies stay descriptions. Any other operation is given what eager attention has: 0 where a query sees a key, and the
least number of the dtype where not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import masking_utils

__all__ = ["Band", "DescribedMask", "describe"]

_aten = torch.ops.aten
_Function = Callable[..., Any]


class Band(NamedTuple):
    """Query i may see key j where low <= j - (i + offset) <= high; None is no bound on that side."""

    low: int | None = None
    high: int | None = None
    offset: int = 0


class DescribedMask(torch.Tensor):
    """The mask (b, 1, n, n_k) of `band`, of the keys that are kept and of sequences that see themselves alone.

    Parameters
    ----------
    shape, dtype, device
        Of the additive mask that it stands for.
    band : Band
    kept : (b, n_k) bool tensor, or None
        True for keys that may be seen; None where all may.
    sequence : (b, n_k) integer tensor, or None
        The sequence that each key belongs to; query i is the token of key i + offset, and belongs to the same.
    """

    band: Band
    kept: Tensor | None
    sequence: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, shape, dtype, device, band, kept, sequence):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
        band: Band,
        kept: Tensor | None,
        sequence: Tensor | None,
    ) -> None:
        self.band, self.kept, self.sequence = band, kept, sequence
        self._nothing = torch.empty(0, device=device)  # compiled code takes no tensor that has none within

    def __repr__(self) -> str:
        return (
            f"DescribedMask(shape={tuple(self.shape)}, {self.band}, kept={self.kept}, sequence={self.sequence}, "
            f"dtype={self.dtype})"
        )

    # By these two, compiled code takes it as an argument.
    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        parts = [name for name in ("_nothing", "kept", "sequence") if getattr(self, name) is not None]
        return parts, (self.band, self.dtype, self.device)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context: tuple[Any, ...], size: Any, stride: Any) -> Tensor:
        band, dtype, device = context
        mask = DescribedMask(size, dtype, device, band, parts.get("kept"), parts.get("sequence"))
        mask._nothing = parts["_nothing"]
        return mask

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (_aten.alias.default, _aten.detach.default, _aten.clone.default):
            return args[0]._copy()
        if func is _aten._to_copy.default and kwargs.get("dtype", torch.float32).is_floating_point:
            return args[0]._copy(dtype=kwargs.get("dtype"), device=kwargs.get("device"))
        if func is _aten.slice.Tensor and (part := args[0]._slice(*args[1:])) is not None:
            return part
        args, kwargs = tree_map_only(DescribedMask, DescribedMask.dense, (args, kwargs))
        return func(*args, **kwargs)

    def _copy(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> DescribedMask:
        device = device or self.device
        parts = (None if x is None else x.to(device) for x in (self.kept, self.sequence))
        return DescribedMask(self.shape, dtype or self.dtype, device, self.band, *parts)

    def _slice(
        self, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
    ) -> DescribedMask | None:
        """The described mask of a slice, or None where none describes it."""
        dim %= 4
        size = self.shape[dim]
        start = 0 if start is None else max(0, start + size if start < 0 else min(start, size))
        end = size if end is None else max(start, end + size if end < 0 else min(end, size))
        shape = [*self.shape[:dim], end - start, *self.shape[dim + 1 :]]
        offset = self.band.offset + (start if dim == 2 else -start if dim == 3 else 0)
        if step != 1 or (self.sequence is not None and not 0 <= offset <= shape[3] - shape[2]):
            return None
        rows = slice(start, end) if dim == 0 else slice(None)
        keys = slice(start, end) if dim == 3 else slice(None)
        kept, sequence = (None if x is None else x[rows, keys] for x in (self.kept, self.sequence))
        return DescribedMask(shape, self.dtype, self.device, self.band._replace(offset=offset), kept, sequence)

    def dense(self) -> Tensor:
        """The additive mask itself, as eager attention has it."""
        rows, keys = (torch.arange(size, device=self.device) for size in self.shape[2:])
        ahead = keys - (rows[:, None] + self.band.offset)
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if self.band.low is not None:
            seen = ahead >= self.band.low
        if self.band.high is not None:
            seen = seen & (ahead <= self.band.high)
        if self.kept is not None:
            seen = seen & self.kept[:, None, None]
        if self.sequence is not None:
            own = self.sequence[:, self.band.offset :][:, : len(rows)]
            seen = seen & (own[:, None, :, None] == self.sequence[:, None, None])
        least = torch.full((), torch.finfo(self.dtype).min, dtype=self.dtype, device=self.device)
        return torch.where(seen, torch.zeros_like(least), least).expand(self.shape).contiguous()


@dataclass(frozen=True)
class _Pattern:
    """What a function of two indices says, of the indices themselves rather than of rows and columns."""

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
    """The queries and keys that a mask is asked for, as transformers counts them."""

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
    """The mask that transformers asks for, by its own arguments: what `AttentionMaskInterface` registers.

    Raises
    ------
    NotImplementedError
        `mask_function` says what is neither a band of differences of the two indices, nor packed sequences, nor chunks.
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
    """What `function` says; `packed` where sequences that are packed see themselves alone by another function."""
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
        # Within a sequence its positions differ as the indices do, so that a band stays the same band.
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
    name = getattr(function, "__qualname__", repr(function))
    raise NotImplementedError(
        f"attention_mask: the model makes it by {name}, and ropecy knows causal masks, windows, padding, packed "
        "sequences and chunks"
    )


def _maker(function: _Function) -> tuple[str, dict[str, Any]]:
    """The name of what made it and the variables that it holds, where transformers itself did; else "" and none."""
    if inspect.isfunction(function) and function.__module__ == masking_utils.__name__:
        return function.__qualname__.partition(".")[0], _held(function)
    return "", {}


def _held(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _knows_only_numbers(function: Any) -> bool:
    """Whether no tensor is within, so that it says the same of every row of a batch and of every call."""
    if isinstance(function, tuple | list):
        return all(_knows_only_numbers(x) for x in function)
    if not inspect.isfunction(function):
        return function is None or isinstance(function, bool | int | float | str)
    plain = not function.__defaults__ and not function.__kwdefaults__
    return plain and all(_knows_only_numbers(x) for x in _held(function).values())


def _adds_no_block(function: _Function) -> bool:
    """Whether it would let blocks of images see themselves, and there is text alone."""
    name, inside = _maker(function)
    return name == "blockwise_overlay" and bool((inside["block_sequence_ids"] < 0).all())


def _evaluate(function: _Function, indices: _Indices) -> Tensor:
    """Which keys (b, n_k) the one query sees."""
    batch = torch.arange(indices.batch, device=indices.device)[:, None]
    seen = function(batch, torch.zeros_like(batch), indices.queries()[:, None], indices.keys()[None])
    return torch.as_tensor(seen, device=indices.device).expand(indices.batch, indices.k_length)


def _measure(function: _Function, indices: _Indices) -> _Pattern:
    """The band that `function` is, from O(n + n_k) of its values; a NotImplementedError if they are not a band's.

    The last query sees farthest back and the first one farthest ahead. All of what these two see, and the edges of the
    band for each query, must be as the band has them.
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
