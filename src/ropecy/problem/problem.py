"""The numeric problem that engines solve, and its outline, which has everything but the arrays.

Engines know nothing of projections, rotations, leading axes and half precision: `call` has applied them before. A
problem consists of slots, one for each batch element and key head. A slot has its keys and values and the G query heads
that share them, in contiguous arrays of one dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from ..approximation import bias_forms as forms
from ..kernels import _rows
from .family import Family
from .mask import Mask
from .near import Near

# The limits of the dtypes that are computed in; to look them up here is faster than to ask NumPy for them.
LIMITS = {np.dtype(kind): np.finfo(kind) for kind in (np.float32, np.float64)}


# Some of the slots: their indices, or a slice where they follow one another, which makes views and no copies.
Slots = slice | np.ndarray


class Sizes(NamedTuple):
    """The sizes of a problem: H slots of G query heads each, n rows and n_k keys of width d, values of width d_v."""

    H: int
    G: int
    n: int
    n_k: int
    d: int
    d_v: int


@dataclass(slots=True)
class Origin:
    """Where the arrays of a problem come from: what models of rounding need that the arrays no longer show.

    Attributes
    ----------
    q_lost, k_lost, v_lost : float
        The rounding error that projections and rotations left in the rows of q and k, relative to the norm of the
        slot's longest row, and in the entries of v, relative to the largest. 0 for arrays that are as the user gave
        them.
    q_norm, k_norm : (H,) arrays or None
        Upper bounds of ``||q_i||`` and of ``||k_j||``, before keys were centred (`normal_form`), that q_lost and k_lost
        are relative to; None if they are those of the problem as it is.
    projected : bool
        Whether q or k are products with projections.
    v_size : float or None
        max |v|, before the normal form, that v_lost is relative to; None if it is that of the problem as it is.
    unit : float or None
        Of packed sequences: the largest range of a column of v, or max |v| where all are constant; it is that of the
        values of all sequences, before each is centred by itself.
    largest, varied : (H,) or (H, s) arrays or None
        max |v| of each slot, and of each of s packed sequences in it, before values were centred and scaled: over all
        columns, and over those that are not constant. None if they were not.
    exponent : int
        Values were multiplied by ``2^-exponent``.
    hidden : bool
        Whether other ranks hide keys, which the mask does not show.
    axes : tuple of int
        The user's leading axes of keys, whose elements the slots are in order: those of the batch, then key heads. ()
        where slots are not the user's.
    sequences : (m,) int array or None
        Where the last of `axes` counts packed sequences: which these are.
    heads : int or None
        How many slots work is cut up for, where these are parts of a problem of that many slots, so that the results
        of a slot do not depend on what it is computed together with; None for as many as there are.
    alike : int or None
        How many slots of this shape the whole problem has, where these are some of them; None for as many as there are.
    numbers : (H,) int array or None
        Which of all slots these are, by which each draws random numbers of its own; None for all in order.
    """

    q_lost: float = 0.0
    k_lost: float = 0.0
    v_lost: float = 0.0
    q_norm: np.ndarray | None = None
    k_norm: np.ndarray | None = None
    projected: bool = False
    v_size: float | None = None
    unit: float | None = None
    largest: np.ndarray | None = None
    varied: np.ndarray | None = None
    exponent: int = 0
    hidden: bool = False
    axes: tuple[int, ...] = ()
    sequences: np.ndarray | None = None
    heads: int | None = None
    alike: int | None = None
    numbers: np.ndarray | None = None

    def slots(self, which: Slots, H: int) -> Origin:
        """The origin of some of H slots."""
        own = {name: getattr(self, name) for name in ("q_norm", "k_norm", "largest", "varied")}
        own = {name: None if X is None else X[which] for name, X in own.items()}
        own["numbers"] = (np.arange(H) if self.numbers is None else self.numbers)[which]
        return replace(self, **own, axes=(), sequences=None, heads=self.heads or H, alike=self.alike or H)

    def named(self, slots: Slots, H: int) -> tuple[tuple[int, ...], ...]:
        """The indices of these of H slots along the user's leading axes, and after them that of a packed sequence."""
        *heads, last = np.unravel_index(np.arange(H)[slots], self.axes or (H,))
        indices = *heads, last if self.sequences is None else self.sequences[last]
        return tuple(zip(*(index.tolist() for index in indices), strict=True))


@dataclass(slots=True, kw_only=True)
class Outline:
    """A problem without its arrays of rows: what its work and memory depend on, and, beside measurements, its plan.

    Attributes
    ----------
    sizes : Sizes
    dtype : numpy.dtype
        float32 or float64.
    scale : float
        Multiplies the inner products.
    mask : Mask
    near : Near or None
        Where |j - i - offset| is below its width the score has its scale in the place of `scale`.
    bias : (H or 1, G or 1, n + n_k - 1) float64 array or None
        What is added to the scores at the offset t = j - i - offset, at index t - mask.least.
    tail : callable or None
        How exp(b_t) factors at large distances: ``tail(longest, tolerance)`` is a `forms.Tail`, with H G heads or one,
        or None if it does not factor.
    family : Family or None
        Shared by all slots.
    threads : int
        How many threads may work.
    origin : Origin
    """

    sizes: Sizes
    dtype: np.dtype
    scale: float = 1.0
    mask: Mask
    near: Near | None = None
    bias: np.ndarray | None = None
    tail: Callable[[int, float], forms.Tail | None] | None = None
    family: Family | None = None
    threads: int = 1
    origin: Origin = field(default_factory=Origin)

    @property
    def features(self) -> frozenset[str]:
        """The names of what an engine must support to solve this problem.

        Every optional field of a problem or of its mask that is set counts, even one that no engine knows.
        """
        names, values_of = _optional(type(self))
        found = set()
        for name, value in zip(names, values_of(self), strict=True):
            if value is not None:
                found |= {name}
        return self.mask.features | found

    @property
    def empty(self) -> bool:
        """Whether no row sees a key, or there are no rows: the result is 0 and engines have nothing to do."""
        return 0 in self.sizes or self.mask.empty

    @property
    def largest_scale(self) -> float:
        """The largest of |scale| and of |scale_near| of all heads."""
        return abs(self.scale) if self.near is None else max(abs(self.scale), self.near.largest)

    @property
    def largest_scales(self) -> float | np.ndarray:
        """The largest of |scale| and of |scale_near| of each slot, (H,), or one for all."""
        if self.near is None or not self.near.by_head:
            return self.largest_scale
        return np.maximum(abs(self.scale), np.abs(self.near.scale).max(axis=1))

    @property
    def terms(self) -> int:
        """How many products are added up in a score; monomials have so many variables."""
        return self.sizes.d if self.family is None else max(1, len(self.family.used))

    @property
    def cut_for(self) -> int:
        """How many slots work is cut up for."""
        return self.origin.heads or self.sizes.H

    @property
    def numbers(self) -> np.ndarray:
        """Which of all slots of the call these are, (H,)."""
        return np.arange(self.sizes.H) if self.origin.numbers is None else self.origin.numbers

    @property
    def several(self) -> bool:
        """Whether there are other slots of their shape, or more than one."""
        return (self.origin.alike or self.sizes.H) > 1

    @property
    def share(self) -> float:
        """The part that the slots are of all of their shape."""
        return self.sizes.H / (self.origin.alike or self.sizes.H)

    @property
    def unit(self) -> float:
        """The unit of rounding of the dtype: the largest relative error of rounding a number."""
        return 2.0**-24 if self.dtype == np.float32 else 2.0**-53

    def outline(self, **changes: object) -> Outline:
        """The outline of this problem, with these fields changed."""
        names, values_of = _all()
        return Outline(**dict(zip(names, values_of(self), strict=True)) | changes)

    def slots(self, which: Slots) -> Outline:
        """The outline of the problem of some of the slots."""
        count = len(np.arange(self.sizes.H)[which])
        return self.outline(sizes=self.sizes._replace(H=count), **self._of_slots(which))

    def _of_slots(self, which: Slots) -> dict[str, object]:
        """The fields that slots may differ in, for some of the slots."""
        bias = self.bias
        # Query heads of the only slot may have biases of their own; then every slot is to have its own.
        if bias is not None and (len(bias) > 1 or (self.sizes.H == 1 and bias.shape[1] > 1)):
            bias = bias[which]
        near = self.near and self.near.at(which)
        tail = None if self.tail is None else partial(_tail_of_slots, self.tail, self.sizes, which)
        origin = self.origin.slots(which, self.sizes.H)
        return {"mask": self.mask.slots(which), "near": near, "bias": bias, "tail": tail, "origin": origin}

    def resized(self, n: int, n_k: int) -> Outline:
        """An outline with n rows and n_k keys that begin together, and with the same band.

        It has no hidden keys, no bias and no near field.
        """
        mask = Mask(n, n_k, self.mask.lo, self.mask.hi)
        return self.outline(sizes=self.sizes._replace(n=n, n_k=n_k), mask=mask, bias=None, tail=None, near=None)


@dataclass(slots=True, kw_only=True)
class Problem(Outline):
    """O_i = sum_j A_ij V_j / sum_j A_ij with A_ij = exp(scale <q_i, k_j> + b_{j-i}) where key j is seen by row i.

    With a family, q_i W_{i-j} k_j^T stands in the place of <q_i, k_j>.

    Attributes
    ----------
    q : (H, G, n, d) float32 or float64
        Projected, rotated queries: slot, query head that shares the slot's keys, row.
    k : (H, n_k, d)
        Projected, rotated keys; hidden ones are 0.
    v : (H, n_k, d_v)
        Projected values; those of hidden keys are 0.
    """

    sizes: Sizes = field(init=False)
    dtype: np.dtype = field(init=False)
    mask: Mask = None
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    def __post_init__(self) -> None:
        H, G, n, d = self.q.shape
        self.sizes = Sizes(H, G, n, self.k.shape[1], d, self.v.shape[2])
        self.dtype = self.q.dtype
        if self.mask is None:
            self.mask = Mask(n, self.k.shape[1])

    def slots(self, which: Slots) -> Problem:
        """The problem of some of the slots."""
        return replace(self, q=self.q[which], k=self.k[which], v=self.v[which], **self._of_slots(which))

    def with_values(self, v: np.ndarray) -> Problem:
        """The problem with the same scores and other values, (H, n_k, m), which carry no rounding error."""
        v = self.mask.hide(v)
        unit = None if self.mask.packed is None else unit_of(v, self.mask, self.threads)
        origin = replace(self.origin, v_lost=0.0, v_size=None, unit=unit, largest=None, varied=None, exponent=0)
        return replace(self, v=v, origin=origin)

    def ungrouped(self) -> Problem:
        """The same problem with every query head in a slot of its own: keys are repeated."""
        H, G, n, _, d, _ = self.sizes
        if G == 1:
            return self
        bias = self.bias
        if bias is not None and bias.shape[:2] != (1, 1):
            bias = np.broadcast_to(bias, (H, G, bias.shape[-1])).reshape(H * G, 1, -1)
        return replace(
            self,
            q=self.q.reshape(H * G, 1, n, d),
            k=np.repeat(self.k, G, axis=0),
            v=np.repeat(self.v, G, axis=0),
            near=self.near and self.near.ungrouped(),
            bias=bias,
            mask=self.mask.repeated(G),
            origin=replace(
                self.origin.slots(np.repeat(np.arange(H), G), H),
                axes=(*self.origin.axes[:-1], *(G * axis for axis in self.origin.axes[-1:])),
                heads=self.origin.heads and self.origin.heads * G,
                alike=self.origin.alike and self.origin.alike * G,
            ),
        )

    def transposed(self, v: np.ndarray) -> Problem:
        """The problem of A^T, both sequences reversed: row n_k - 1 - j of its result belongs to key j.

        `v` (H G, n, m) are the values, one row for each query, not reversed. With both sequences reversed the offset
        t is what it was, since (n - 1 - i) - (n_k - 1 - j) = j - i + (n - n_k): band, bias and near field stay, a
        causal matrix stays causal, and only the index of the first row moves. Rows of hidden keys are meaningless.
        """
        one = self.ungrouped()
        return replace(
            one,
            q=np.ascontiguousarray(one.k[:, None, ::-1]),
            k=np.ascontiguousarray(one.q[:, 0, ::-1]),
            v=np.ascontiguousarray(v[:, ::-1]),
            mask=self.mask.transposed(),
            family=None if self.family is None else self.family.transposed(),
            origin=Origin(
                q_lost=self.origin.k_lost,
                k_lost=self.origin.q_lost,
                projected=self.origin.projected,
                axes=one.origin.axes,
            ),
        )

    def reversed(self) -> Problem:
        """The problem with both sequences reversed, so that j - i becomes i - j; it must have no bias and no family."""
        q, k, v = (np.ascontiguousarray(X) for X in (self.q[:, :, ::-1], self.k[:, ::-1], self.v[:, ::-1]))
        return replace(self, q=q, k=k, v=v, mask=self.mask.reversed())


def in_order(slots: np.ndarray) -> Slots:
    """Ascending indices of slots; a slice where they follow one another."""
    first, last = int(slots[0]), int(slots[-1])
    return slice(first, last + 1) if last - first + 1 == len(slots) else slots


def unit_of(v: np.ndarray, mask: Mask, threads: int) -> float:
    """The largest range of a column of v (H, n_k, m) over kept keys, or max |v| where all columns are constant."""
    if not v.size:
        return 0.0
    _, low, high = _rows.columns(v, mask.kept, threads)
    low, high = low.astype(np.float64), high.astype(np.float64)
    return float((high - low).max()) or _rows.largest(v) if (low <= high).any() else 0.0


def _tail_of_slots(
    tail: Callable[[int, float], forms.Tail | None], sizes: Sizes, which: Slots, longest: int, tolerance: float
) -> forms.Tail | None:
    """`Outline.tail` for some of the slots; the derivatives by a bias's parameters stay those of all heads."""
    found = tail(longest, tolerance)
    if found is None or found.rate.shape[-1] == 1:
        return found
    heads = np.arange(sizes.H * sizes.G).reshape(sizes.H, sizes.G)[which].reshape(-1)
    return found._replace(log_weight=found.log_weight[..., heads], rate=found.rate[..., heads])


@lru_cache
def _all() -> tuple[tuple[str, ...], Callable[[Outline], tuple[object, ...]]]:
    """The names of the fields of an outline, and what takes all their values at once."""
    names = tuple(f.name for f in fields(Outline))
    return names, attrgetter(*names)


@lru_cache
def _optional(kind: type[Outline]) -> tuple[tuple[str, ...], Callable[[Outline], tuple[object, ...]]]:
    """The names of the fields that are features where they are set, and what takes all their values at once."""
    names = tuple(f.name for f in fields(kind) if f.name not in _PLAIN)
    return names, attrgetter(*names)


# The fields that every engine supports. A tail belongs to its bias, which counts as the feature.
_PLAIN = {"sizes", "dtype", "scale", "mask", "tail", "threads", "origin", "q", "k", "v"}
