"""A mask that is kept as a description: a tensor whose n x n_k entries are computed only if something reads them.

A model may slice the mask or move it to another device before its attention gets it, or compute with it in code of its
own; therefore it is a tensor. Slices and copies of it are descriptions too. Every other operation gets the numbers that
eager attention has: 0 where a query sees a key, and the least number of the dtype where it doesn't.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten


class Band(NamedTuple):
    """Query i sees key j if low <= j - (i + offset) <= high; None is no bound on that side."""

    low: int | None = None
    high: int | None = None
    offset: int = 0


class DescribedMask(torch.Tensor):
    """The mask (b, 1, n, n_k) of a band, within which a query sees the kept keys of its own sequence.

    Parameters
    ----------
    shape, dtype, device
        Those of the additive mask that it stands for.
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
        # torch.compile takes no tensor subclass without a tensor inside.
        self._nothing = torch.empty(0, device=device)

    def __repr__(self) -> str:
        return (
            f"DescribedMask(shape={tuple(self.shape)}, {self.band}, kept={self.kept}, sequence={self.sequence}, "
            f"dtype={self.dtype})"
        )

    # torch.compile takes the mask apart by this method and puts it together by the next one.
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
        """The description of a slice, or None where there is none."""
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
        """The additive mask that eager attention has."""
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
