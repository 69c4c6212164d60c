"""From a user's arguments to the problem that engines solve, and from their results back to the user's arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..approximation import bias_forms as forms
from ..approximation.bias_forms import FarGradient
from ..kernels import _halves, _rows
from ..machine.memory import require
from ..rotary import Planes, rotate_rows
from .arguments import Arguments, check_arguments, check_entries, check_method
from .communicator import SERIAL, Communicator
from .family import Family
from .input_gradients import AS_IT_IS, Exponents, InputGradients, SymbolGradient
from .mask import Mask
from .near import Near
from .problem import Origin, Problem, unit_of
from .request import Request
from .rows import Rows, contiguous, spread


class Call:
    """A call's arguments after validation: the problem, how to compute it, and the way back to the user's arrays.

    Parameters
    ----------
    arguments : Arguments
    request : Request
    length, least_key_heads : int
        Where the arguments are a piece of a longer sequence: the length of the whole sequence, which scaled rotations
        depend on, and a number that the number of key heads must be a multiple of. All pieces have the same two.

    Attributes
    ----------
    problem : Problem
        It has `key_heads` slots for each batch element, each shared by the same number of the `heads` query heads.
    shape : tuple of int
        The shape of the result.
    dtype : numpy.dtype
        The dtype of the user's arrays.
    """

    def __init__(
        self, arguments: Arguments, request: Request, *, length: int = 1, least_key_heads: int = 1
    ) -> None:
        a = self.arguments = arguments
        self.request = request
        self.dtype = a.dtype
        self.shape = a.lead + (a.n, a.d_v)
        # Query heads share a key head only where their keys, values and masks are the same.
        self.heads = a.heads
        self.key_heads = key_heads_of(a, least_key_heads)
        rotate = None
        if a.R is not None:
            planes = Planes(*a.R._frequencies(max(length, length_of(a))), a.R.pairing)
            rotate = partial(rotate_rows, planes=planes, threads=a.threads)
        batch, given = a.batch, a.arrays
        self._q = Rows(_factors(given, "Q", "W_Q", "W"), batch, self.heads, a.q_positions, rotate)
        self._k = Rows(_factors(given, "K", "W_K"), batch, self.key_heads, a.k_positions, rotate)
        self._v = Rows(_factors(given, "V", "W_V"), batch, self.key_heads)
        self.problem = self._problem()

    def _problem(self) -> Problem:
        a = self.arguments
        q, k = self._q.slots(), self._k.slots()
        slots = k.shape[0]
        group = self.heads // (self.key_heads or 1)
        mask = self._mask()
        v = None if a.V is None else self._v.slots()
        if v is None or a.d_v == 0:
            # Without V, a column of ones stands for it, since engines need a column of values.
            v = mask.hide(np.ones((slots, a.n_k, 1), q.dtype))
        if a.key_mask is not None and a.key_mask.ndim > 1:
            # Where several masks apply to a key, some may hide it and others keep it, so each slot is hidden by itself.
            k, v = mask.hide(k), mask.hide(v)
        return Problem(
            q=q.reshape(slots, group, a.n, a.d),
            k=k,
            v=v,
            scale=a.scale,
            mask=mask,
            near=a.near and Near.of(*a.near, slots, group),
            bias=None if a.bias is None or 0 in (a.n, a.n_k) else self.symbol(mask.least, mask.most),
            tail=None if a.bias is None else self.tail,
            family=None if a.family is None else self._family(),
            threads=a.threads,
            origin=Origin(
                self._q.lost,
                self._k.lost,
                self._v.lost,
                projected=a.W is not None or a.W_Q is not None or a.W_K is not None,
                v_size=_rows.largest(v) if self._v.lost else None,
                unit=None if a.packed is None else unit_of(v, mask, a.threads),
                axes=(*a.lead[:-1], self.key_heads),
            ),
        )

    def _mask(self) -> Mask:
        a, kept = self.arguments, self.arguments.key_mask
        if kept is not None:
            kept = kept if kept.ndim > 1 else kept[None]
            kept = np.ascontiguousarray(spread(kept[..., None], a.batch, self.key_heads)[..., 0])
        packed = a.packed
        by_offset = a.lo is not None or a.hi is not None or a.bias is not None or a.near is not None
        if packed is not None and not by_offset and packed.offsets.any():
            # Where nothing goes by j - i, sequences whose offsets alone differ are alike.
            packed = replace(packed, offsets=np.zeros_like(packed.offsets))
        return Mask(a.n, a.n_k, a.lo, a.hi, a.q_offset, kept, packed).simplified()

    def _family(self) -> Family:
        values, pairs, zero = self.arguments.family._table(self.arguments.n_k)
        return Family(values, pairs[:, 0], pairs[:, 1], zero)

    def symbol(self, first: int, last: int) -> np.ndarray:
        """The bias at offsets t from first to last, as `Problem.bias` holds it."""
        a = self.arguments
        if a.packed is not None:
            # Sequences may begin far apart from their keys, and from each other.
            require((last - first + 1) * 8.0 * (a.bias.heads or 1), "the bias at the offsets of all sequences")
        symbol = a.bias._symbol(first, last)
        if len(symbol) == 1:
            return symbol[None]
        symbol = np.broadcast_to(symbol, (math.prod(a.batch),) + symbol.shape)
        return symbol.reshape(-1, a.heads // max(self.key_heads, 1), symbol.shape[-1])

    def tail(self, longest: int, tolerance: float) -> forms.Tail | None:
        """How exp of the bias factors at large offsets, for all heads of all batch elements, or one for all of them."""
        a = self.arguments
        tail = a.bias._tail(longest, tolerance)
        if tail is None or tail.rate.shape[-1] == 1:
            return tail
        log_weight, rate = (np.tile(X, math.prod(a.batch)) for X in (tail.log_weight, tail.rate))
        return tail._replace(log_weight=log_weight, rate=rate)

    @property
    def lead(self) -> tuple[int, ...]:
        """The leading axes of the result."""
        return self.arguments.lead

    def to_user(self, o: np.ndarray) -> np.ndarray:
        """An engine's result (H, G, n, d_v or 1) in the shape and dtype of the user's O."""
        return self._cast(o[..., : self.shape[-1]].reshape(self.shape))

    def lse_to_user(self, lse: np.ndarray) -> np.ndarray:
        """An engine's lse, (H, G, n) float64, in the user's shape (..., n)."""
        return lse.reshape(self.shape[:-1])

    def from_user(self, dO: np.ndarray) -> np.ndarray:
        """An array of the shape of O, such as dO, as a contiguous (H, G, n, d_v or 1) in the dtype computed in."""
        problem = self.problem
        if self.shape[-1] == 0:
            return np.zeros(problem.q.shape[:3] + (1,), problem.q.dtype)
        if dO.dtype.itemsize == 2:
            dO = _halves.widened(dO, self.arguments.threads)
        dO = np.require(dO, problem.q.dtype, ["C", "A"])
        return dO.reshape(problem.q.shape[:3] + self.shape[-1:])

    def gradients(
        self, found: InputGradients, exponents: Exponents = AS_IT_IS, comm: Communicator = SERIAL
    ) -> dict[str, np.ndarray]:
        """The user's gradients, {"dQ": ..., "dW_Q": ...}, from an engine's, times the powers of two in `exponents`.

        The engine's arrays are overwritten. Every argument that was given has its gradient, in its shape and dtype.
        Gradients of what the pieces of a sequence share (projections, a bias, scale_near) are summed over all pieces.
        """
        a = self.arguments
        H, G, n, d = found.dq.shape
        with np.errstate(all="ignore"):
            of_q = np.repeat(exponents.q, G) if np.ndim(exponents.q) else exponents.q
            arrays = self._q.gradients(found.dq.reshape(H * G, n, d), of_q, comm)
            arrays |= self._k.gradients(found.dk, exponents.k, comm)
            arrays |= self._v.gradients(found.dv[..., : self.shape[-1]], exponents.v, comm)
            exponent = exponents.scores
            gradients = {"d" + name: self._cast(X) for name, X in arrays.items()}
            if a.near is not None:
                gradients["dscale_near"] = np.ldexp(comm.total(self._near_gradient(found.scale_near)), exponents.near)
            if a.bias is not None:
                gradients["dbias"] = self._bias_gradient(found.symbol, exponent, comm)
            if a.family is not None:
                gradients["dR"] = self._family_gradient(found.family, exponent)
        return gradients

    def bias_gradient(self, part: SymbolGradient | None) -> np.ndarray:
        """The gradient by the bias's parameters, from the gradient by its symbol or a part of it; None means 0."""
        a = self.arguments
        heads = 1 if a.bias.heads in (None, 1) else a.heads
        if part is None:
            return a.bias._gradient(None, 0, None)
        symbol, far = part.values, None
        if isinstance(symbol, FarGradient):
            far, symbol = symbol, symbol.symbol
            flow = far.flow.reshape(*far.flow.shape[:2], -1, heads).sum(axis=2)
            far = replace(far, flow=flow, moment=far.moment.reshape(2, -1, heads).sum(axis=1))
        if symbol is not None:
            symbol = symbol.reshape(-1, heads, symbol.shape[-1]).sum(axis=0)
        return a.bias._gradient(symbol, part.first, far)

    def _bias_gradient(self, parts: tuple[SymbolGradient, ...], exponent: int, comm: Communicator) -> np.ndarray:
        """The gradient by the bias's parameters, summed over the parts of all processes, times 2^exponent."""
        nothing = self.bias_gradient(None)
        own = nothing.astype(np.float64)
        for place, part in enumerate(parts):
            found = self.bias_gradient(part).astype(np.float64)
            own = own + found if place else found
        return np.ldexp(comm.total(own), exponent).astype(nothing.dtype)

    def _near_gradient(self, each: np.ndarray | None) -> np.ndarray:
        """The gradient by scale_near, in its shape, of this process, from that of each slot and query head, or 0."""
        one = not isinstance(self.arguments.near[1], tuple)
        each = np.zeros((1, self.heads)) if each is None else each.reshape(-1, self.heads)
        return each.sum() if one else each.sum(axis=0)

    def _family_gradient(self, entries: np.ndarray | None, exponent: int) -> np.ndarray:
        """The gradient by the matrices of a family, times 2^exponent; `entries` None means 0: no query sees a key."""
        a, family = self.arguments, self.problem.family
        if entries is None:
            entries = np.zeros((len(family.left), 0))
        entries = np.ldexp(entries, exponent) if exponent else entries
        return a.family._gradient(family.gradient(entries, -self.problem.mask.most))

    def _cast(self, X: np.ndarray) -> np.ndarray:
        if X.dtype == self.dtype:
            return X
        if X.dtype == np.float32:
            return _halves.narrowed(X, self.dtype, self.arguments.threads)
        with np.errstate(over="ignore"):
            return X.astype(self.dtype)


_DEFAULTS = {
    "W": None, "W_Q": None, "W_K": None, "W_V": None, "scale": None, "causal": False, "window": None, "near": None,
    "bias": None, "key_mask": None, "q_positions": None, "k_positions": None, "q_offset": 0, "lengths": None,
    "threads": None,
}
_HOW = {"eps": 1e-3, "certify": "proof", "method": "auto", "degree": None, "seed": None}


def check_forms(Q: Any, K: Any, V: Any, R: Any = None, **options: Any) -> tuple[Arguments, Request]:
    """The arguments of `attention`, checked except for the entries of arrays.

    Returns those that say what to compute, as `Arguments`, and those that say how to compute it, as `Request`.
    """
    request = Request(**check_method(**{name: options.pop(name, usual) for name, usual in _HOW.items()}))
    return check_arguments(Q, K, V, R, **_DEFAULTS | options), request


def check(Q: Any, K: Any, V: Any, R: Any = None, **options: Any) -> tuple[Arguments, Request]:
    """As `check_forms`, with the entries of arrays checked too."""
    arguments, request = check_forms(Q, K, V, R, **options)
    return check_entries(arguments), request


def prepare(Q: Any, K: Any, V: Any, R: Any = None, **options: Any) -> Call:
    """Check the arguments of `attention`, project, rotate and lay out: everything before the choice of an engine."""
    return Call(*check(Q, K, V, R, **options))


def prepare_for(function: str, Q: Any, K: Any, V: Any, R: Any, options: Mapping[str, Any]) -> Call:
    """`prepare` for a function that takes **options; a TypeError for a wrong keyword names that function."""
    check_names(function, options)
    return prepare(Q, K, V, R, **options)


def check_names(function: str, options: Mapping[str, Any]) -> None:
    """Raise TypeError, naming `function`, where there is a keyword that `attention` does not have."""
    unknown = [name for name in options if name not in _DEFAULTS and name not in _HOW]
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}")


def length_of(arguments: Arguments) -> int:
    """The largest position plus 1, at least 1: the length of text that rules of rotary scaling may depend on."""
    given = (p for p in (arguments.q_positions, arguments.k_positions) if p is not None and p.size)
    return max(1, 1 + max((int(p.max()) for p in given), default=0))


def key_heads_of(arguments: Arguments, least: int = 1) -> int:
    """The number of heads that may differ in keys, values or masks; query heads share them. A multiple of `least`."""
    a, heads = arguments, least
    for X, inner in ((a.K, 2), (a.W_K, 2), (a.V, 2), (a.W_V, 2), (a.key_mask, 1), (a.k_positions, 1)):
        if X is not None and X.ndim > inner and X.shape[-1 - inner] != heads:
            heads = math.lcm(heads, X.shape[-1 - inner])
    return heads


def spread_columns(X: np.ndarray, call: Call, heads: int) -> np.ndarray:
    """X (..., rows, m) as a contiguous (slots, rows, m), with `heads` slots for each batch element."""
    return contiguous(spread(X, call.lead[:-1], heads))


def _factors(given: dict[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    """The arrays in `given` that have one of these names, in the order of `names`."""
    found = {}
    for name in names:
        if name in given:
            found[name] = given[name]
    return found
