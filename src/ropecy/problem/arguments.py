"""Every check of the arguments of `attention` and of functions that take the same ones, with a message for each fault.

Checks come before any work, the cheap ones first: options, then types, shapes and the memory that these need, then the
entries of arrays. Checked arguments are returned as `Arguments`, in forms that need no further checks: arrays of the
dtype that is computed in, and a band of offsets for `causal` and `window`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..kernels import _halves
from ..machine.memory import require
from ..machine.threads import MOST_THREADS, default_threads
from ..relative import RelativeBias, RelativeFamily
from ..rotary import Rotary
from .checks import (
    as_pair,
    broadcasts,
    check_array,
    check_choice,
    check_eps,
    check_finite,
    check_flag,
    check_heads_of_near,
    check_integer,
    check_near,
    check_number,
    described,
    scales_of,
    without_repeats,
)
from .packed import Packed, check_lengths
from .request import METHODS

# The arguments that are arrays of floating-point numbers, in the order in which their entries are checked.
_ARRAYS = ("Q", "K", "V", "W", "W_Q", "W_K", "W_V")
_NO_ARRAYS = dict.fromkeys(_ARRAYS)

# For each dtype that is computed in, its largest finite number.
_LARGEST = {np.dtype(kind): float(np.finfo(kind).max) for kind in (np.float32, np.float64)}

# What each of Q, K and V is multiplied by, from the right and in this order.
_FACTORS = {"Q": ("W_Q", "W"), "K": ("W_K",), "V": ("W_V",)}


@dataclass(slots=True)
class Arguments:
    """Checked arguments of `attention`, with the defaults filled in.

    After `check_arguments` arrays are as they were given and their shapes fit together; after `check_entries` they are
    also finite and in the dtype computed in, `compute`. They keep their own leading axes, which broadcast to `lead`,
    that is ``batch + (heads,)``, or ``()`` where no array has leading axes. The keys that `causal` and `window` let row
    i see are those with lo <= j - (i + q_offset) <= hi, where lo or hi is None if there is no bound on that side.
    """

    Q: np.ndarray
    K: np.ndarray
    V: np.ndarray | None
    W: np.ndarray | None
    W_Q: np.ndarray | None
    W_K: np.ndarray | None
    W_V: np.ndarray | None
    R: Rotary | None
    family: RelativeFamily | None
    dtype: np.dtype
    compute: np.dtype
    lead: tuple[int, ...]
    n: int
    n_k: int
    d: int
    d_v: int
    scale: float
    near: tuple[int, float | tuple[float, ...]] | None
    lo: int | None
    hi: int | None
    q_offset: int
    bias: RelativeBias | None
    key_mask: np.ndarray | None
    q_positions: np.ndarray | None
    k_positions: np.ndarray | None
    threads: int
    packed: Packed | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The given ones of Q, K, V and the projections, by name, in the order in which their entries are checked."""
        found = {}
        every = (self.Q, self.K, self.V, self.W, self.W_Q, self.W_K, self.W_V)
        for name, X in zip(_ARRAYS, every, strict=True):
            if X is not None:
                found[name] = X
        return found

    def stretch(self, rows: slice, keys: slice, q_offset: int = 0, packed: Packed | None = None) -> Arguments:
        """The arguments of some of the rows and keys."""

        def of(X: np.ndarray | None, where: slice) -> np.ndarray | None:
            return None if X is None else X[..., where]

        return replace(
            self,
            Q=self.Q[..., rows, :],
            K=self.K[..., keys, :],
            V=None if self.V is None else self.V[..., keys, :],
            n=rows.stop - rows.start,
            n_k=keys.stop - keys.start,
            key_mask=of(self.key_mask, keys),
            q_positions=of(self.q_positions, rows),
            k_positions=of(self.k_positions, keys),
            q_offset=q_offset,
            packed=packed,
        )

    @property
    def plain(self) -> bool:
        """Whether nothing but scores, masks and values is asked for: no rotation, projection, bias or near field."""
        return (
            self.V is not None and self.R is None and self.family is None and self.bias is None and self.near is None
            and self.W is None and self.W_Q is None and self.W_K is None and self.W_V is None
        )  # fmt: skip

    @property
    def batch(self) -> tuple[int, ...]:
        return self.lead[:-1]

    @property
    def heads(self) -> int:
        return self.lead[-1] if self.lead else 1


def check_arguments(Q: Any, K: Any, V: Any, R: Any, **options: Any) -> Arguments:
    """The arguments of `attention`, checked except for the entries of arrays, which `check_entries` checks.

    Parameters
    ----------
    Q, K, V, R
        As `attention` takes them; ``V=None`` where no values are needed.
    options
        All keyword arguments of `attention` that say what is computed: W, W_Q, W_K, W_V, scale, causal, window, near,
        bias, key_mask, q_positions, k_positions, q_offset, lengths and threads.
    """
    simple = _check_simple(R, options)
    factors = {"W": options["W"], "W_Q": options["W_Q"], "W_K": options["W_K"], "W_V": options["W_V"]}
    given = _check_arrays({"Q": Q, "K": K, "V": V} | factors)
    shapes = _check_shapes(given)
    dtype, (n, d), (n_k, d_v) = given["Q"].dtype, shapes["Q"][-2:], shapes["V"][-2:]
    R, family = simple["R"], simple["family"]
    if R is not None and R.d != d:
        raise ValueError(f"R: got a Rotary of width {R.d}, wants {d}, the width of what meets in the score")
    if family is not None:
        _check_family(family, d, n, n_k)
    lead = _lead(shapes)
    bias = simple["bias"]
    if bias is not None and bias.heads not in (None, 1) and (not lead or bias.heads != lead[-1]):
        heads = lead[-1] if lead else "none: Q, K and V have no head axis"
        raise ValueError(f"bias: got one for each of {bias.heads} heads, wants heads as Q has ({heads})")
    check_heads_of_near(simple["near"], lead[-1] if lead else 1)
    compute = _computed(dtype)
    key_mask, q_positions, k_positions = options["key_mask"], options["q_positions"], options["k_positions"]
    if key_mask is not None:
        key_mask = _key_mask(key_mask, lead, n_k)
    packed = None
    if options["lengths"] is not None:
        if family is not None:
            raise NotImplementedError("R: got a RelativeFamily, which packed sequences (lengths) do not have")
        packed = check_lengths(options["lengths"], options["q_offset"], n, n_k)
    if R is not None:
        q_positions = _positions("q_positions", q_positions, lead, n)
        k_positions = _positions("k_positions", k_positions, lead, n_k)
        if q_positions is None:
            q_positions = np.arange(n) + simple["q_offset"] if packed is None else packed.q_positions
        if k_positions is None:
            k_positions = np.arange(n_k) if packed is None else packed.k_positions
    return Arguments(
        **_NO_ARRAYS | given,
        **simple,
        dtype=dtype,
        compute=compute,
        lead=lead,
        n=n,
        n_k=n_k,
        d=d,
        d_v=d_v,
        scale=_check_scale(options["scale"], simple["near"], d, compute),
        key_mask=key_mask,
        q_positions=q_positions,
        k_positions=k_positions,
        packed=packed,
    )


def _check_simple(R: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Arguments` that can be checked without looking at an array."""
    # Of packed sequences each has its own; it is checked with their lengths.
    q_offset = check_integer("q_offset", options["q_offset"]) if options["lengths"] is None else 0
    threads, near, bias = options["threads"], options["near"], options["bias"]
    threads = default_threads() if threads is None else min(check_integer("threads", threads, least=1), MOST_THREADS)
    lo, hi = band(check_flag("causal", options["causal"]), options["window"])
    if near is not None:
        near = check_near(near)
    family = None
    if R is not None and isinstance(R, RelativeFamily):
        family, R = R, None
    if R is not None and not isinstance(R, Rotary):
        raise TypeError(f"R: got {described(R)}, wants a ropecy.Rotary, a ropecy.RelativeFamily or None")
    if bias is not None and not isinstance(bias, RelativeBias):
        raise TypeError(f"bias: got {described(bias)}, wants a ropecy.RelativeBias or None")
    for name in ("q_positions", "k_positions"):
        if options[name] is not None and R is None:
            raise ValueError(f"{name}: got positions without a rotation, wants R=ropecy.Rotary(...) beside them")
    return {
        "R": R, "family": family, "near": near, "lo": lo, "hi": hi, "q_offset": q_offset, "bias": bias,
        "threads": threads,
    }  # fmt: skip


def _check_arrays(given: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays among Q, K, V and the projections that are not None, by name, checked to be of one dtype."""
    if given["V"] is None and given["W_V"] is not None:
        raise ValueError("W_V: got a projection without V, wants both or neither")
    arrays = {}
    for name in given:
        if name in ("Q", "K") or given[name] is not None:
            arrays[name] = check_array(name, given[name])
    dtype = arrays["Q"].dtype
    for name in arrays:
        if arrays[name].dtype != dtype:
            raise TypeError(f"{name}: got dtype {arrays[name].dtype}, wants {dtype} as Q has")
    return arrays


def _check_shapes(given: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """The shapes of Q, K and V after their projections, if they fit together; (n_k, 1) for V where it is not given."""
    n_k = given["K"].shape[-2]
    shapes = _product_shapes(given)
    if "V" not in shapes:
        shapes["V"] = (n_k, 1)
    Q, K, V = shapes["Q"], shapes["K"], shapes["V"]
    d = K[-1]
    if Q[-1] != d:
        raise ValueError(f"K: got rows of width {d} (after W_K), wants {Q[-1]}, the width of Q (after W_Q and W)")
    if d == 0:
        raise ValueError(f"Q: got shape {given['Q'].shape}, wants rows with at least one entry to form scores from")
    if V[-2] != n_k:
        raise ValueError(f"V: got {V[-2]} rows (shape {given['V'].shape}), wants {n_k}, one for each of K")
    return shapes


def _check_memory(given: dict[str, np.ndarray], lead: tuple[int, ...], compute: np.dtype, *, turned: bool) -> None:
    """MemoryError where the result, and the copies of Q, K and V that `_laid_out` counts, don't fit into memory."""
    shapes = _product_shapes(given)
    laid_out = _laid_out(given, shapes, lead, compute, turned=turned)
    if "V" not in given:
        require(laid_out, "a copy of Q and K in the order of memory that is computed in")
    else:
        shape = lead + (shapes["Q"][-2], shapes["V"][-1])
        result = math.prod(shape) * given["Q"].dtype.itemsize
        require(result + laid_out, f"the result, of shape {shape}, with what is copied of Q, K and V")


def _check_scale(scale: Any, near: tuple[int, float | tuple[float, ...]] | None, d: int, compute: np.dtype) -> float:
    """The scale of scores, 1/d by default. It and the scales of near offsets must be finite in the dtype `compute`."""
    scale = 1 / d if scale is None else check_number("scale", scale)
    most, scales = _LARGEST[compute], () if near is None else scales_of(near)
    for number in (scale, *scales):
        if not -most <= number <= most:
            name = "scale" if number is scale else "near"
            raise ValueError(f"{name}: got {number}, wants a number that {compute} can hold")
    if not scales:
        return scale
    # One power of two keeps the scores of all heads from overflow.
    room, largest = most**0.75, max(scales, key=abs)
    if len(set(scales)) > 1 and abs(largest) > room:
        raise ValueError(f"near: got {largest} beside other scales, wants at most {room:.3g} where heads differ")
    return scale


def _computed(dtype: np.dtype) -> np.dtype:
    """The dtype that is computed in for arrays of the dtype `dtype`."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def check_entries(a: Arguments) -> Arguments:
    """The arguments with arrays of finite numbers in the dtype computed in.

    Keys and values that the key mask hides from all rows are replaced by 0, and may have been NaN or Inf.

    Raises
    ------
    MemoryError
        The result, and the copies of arrays that it needs, don't fit into memory.
    ValueError
        An array has NaN or Inf; the message says where the first one is.
    """
    given, compute = a.arrays, a.compute
    _check_memory(given, a.lead, compute, turned=a.R is not None)
    if a.key_mask is not None:
        given.update({name: _hide(given[name], a.key_mask, a.lead) for name in ("K", "V") if name in given})
    if a.dtype != compute:
        given = {name: _halves.widened(X, a.threads) for name, X in given.items()}
    for name in given:
        check_finite(name, given[name], a.threads)
    return a if a.key_mask is None and a.dtype == compute else replace(a, **given)


def check_method(*, eps: Any, certify: Any, method: Any, degree: Any, seed: Any) -> dict[str, Any]:
    """The arguments of `attention` that say how to compute, checked, by name."""
    eps = check_eps(eps)
    check_choice("certify", certify, ("proof", "sample"))
    check_choice("method", method, tuple(METHODS))
    if degree is not None:
        degree = check_integer("degree", degree, least=0)
    if seed is not None:
        seed = check_integer("seed", seed, least=0)
    return {"eps": eps, "certify": certify, "method": method, "degree": degree, "seed": seed}


def band(causal: bool, window: Any) -> tuple[int | None, int | None]:
    """(lo, hi) with lo <= j - (i + q_offset) <= hi for the keys that ``causal`` and ``window`` both allow."""
    lo, hi = None, (0 if causal else None)
    if window is None:
        return lo, hi
    if isinstance(window, (tuple, list)):
        sides = as_pair(window)
        if sides is None:
            raise ValueError(f"window: got {len(window)} numbers, wants one, or a pair (left, right)")
        left, right = (check_integer("window", side, least=0) for side in sides)
        return -left, (min(right, 0) if causal else right)
    return 1 - check_integer("window", window, least=1), 0


def _check_family(family: RelativeFamily, d: int, n: int, n_k: int) -> None:
    """Raise unless the family fits rows of width d, and n queries and n_k keys.

    A family that was made with n_k of its own says which matrix is W_0, and fits any number of queries and keys.
    """
    if family._width > d or (family._dense and family._width < d):
        got = f"width {family._width}" if family._dense else f"a support with the index {family._width - 1}"
        wants = f"{d}" if family._dense else f"indices below {d}"
        raise ValueError(f"R: got a RelativeFamily of {got}, wants {wants}, the width of what meets in the score")
    M = len(family._values)
    if family.n_k is None and n and n_k and n + n_k - 1 != M:
        raise ValueError(
            f"R: got a RelativeFamily of {M} offsets, wants n + n_k - 1 = {n + n_k - 1} for {n} queries and {n_k} "
            "keys, or RelativeFamily(values, n_k=...), which says where W_0 is"
        )


def _product_shapes(given: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """By name, the shapes that the given ones of Q, K and V have after multiplying them by their given projections."""
    shapes = {}
    for rows in ("Q", "K", "V"):
        if rows in given:
            shapes[rows] = given[rows].shape
            for name in _FACTORS[rows]:
                if name in given:
                    shapes[rows] = _product_shape(rows, shapes[rows], name, given[name].shape)
    return shapes


def _product_shape(rows: str, shape: tuple[int, ...], name: str, factor: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the product of the array named `rows` (Q, K or V) and the projection named `name`."""
    if factor[-2] != shape[-1]:
        raise ValueError(
            f"{name}: got shape {factor}, wants ({shape[-1]}, _) to multiply {rows}, of width {shape[-1]} there"
        )
    try:
        lead = np.broadcast_shapes(shape[:-2], factor[:-2])
    except ValueError:
        raise ValueError(
            f"{name}: got leading axes {factor[:-2]}, wants axes that broadcast with {shape[:-2]} of {rows}"
        ) from None
    return lead + (shape[-2], factor[-1])


def _lead(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The leading axes of the result: those of Q, K and V, broadcast. The heads of K and V may divide those of Q."""
    if shapes["Q"][:-2] == shapes["K"][:-2] == shapes["V"][:-2]:
        return shapes["Q"][:-2]
    leads = {name: shape[:-2] for name, shape in shapes.items()}
    own = {name: lead[-1] if lead else 1 for name, lead in leads.items()}
    heads = next((h for h in own.values() if h != 1), 1)
    for name in ("K", "V"):
        if own[name] != heads and (own[name] == 0 or heads % own[name]):
            raise ValueError(
                f"{name}: got {own[name]} heads (shape {shapes[name]}), wants a divisor of the {heads} heads of Q"
            )
    batches = {lead[:-1] for lead in leads.values()}
    if len(batches) == 1:
        return batches.pop() + (heads,)
    try:
        return np.broadcast_shapes(*batches) + (heads,)
    except ValueError:
        raise ValueError(
            f"Q, K, V: got leading axes {leads['Q']}, {leads['K']} and {leads['V']}, wants axes that broadcast"
        ) from None


def _laid_out(
    given: dict[str, np.ndarray],
    projected: dict[str, tuple[int, ...]],
    lead: tuple[int, ...],
    compute: np.dtype,
    *,
    turned: bool,
) -> float:
    """Bytes of the copies of Q, K and V that are made: contiguous rows for each head, in the dtype `compute`.

    An array is copied where it is projected, rotated (`turned`), of another dtype, not contiguous, or has fewer leading
    axes than the result.
    """
    size = 0.0
    multiplied = {"Q": "W_Q" in given or "W" in given, "K": "W_K" in given, "V": "W_V" in given}
    for name in projected:
        X, shape = given[name], projected[name]
        # K and V keep their own number of heads, each shared by several of Q.
        own = lead if name == "Q" or not lead else lead[:-1] + shape[:-2][-1:]
        as_it_is = X.shape[:-2] == own and X.flags.c_contiguous and X.dtype == compute
        if not as_it_is or (turned and name != "V") or multiplied[name]:
            size += float(math.prod(own + shape[-2:])) * compute.itemsize
    return size


def _row_shape(name: str, shape: tuple[int, ...], lead: tuple[int, ...], length: int) -> None:
    """Raise unless an array with a number for each row has the shape (length,) or all leading axes before `length`.

    If it had only some of the leading axes, it would not be clear which ones are meant.
    """
    if shape == (length,):
        return
    if len(shape) == len(lead) + 1 and broadcasts(shape[:-1], lead) and shape[-1] == length:
        return
    wants = f"({length},)"
    if lead:
        wants += f" or {lead + (length,)} (leading axes may be 1)"
        if len(shape) == len(lead) and len(shape) > 1 and shape[:-1] == lead[:-1] and shape[-1] == length:
            wants += f"; for one row in each batch element, {lead[:-1] + (1, length)}"
            wants += f" by {name}[..., None, :], as (b, 1, n_k) beside Q (b, h, n, d)"
    raise ValueError(f"{name}: got shape {shape}, wants {wants}")


def _key_mask(key_mask: Any, lead: tuple[int, ...], n_k: int) -> np.ndarray | None:
    """The key mask, if its shape fits; None where it hides no key."""
    key_mask = np.asarray(key_mask)
    if key_mask.dtype != np.bool_:
        raise TypeError(f"key_mask: got dtype {key_mask.dtype}, wants bool, True for a key that is kept")
    _row_shape("key_mask", key_mask.shape, lead, n_k)
    return None if without_repeats(key_mask).all() else key_mask


def _positions(name: str, positions: Any, lead: tuple[int, ...], length: int) -> np.ndarray | None:
    """Positions as int64, if their shape fits; None where none are given."""
    if positions is None:
        return None
    positions = np.asarray(positions)
    if positions.dtype.kind not in "iu" and positions.size:
        raise TypeError(f"{name}: got dtype {positions.dtype}, wants integers")
    _row_shape(name, positions.shape, lead, length)
    if positions.dtype.kind == "u" and positions.size and int(positions.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: got {positions.max()}, wants integers below 2**63")
    return positions.astype(np.int64)


def _hide(X: np.ndarray, key_mask: np.ndarray, lead: tuple[int, ...]) -> np.ndarray:
    """A copy of X, which is K or V before projection, with 0 in the rows that are hidden from every head using them."""
    kept = np.broadcast_to(key_mask, lead + key_mask.shape[-1:])
    own = X.shape[:-2]
    if lead:
        # A row of X is kept if it is kept for any of the query heads and batch elements that share it.
        heads = own[-1] if own else 1
        kept = kept.reshape(lead[:-1] + (heads, lead[-1] // max(heads, 1)) + kept.shape[-1:]).any(axis=-2)
        own = (1,) * (len(lead) - len(own)) + own
        shared = tuple(a for a, size in enumerate(own) if size == 1 < lead[a])
        kept = kept.any(axis=shared, keepdims=True).reshape(X.shape[:-1])
    return np.where(kept[..., None], X, np.zeros((), X.dtype))
