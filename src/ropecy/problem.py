"""The numeric problem that engines solve, and the way from a user's arguments to it and back.

Everything that has a meaning for the user and none for an engine ends here: projections, rotations, leading axes,
grouped heads, dtypes. An engine sees slots (batch element times key head), each with its keys and the G query heads
that share them, contiguous and of one dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from . import _validate, projections
from .approximation import bias_forms as forms
from .projections import sum_to
from .rotary import rotate_rows

# What a rotation does to a row at most, in units of its norm: two products and a sum, of rounded cosines and sines.
_ROTATED = 2.0


@dataclass(slots=True)
class Family:
    """W_t between q_i and k_j in the place of the identity, t = i + q_offset - j.

    Attributes
    ----------
    values : (M, |S|) float32 or float64
        W_t[a, b] at index t + zero, clipped to 0 .. M - 1, for the pairs (a, b) of the support.
    left, right : (|S|,) intp
        The pairs: a, of queries, and b, of keys.
    zero : int
        The index of W_0.
    """

    values: np.ndarray
    left: np.ndarray
    right: np.ndarray
    zero: int

    def rows(self, first: int, last: int) -> np.ndarray:
        """The index in `values` of the offsets t from first to last."""
        return np.clip(np.arange(first, last + 1) + self.zero, 0, len(self.values) - 1)

    def matrix(self, t: int, d: int) -> np.ndarray:
        """W_t as a (d, d) float64 array."""
        W = np.zeros((d, d))
        np.add.at(W, (self.left, self.right), self.values[self.rows(t, t)[0]])
        return W

    def transposed(self) -> Family:
        """W_t^T."""
        return replace(self, left=self.right, right=self.left)

    def gradient(self, dentries: np.ndarray, first: int) -> np.ndarray:
        """(M, |S|): what (|S|, m) at the offsets first, first + 1, ... is for `values`; clipped offsets add up."""
        index = self.rows(first, first + dentries.shape[1] - 1)
        dvalues = np.zeros(self.values.shape)
        starts = np.flatnonzero(np.diff(index, prepend=-1))
        if starts.size:
            dvalues[index[starts]] = np.add.reduceat(dentries, starts, axis=1).T
        return dvalues


@dataclass(slots=True)
class Origin:
    """Where the arrays of a problem come from: what models of rounding need that the arrays no longer show.

    Attributes
    ----------
    q_lost, k_lost, v_lost : float
        What rounding has already done to the rows of q and k, and to the entries of v, when they were projected and
        rotated, relative to the slot's longest row and to the largest entry. 0 for arrays that are as the user gave
        them.
    k_norm : (H,) array or None
        An upper bound of ``||k_j||`` before keys were centred (`normal.normal_form`); None where they are not.
    largest, varied : float or None
        max |v| before values were centred and scaled, of all columns and of those that are not constant; None where
        they are not.
    exponent : int
        Values were multiplied by ``2^-exponent``.
    hidden : bool
        Whether keys are hidden of which key_mask says nothing, being of other ranks.
    """

    q_lost: float = 0.0
    k_lost: float = 0.0
    v_lost: float = 0.0
    k_norm: np.ndarray | None = None
    largest: float | None = None
    varied: float | None = None
    exponent: int = 0
    hidden: bool = False


@dataclass(slots=True)
class Problem:
    """O_i = sum_j A_ij V_j / sum_j A_ij with A_ij = exp(scale <q_i, k_j> + b_{j-i}) where key j is seen by row i.

    With a family, q_i W_{i-j} k_j^T stands in the place of <q_i, k_j>.

    Attributes
    ----------
    q : (H, G, n, d) float32 or float64
        Projected, rotated queries: slot, query head that shares the slot's keys, row.
    k : (H, n_k, d)
        Projected, rotated keys; rows that `key_mask` hides are 0.
    v : (H, n_k, d_v)
        Values, likewise.
    scale : float
        Multiplies the inner products.
    lo, hi : int or None
        The band: key j is seen by row i when lo <= t <= hi, t = j - i - q_offset; None is no bound.
    q_offset : int
        Index of the first query among the keys.
    near : (int, float) or None
        (w, scale_near): where |t| < w the score has scale_near in the place of scale.
    bias : (H or 1, G or 1, n + n_k - 1) float64 or None
        b_t at index t - t_min, t_min = -(n - 1) - q_offset.
    tail : callable or None
        How exp(b_t) factors far out: ``tail(longest, tolerance)`` is a `forms.Tail` or None, its heads all H G or 1.
    key_mask : (H, n_k) bool or None
        True for keys that are kept.
    family : Family or None
        Shared by all slots.
    threads : int
        How many threads may work.
    origin : Origin
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scale: float
    lo: int | None = None
    hi: int | None = None
    q_offset: int = 0
    near: tuple[int, float] | None = None
    bias: np.ndarray | None = None
    tail: Callable[[int, float], forms.Tail | None] | None = None
    key_mask: np.ndarray | None = None
    family: Family | None = None
    threads: int = 1
    origin: Origin = field(default_factory=Origin)

    @property
    def offsets(self) -> tuple[int, int]:
        """The least and the largest i + q_offset - j that the band allows."""
        first, last = self.q_offset - (self.k.shape[1] - 1), self.q_offset + self.q.shape[2] - 1
        return (
            first if self.hi is None else max(first, -self.hi),
            last if self.lo is None else min(last, -self.lo),
        )

    @property
    def empty(self) -> bool:
        """Whether no row sees a key, or there are no rows: the result is 0 and engines have nothing to do."""
        n, n_k = self.q.shape[2], self.k.shape[1]
        if 0 in self.q.shape or 0 in self.k.shape or (self.key_mask is not None and not self.key_mask.any()):
            return True
        last, first = n_k - 1 - self.q_offset, -(n - 1) - self.q_offset
        return (self.hi is not None and self.hi < first) or (self.lo is not None and self.lo > last)

    def with_values(self, v: np.ndarray) -> Problem:
        """The same scores over other values, (H, n_k, m), which are as the user gave them."""
        origin = replace(self.origin, v_lost=0.0, largest=None, varied=None, exponent=0)
        return replace(self, v=_masked(v, self.key_mask), origin=origin)

    def ungrouped(self) -> Problem:
        """The same problem with every query head in a slot of its own: keys are repeated."""
        H, G, n, d = self.q.shape
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
            bias=bias,
            key_mask=None if self.key_mask is None else np.repeat(self.key_mask, G, axis=0),
        )

    def transposed(self, v: np.ndarray) -> Problem:
        """The problem of A^T, both sequences reversed: row n_k - 1 - j of its result belongs to key j.

        `v` (H G, n, m) are the values, one row for each query, not reversed. With both sequences reversed the offset
        t is what it was, since (n - 1 - i) - (n_k - 1 - j) = j - i + (n - n_k): band, bias and near field stay, a
        causal matrix stays causal, and only the index of the first row moves. Rows of keys that `key_mask` hides are
        meaningless.
        """
        one = self.ungrouped()
        n, n_k = one.q.shape[2], one.k.shape[1]
        return replace(
            one,
            q=np.ascontiguousarray(one.k[:, None, ::-1]),
            k=np.ascontiguousarray(one.q[:, 0, ::-1]),
            v=np.ascontiguousarray(v[:, ::-1]),
            q_offset=self.q_offset + n - n_k,
            key_mask=None,
            family=None if self.family is None else self.family.transposed(),
            origin=Origin(q_lost=self.origin.k_lost, k_lost=self.origin.q_lost),
        )


@dataclass(slots=True)
class _Rows:
    """One of q, k, v: a product of the user's arrays, rotated and laid out in slots; and the adjoint of that."""

    factors: dict[str, np.ndarray]
    batch: tuple[int, ...]
    heads: int
    positions: np.ndarray | None = None
    rotate: Callable[..., np.ndarray] | None = None
    shape: tuple[int, ...] = field(init=False)
    lost: float = 0.0  # what rounding has done to a row at most, relative to the longest of its head

    def slots(self) -> np.ndarray:
        """(batch * heads, rows, width), C-contiguous; the user's own memory where nothing has to be done."""
        X, *others = self.factors.values()
        if others:
            X, self.lost = projections.product([X, *others])
            _validate.check_finite(" @ ".join(self.factors), X)
        if self.positions is not None:
            self.lost += _ROTATED * float(np.finfo(X.dtype).eps) / 2
        self.shape = X.shape
        if self.positions is None:
            X = spread(X, self.batch, self.heads)
        elif self.positions.ndim == 1:
            # Rotated before it is repeated for heads and batch elements.
            X = spread(self.rotate(X, self.positions), self.batch, self.heads)
        else:
            X = spread(X, self.batch, self.heads)
            X = self.rotate(X, self._slot_positions())
        return contiguous(X)

    def gradients(self, dX: np.ndarray, exponent: int | np.ndarray, ranks: Any) -> dict[str, np.ndarray]:
        """The gradient of each factor, times 2^exponent, from that of the slots, which is overwritten; `exponent` is
        one number, or one for each slot.
        """
        if np.ndim(exponent):
            largest = int(exponent.max())
            dX, exponent = np.ldexp(dX.astype(np.float64), (exponent - largest)[:, None, None]), largest
        if self.positions is not None and self.positions.ndim > 1:
            dX = self._rotate_back(dX, self._slot_positions())
        dX = _gather(dX, self.batch, self.heads, self.shape)
        if self.positions is not None and self.positions.ndim == 1:
            dX = self._rotate_back(dX, self.positions)
        if len(self.factors) > 1:
            return projections.gradients(self.factors, dX, exponent, ranks)
        ((name, X),) = self.factors.items()
        dX = sum_to(dX, X.shape)
        return {name: np.ldexp(dX, exponent) if exponent else dX}

    def _rotate_back(self, dX: np.ndarray, positions: np.ndarray) -> np.ndarray:
        dX = np.require(dX, requirements=["C", "A", "W"])
        return self.rotate(dX, positions, adjoint=True, out=dX)

    def _slot_positions(self) -> np.ndarray:
        return spread(self.positions[..., None], self.batch, self.heads)[..., 0]


@dataclass(frozen=True, slots=True)
class Exponents:
    """The powers of two that gradients of a normal form are to be multiplied with, for those of what it was made of.

    Attributes
    ----------
    scores : int
        Of gradients of a bias and of a family.
    q, k : int or (H,) int array
        Of those of q and k, one for each slot where they are unlike.
    v, near : int
        Of those of v and of `scale_near`.
    """

    scores: int = 0
    q: int | np.ndarray = 0
    k: int | np.ndarray = 0
    v: int = 0
    near: int = 0


class Call:
    """A call's arguments after validation: `problem`, `how` to compute it, and the way back to the user's arrays.

    ``shape`` is that of the result, ``dtype`` the user's, ``how`` the keyword arguments of ``plan.make_plan``;
    `problem` has ``key_heads`` slots for each batch element, which ``heads`` query heads share. Where the arguments are
    a piece of a longer sequence, ``length`` and ``least_key_heads`` are what the pieces agree upon.
    """

    def __init__(
        self, arguments: _validate.Arguments, how: dict[str, Any], *, length: int = 1, least_key_heads: int = 1
    ) -> None:
        a = self._arguments = arguments
        self.how = how
        self.dtype = a.dtype
        self.shape = a.lead + (a.n, a.d_v)
        # What differs between the heads of a group ends the sharing.
        self.heads = a.heads
        self.key_heads = math.lcm(key_heads_of(a), least_key_heads)
        rotate = None
        if a.R is not None:
            theta, factor = a.R._frequencies(max(length, length_of(a)))
            rotate = partial(rotate_rows, theta=theta, factor=factor, pairing=a.R.pairing, threads=a.threads)
        batch = a.batch
        self._q = _Rows(_given(a, "Q", "W_Q", "W"), batch, self.heads, a.q_positions, rotate)
        self._k = _Rows(_given(a, "K", "W_K"), batch, self.key_heads, a.k_positions, rotate)
        self._v = _Rows(_given(a, "V", "W_V"), batch, self.key_heads)
        self.problem = self._problem()

    def _problem(self) -> Problem:
        a = self._arguments
        q, k = self._q.slots(), self._k.slots()
        slots = k.shape[0]
        group = self.heads // max(self.key_heads, 1)
        mask = a.key_mask
        if mask is not None:
            mask = mask if mask.ndim > 1 else mask[None]
            mask = np.ascontiguousarray(spread(mask[..., None], a.batch, self.key_heads)[..., 0])
        v = None if a.V is None else self._v.slots()
        if v is None or a.d_v == 0:
            # Engines have a column to work on.
            v = _masked(np.ones((slots, a.n_k, 1), q.dtype), mask)
        if a.key_mask is not None and a.key_mask.ndim > 1:
            # Keys that several masks share are hidden by some and kept by others.
            k, v = _masked(k, mask), _masked(v, mask)
        first, last = -(a.n - 1) - a.q_offset, a.n_k - 1 - a.q_offset
        return Problem(
            q=q.reshape(slots, group, a.n, a.d),
            k=k,
            v=v,
            scale=a.scale,
            # A band that hides nothing is no band.
            lo=None if a.lo is not None and a.lo <= first else a.lo,
            hi=None if a.hi is not None and a.hi >= last else a.hi,
            q_offset=a.q_offset,
            near=a.near,
            bias=None if a.bias is None or 0 in (a.n, a.n_k) else self.symbol(first, last),
            tail=None if a.bias is None else self.tail,
            key_mask=mask,
            family=None if a.family is None else self._family(),
            threads=a.threads,
            origin=Origin(self._q.lost, self._k.lost, self._v.lost),
        )

    def _family(self) -> Family:
        values, pairs, zero = self._arguments.family._table(self._arguments.n_k)
        return Family(values, pairs[:, 0], pairs[:, 1], zero)

    def symbol(self, first: int, last: int) -> np.ndarray:
        """The bias at offsets t from first to last, as `Problem.bias` holds it."""
        a = self._arguments
        symbol = a.bias._symbol(first, last)
        if len(symbol) == 1:
            return symbol[None]
        symbol = np.broadcast_to(symbol, (math.prod(a.batch),) + symbol.shape)
        return symbol.reshape(-1, a.heads // max(self.key_heads, 1), symbol.shape[-1])

    def tail(self, longest: int, tolerance: float) -> forms.Tail | None:
        """How the exponential of the bias factors far out, with all heads of the batch, or one."""
        a = self._arguments
        tail = a.bias._tail(longest, tolerance)
        if tail is None or tail.rate.shape[-1] == 1:
            return tail
        log_weight, rate = (np.tile(X, math.prod(a.batch)) for X in (tail.log_weight, tail.rate))
        return tail._replace(log_weight=log_weight, rate=rate)

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes of the result."""
        return self._arguments.lead

    def to_user(self, o: np.ndarray) -> np.ndarray:
        """(H, G, n, d_v or 1) of an engine as the user's O."""
        return self._cast(o[..., : self.shape[-1]].reshape(self.shape))

    def lse_to_user(self, lse: np.ndarray) -> np.ndarray:
        """(H, G, n) float64 as (..., n)."""
        return lse.reshape(self.shape[:-1])

    def from_user(self, dO: np.ndarray) -> np.ndarray:
        """What has the shape of O as (H, G, n, d_v or 1), contiguous, in the dtype computed in."""
        problem = self.problem
        if self.shape[-1] == 0:
            return np.zeros(problem.q.shape[:3] + (1,), problem.q.dtype)
        dO = np.require(dO, problem.q.dtype, ["C", "A"])
        return dO.reshape(problem.q.shape[:3] + self.shape[-1:])

    def gradients(
        self,
        dq: np.ndarray,
        dk: np.ndarray,
        dv: np.ndarray,
        dsymbol: np.ndarray | forms.FarGradient | None,
        dfamily: np.ndarray | None = None,
        *,
        dscale_near: np.float64 | None = None,
        exponents: Exponents = Exponents(),
        ranks: Any = None,
    ) -> dict[str, np.ndarray]:
        """{"dQ": ..., "dW_Q": ...}: an engine's gradients, which are overwritten, times the powers of two of
        `exponents`.

        Every argument that was given has its gradient, in its shape and dtype. `ranks`, where they hold pieces of the
        sequence, add up their parts of the gradients of what they share, projections.
        """
        a = self._arguments
        H, G, n, d = dq.shape
        with np.errstate(all="ignore"):
            of_q = np.repeat(exponents.q, G) if np.ndim(exponents.q) else exponents.q
            found = self._q.gradients(dq.reshape(H * G, n, d), of_q, ranks)
            found |= self._k.gradients(dk, exponents.k, ranks)
            found |= self._v.gradients(dv[..., : self.shape[-1]], exponents.v, ranks)
            exponent = exponents.scores
            if exponent and dfamily is not None:
                dfamily = np.ldexp(dfamily, exponent)
        gradients = {"d" + name: self._cast(X) for name, X in found.items()}
        if dscale_near is not None:
            with np.errstate(over="ignore"):
                gradients["dscale_near"] = np.ldexp(dscale_near, exponents.near)
        if a.bias is not None:
            dbias = self.bias_gradient(dsymbol, -(a.n - 1) - a.q_offset)
            with np.errstate(over="ignore"):
                gradients["dbias"] = np.ldexp(dbias, exponent) if exponent else dbias
        if a.family is not None:
            if dfamily is None:
                # No pair of a query and a key.
                dfamily = np.zeros((len(self.problem.family.left), 0))
            gradients["dR"] = a.family._gradient(self.problem.family.gradient(dfamily, a.q_offset - (a.n_k - 1)))
        return gradients

    def bias_gradient(self, dsymbol: np.ndarray | forms.FarGradient | None, first: int) -> np.ndarray:
        """The gradient of the bias from that of its symbol (H, G, _), at offsets t from `first` on; None is 0."""
        a = self._arguments
        heads = 1 if a.bias.heads in (None, 1) else a.heads
        far = dsymbol if isinstance(dsymbol, forms.FarGradient) else None
        if far is not None:
            flow = far.flow.reshape(*far.flow.shape[:2], -1, heads).sum(axis=2)
            dsymbol, far = far.symbol, replace(far, flow=flow, moment=far.moment.reshape(2, -1, heads).sum(axis=1))
        if dsymbol is not None:
            dsymbol = dsymbol.reshape(-1, heads, dsymbol.shape[-1]).sum(axis=0)
        return a.bias._gradient(dsymbol, first, far)

    def _cast(self, X: np.ndarray) -> np.ndarray:
        if X.dtype == self.dtype:
            return X
        with np.errstate(over="ignore"):
            return X.astype(self.dtype)


def check_forms(
    Q: Any,
    K: Any,
    V: Any,
    R: Any = None,
    *,
    W: Any = None,
    W_Q: Any = None,
    W_K: Any = None,
    W_V: Any = None,
    scale: Any = None,
    causal: Any = False,
    window: Any = None,
    near: Any = None,
    bias: Any = None,
    key_mask: Any = None,
    q_positions: Any = None,
    k_positions: Any = None,
    q_offset: Any = 0,
    eps: Any = 1e-3,
    certify: Any = "proof",
    method: Any = "auto",
    degree: Any = None,
    seed: Any = None,
    threads: Any = None,
) -> tuple[_validate.Arguments, dict[str, Any]]:
    """The arguments of `attention`, checked but for the entries of arrays: what they say of the numbers, and of how to
    compute.
    """
    how = _validate.check_method(eps=eps, certify=certify, method=method, degree=degree, seed=seed)
    arguments = _validate.check_arguments(
        Q,
        K,
        V,
        R,
        W=W,
        W_Q=W_Q,
        W_K=W_K,
        W_V=W_V,
        scale=scale,
        causal=causal,
        window=window,
        near=near,
        bias=bias,
        key_mask=key_mask,
        q_positions=q_positions,
        k_positions=k_positions,
        q_offset=q_offset,
        threads=threads,
    )
    return arguments, how


def check(Q: Any, K: Any, V: Any, R: Any = None, **options: Any) -> tuple[_validate.Arguments, dict[str, Any]]:
    """`check_forms`, and the entries of arrays."""
    arguments, how = check_forms(Q, K, V, R, **options)
    return _validate.check_entries(arguments), how


def prepare(Q: Any, K: Any, V: Any, R: Any = None, **options: Any) -> Call:
    """Check the arguments of `attention`, project, rotate and lay out: everything before the choice of an engine."""
    return Call(*check(Q, K, V, R, **options))


def prepare_for(function: str, Q: Any, K: Any, V: Any, R: Any, options: Mapping[str, Any]) -> Call:
    """`prepare` for a function that takes **options, at whose door a wrong keyword is laid."""
    check_names(function, options)
    return prepare(Q, K, V, R, **options)


def check_names(function: str, options: Mapping[str, Any]) -> None:
    """Refuse keywords that `attention` does not have."""
    unknown = [name for name in options if name not in check_forms.__kwdefaults__]
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}")


def length_of(arguments: _validate.Arguments) -> int:
    """The largest position + 1, which rules of scaling may depend on; at least 1."""
    given = (p for p in (arguments.q_positions, arguments.k_positions) if p is not None and p.size)
    return max(1, 1 + max((int(p.max()) for p in given), default=0))


def key_heads_of(arguments: _validate.Arguments) -> int:
    """How many heads differ in keys, values or masks, each of which query heads share."""
    a = arguments
    return math.lcm(
        *(head_count(X, 2) for X in (a.K, a.W_K, a.V, a.W_V) if X is not None),
        *(head_count(X, 1) for X in (a.key_mask, a.k_positions) if X is not None),
    )


def head_count(X: np.ndarray, inner: int) -> int:
    """The size of the head axis, the last but `inner`; 1 where there is none."""
    return X.shape[-1 - inner] if X.ndim > inner else 1


def spread_columns(X: np.ndarray, call: Call, heads: int) -> np.ndarray:
    """X (..., rows, m) as one contiguous (rows, m) for each slot of `heads` heads."""
    return contiguous(spread(X, call.lead[:-1], heads))


def contiguous(X: np.ndarray) -> np.ndarray:
    """X itself where it is C-contiguous and aligned, as engines take arrays; else a copy that is."""
    return X if X.flags.c_contiguous and X.flags.aligned else X.copy()


def _given(arguments: _validate.Arguments, *names: str) -> dict[str, np.ndarray]:
    given = {name: X for name in names if (X := getattr(arguments, name)) is not None}
    if len(given) < 2:
        return given
    # Products are then bitwise the same for every memory layout.
    return {name: contiguous(X) for name, X in given.items()}


def _masked(X: np.ndarray, key_mask: np.ndarray | None) -> np.ndarray:
    """X (H, n_k, m) where the rows of hidden keys are 0."""
    return X if key_mask is None else np.where(key_mask[..., None], X, X.dtype.type(0))


def spread(X: np.ndarray, batch: tuple[int, ...], heads: int) -> np.ndarray:
    """(..., h, a, b) to (batch * heads, a, b): each of the h heads serves heads // h consecutive ones."""
    tail = X.shape[-2:]
    if X.shape[:-2] != batch + (heads,):
        own = head_count(X, 2)
        X = X.reshape(X.shape[:-3] + (own, 1) + tail)
        X = np.broadcast_to(X, batch + (own, heads // max(own, 1)) + tail)
    return X.reshape((math.prod(batch) * heads,) + tail)


def _gather(dX: np.ndarray, batch: tuple[int, ...], heads: int, shape: tuple[int, ...]) -> np.ndarray:
    """The adjoint of `spread` of an array of this shape."""
    own = shape[-3] if len(shape) > 2 else 1
    dX = dX.reshape(batch + (own, heads // max(own, 1)) + dX.shape[-2:])
    dX = dX.sum(axis=-3) if dX.shape[-3] != 1 else dX[..., 0, :, :]
    return sum_to(dX, shape)
