"""Every check of what a user passes, with its message: which argument, what it got, what it wants.

Checks come before any work, the cheap ones first: options, then types and shapes and the memory that these ask for,
then the values of arrays. What passes comes back in plain forms (arrays of the dtype computed in, a band instead of
masks) that nothing checks again.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import _cgroup
from .kernels import _rows
from .memory import require
from .relative import RelativeBias, RelativeFamily
from .rotary import Rotary

# Past this many threads the operating system, not the arithmetic, sets the pace. Results don't depend on the number.
_MOST_THREADS = 256

# The arguments that are arrays of floating-point numbers, in the order in which their entries are checked.
_ARRAYS = ("Q", "K", "V", "W", "W_Q", "W_K", "W_V")


@dataclass(slots=True)
class Arguments:
    """Checked arguments: shapes agreed upon, masks by index as one band, arrays as they were given, or, after
    `check_entries`, finite and in the dtype computed in.

    ``Q``, ``K``, ``V`` and the projections keep their own leading axes; ``batch + (heads,)`` is what these broadcast
    to (``lead`` is that, or ``()`` where no array has leading axes).
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
    lead: tuple[int, ...]
    n: int
    n_k: int
    d: int
    d_v: int
    scale: float
    near: tuple[int, float] | None
    lo: int | None
    hi: int | None
    q_offset: int
    bias: RelativeBias | None
    key_mask: np.ndarray | None
    q_positions: np.ndarray | None
    k_positions: np.ndarray | None
    threads: int

    @property
    def compute(self) -> np.dtype:
        """The dtype computed in."""
        return np.dtype(np.float64 if self.dtype == np.float64 else np.float32)

    @property
    def batch(self) -> tuple[int, ...]:
        return self.lead[:-1]

    @property
    def heads(self) -> int:
        return self.lead[-1] if self.lead else 1


def check_arguments(
    Q: Any,
    K: Any,
    V: Any,
    R: Any,
    *,
    W: Any,
    W_Q: Any,
    W_K: Any,
    W_V: Any,
    scale: Any,
    causal: Any,
    window: Any,
    near: Any,
    bias: Any,
    key_mask: Any,
    q_positions: Any,
    k_positions: Any,
    q_offset: Any,
    threads: Any,
) -> Arguments:
    """What the arguments of `attention` say of the numbers, checked but for the entries of arrays (`check_entries`);
    ``V=None`` where no values are meant.
    """
    q_offset = _integer("q_offset", q_offset)
    threads = _threads(threads)
    lo, hi = band(check_flag("causal", causal), window)
    if near is not None:
        near = _near(near)
    family, R = (R, None) if isinstance(R, RelativeFamily) else (None, R)
    if R is not None and not isinstance(R, Rotary):
        raise TypeError(f"R: got {_kind(R)}, wants a ropecy.Rotary, a ropecy.RelativeFamily or None")
    if bias is not None and not isinstance(bias, RelativeBias):
        raise TypeError(f"bias: got {_kind(bias)}, wants a ropecy.RelativeBias or None")
    for name, positions in (("q_positions", q_positions), ("k_positions", k_positions)):
        if positions is not None and R is None:
            raise ValueError(f"{name}: got positions without a rotation, wants R=ropecy.Rotary(...) beside them")

    given = {"Q": Q, "K": K, "V": V, "W": W, "W_Q": W_Q, "W_K": W_K, "W_V": W_V}
    if V is None and W_V is not None:
        raise ValueError("W_V: got a projection without V, wants both or neither")
    given = {name: _array(name, X) for name, X in given.items() if name in ("Q", "K") or X is not None}
    dtype = given["Q"].dtype
    for name, X in given.items():
        if X.dtype != dtype:
            raise TypeError(f"{name}: got dtype {X.dtype}, wants {dtype} as Q has")
    n, n_k = given["Q"].shape[-2], given["K"].shape[-2]
    projected = {
        "Q": _product_shape(given, "Q", "W_Q", "W"),
        "K": _product_shape(given, "K", "W_K"),
        "V": _product_shape(given, "V", "W_V") if V is not None else (n_k, 1),
    }
    d = projected["K"][-1]
    if projected["Q"][-1] != d:
        raise ValueError(
            f"K: got rows of width {d} (after W_K), wants {projected['Q'][-1]}, the width of Q (after W_Q and W)"
        )
    if d == 0:
        raise ValueError(f"Q: got shape {given['Q'].shape}, wants rows with at least one entry to form scores from")
    if projected["V"][-2] != n_k:
        raise ValueError(f"V: got {projected['V'][-2]} rows (shape {given['V'].shape}), wants {n_k}, one for each of K")
    if R is not None and R.d != d:
        raise ValueError(f"R: got a Rotary of width {R.d}, wants {d}, the width of what meets in the score")
    if family is not None:
        _fits(family, d, n, n_k)
    lead = _lead(projected)
    if bias is not None and bias.heads not in (None, 1) and (not lead or bias.heads != lead[-1]):
        heads = lead[-1] if lead else "none: Q, K and V have no head axis"
        raise ValueError(f"bias: got one for each of {bias.heads} heads, wants heads as Q has ({heads})")
    compute = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    laid_out = _laid_out(given, projected, lead, compute, turned=R is not None)
    if V is None:
        require(laid_out, "a copy of Q and K in the order of memory that is computed in")
    else:
        shape = lead + (n, projected["V"][-1])
        result = math.prod(shape) * dtype.itemsize
        require(result + laid_out, f"the result, of shape {shape}, with what is copied of Q, K and V")
    if key_mask is not None:
        key_mask = _key_mask(key_mask, lead, n_k)
    if R is not None:
        q_positions = _positions("q_positions", q_positions, lead, n, start=q_offset)
        k_positions = _positions("k_positions", k_positions, lead, n_k)

    scale = 1 / d if scale is None else _real("scale", scale)
    largest = np.finfo(compute).max
    for name, number in (("scale", scale), ("near", 0.0 if near is None else near[1])):
        if abs(number) > largest:
            raise ValueError(f"{name}: got {number}, wants a number that {compute} can hold")
    return Arguments(
        **{name: given.get(name) for name in _ARRAYS},
        R=R,
        family=family,
        dtype=dtype,
        lead=lead,
        n=n,
        n_k=n_k,
        d=d,
        d_v=projected["V"][-1],
        scale=scale,
        near=near,
        lo=lo,
        hi=hi,
        q_offset=q_offset,
        bias=bias,
        key_mask=key_mask,
        q_positions=q_positions,
        k_positions=k_positions,
        threads=threads,
    )


def check_entries(a: Arguments) -> Arguments:
    """The arguments with arrays of finite numbers in the dtype computed in, keys and values that no mask keeps being 0.

    Raises
    ------
    ValueError
        NaN or Inf, and where the first one is.
    """
    given = {name: X for name in _ARRAYS if (X := getattr(a, name)) is not None}
    if a.key_mask is not None:
        given.update({name: _hide(given[name], a.key_mask, a.lead) for name in ("K", "V") if name in given})
    for name, X in given.items():
        check_finite(name, X)
    compute = a.compute
    changed = {name: X.astype(compute, copy=False) for name, X in given.items() if X.dtype != compute}
    if a.key_mask is not None:
        changed = given | changed
    return replace(a, **changed) if changed else a


def check_method(*, eps: Any, certify: Any, method: Any, degree: Any, seed: Any) -> dict[str, Any]:
    """What the arguments of `attention` say of how to compute, checked: the keyword arguments of ``plan.make_plan``."""
    eps = _eps(eps)
    _choice("certify", certify, ("proof", "sample"))
    _choice("method", method, ("auto", "exact", "polynomial", "fft"))
    if degree is not None:
        degree = _integer("degree", degree, least=0)
    if seed is not None:
        seed = _integer("seed", seed, least=0)
    return {"eps": eps, "certify": certify, "method": method, "degree": degree, "seed": seed}


def check_flag(name: str, value: Any) -> bool:
    """A bool, as itself: what merely looks true is more often a slip than meant."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {_kind(value)}, wants True or False")
    return bool(value)


def check_count(name: str, value: Any) -> int:
    """The integer if it is one of at least 1, else TypeError or ValueError."""
    return _integer(name, value, least=1)


def check_like(name: str, X: Any, dtype: np.dtype, shape: tuple[int, ...], *, broadcast: bool = False) -> np.ndarray:
    """X with the dtype and shape of the result it stands beside; ``broadcast`` lets leading axes be 1 or missing."""
    X = _array(name, X)
    if X.dtype != dtype:
        raise TypeError(f"{name}: got dtype {X.dtype}, wants {dtype} as Q has")
    wanted = X.shape[-2:] == shape[-2:] and _broadcasts(X.shape, shape) if broadcast else X.shape == shape
    if not wanted:
        raise ValueError(f"{name}: got shape {X.shape}, wants {shape}, the shape of the result")
    return X


def check_values(V: Any) -> None:
    """V itself, where inside `check_arguments` no V has a meaning of its own."""
    if V is None:
        raise TypeError("V: got None, wants an array (..., n_k, d_v)")


def check_factor(X: Any, dtype: np.dtype, lead: tuple[int, ...], length: int, axis: int = -2) -> np.ndarray:
    """X, that a matrix with the leading axes `lead` is multiplied with: (length,), or an array whose axis `axis`, -2 of
    a factor on the right and -1 of one on the left, has that length.
    """
    X = _array("X", X, least_axes=1)
    if X.dtype != dtype:
        raise TypeError(f"X: got dtype {X.dtype}, wants {dtype} as Q has")
    leads_fit = X.ndim < 3 or _broadcasts(X.shape[:-2], lead)
    if X.shape[axis if X.ndim > 1 else 0] != length or not leads_fit:
        rows = f"{length}, m" if axis == -2 else f"m, {length}"
        raise ValueError(f"X: got shape {X.shape}, wants ({length},) or (..., {rows}), leading axes as in {lead}")
    check_finite("X", X)
    return X


def check_real(name: str, X: Any, dtype: np.dtype) -> np.ndarray:
    """X, real numbers of any dtype, rounded to `dtype`."""
    X = np.asarray(X)
    if X.dtype.kind not in "biuf" and X.dtype.name != "bfloat16":
        raise TypeError(f"{name}: got dtype {X.dtype}, wants real numbers")
    with np.errstate(over="ignore"):
        return X.astype(dtype, copy=False)


def check_number(name: str, value: Any) -> float:
    """A finite real number, as a float."""
    return _real(name, value)


def check_finite(name: str, X: np.ndarray) -> float:
    """max |X|, 0 for an empty X; NaN and Inf are refused, saying where the first one is."""
    if X.size == 0:
        return 0.0
    if 0 in X.strides:
        X = _once(X)
    if X.dtype in (np.float32, np.float64) and X.flags.forc and X.flags.aligned:
        largest = _rows.largest(X)
    else:
        # Two passes and no temporary array; NaN goes through max and min.
        with np.errstate(invalid="ignore"):
            largest = max(float(X.max()), -float(X.min()))
    if not math.isfinite(largest):
        index = tuple(int(a) for a in np.argwhere(~np.isfinite(X))[0])
        got = "NaN" if np.isnan(X[index]) else "Inf" if X[index] > 0 else "-Inf"
        raise ValueError(f"{name}: got {got} at index {index}, wants finite numbers only")
    return largest


def _once(X: np.ndarray) -> np.ndarray:
    """X without the repetitions of an axis that was broadcast by a stride of 0, which is left with size 1."""
    return X[tuple(slice(1) if stride == 0 else slice(None) for stride in X.strides)]


def default_threads() -> int:
    """OMP_NUM_THREADS, else the CPUs that the process may use: those of its affinity, within its quota."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isascii() and first.isdigit() and int(first) > 0:
        return min(int(first), _MOST_THREADS)
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(1, math.ceil(min(available, _cgroup.cpus()))), _MOST_THREADS)


def _threads(threads: Any) -> int:
    if threads is None:
        return default_threads()
    return min(_integer("threads", threads, least=1), _MOST_THREADS)


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r}" if np.ndim(value) == 0 else type(value).__name__


def _integer(name: str, value: Any, least: int | None = None) -> int:
    wants = "an integer" if least is None else f"an integer of at least {least}"
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {_kind(value)}, wants {wants}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {_kind(value)}, wants {wants}") from None
    if least is not None and number < least:
        raise ValueError(f"{name}: got {number}, wants {wants}")
    if abs(number) > 2**62:
        raise ValueError(f"{name}: got {number}, wants {wants} of less than 63 bits")
    return number


def _real(name: str, value: Any) -> float:
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (float, numbers.Real, np.floating)):
        raise TypeError(f"{name}: got {_kind(value)}, wants a real number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: got {value}, wants a finite number (no NaN, no Inf)")
    return number


def _eps(eps: Any) -> float:
    eps = _real("eps", eps)
    if not 0 < eps < 1:
        raise ValueError(f"eps: got {eps}, wants a number between 0 and 1, both excluded")
    return eps


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{name}: got {_kind(value)}, wants one of {', '.join(map(repr, choices))}")


def _pair(value: Any) -> tuple[Any, Any] | None:
    return tuple(value) if isinstance(value, (tuple, list)) and len(value) == 2 else None


def band(causal: bool, window: Any) -> tuple[int | None, int | None]:
    """(lo, hi) with lo <= j - (i + q_offset) <= hi for the keys that ``causal`` and ``window`` both allow."""
    lo, hi = None, (0 if causal else None)
    if window is None:
        return lo, hi
    if isinstance(window, (tuple, list)):
        sides = _pair(window)
        if sides is None:
            raise ValueError(f"window: got {len(window)} numbers, wants one, or a pair (left, right)")
        left, right = (_integer("window", side, least=0) for side in sides)
        return -left, (min(right, 0) if causal else right)
    return 1 - _integer("window", window, least=1), 0


def _fits(family: RelativeFamily, d: int, n: int, n_k: int) -> None:
    """A family beside rows of width d, and its values beside n queries and n_k keys where it says nothing of them."""
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


def _near(near: Any) -> tuple[int, float]:
    pair = _pair(near)
    if pair is None:
        raise TypeError(f"near: got {_kind(near)}, wants a pair (w, scale_near)")
    return _integer("near", pair[0], least=1), _real("near", pair[1])


def _array(name: str, X: Any, least_axes: int = 2) -> np.ndarray:
    """X as an array of a floating dtype that is computed in or read: native byte order, any strides."""
    try:
        X = np.asarray(X)
    except ValueError as error:
        raise ValueError(f"{name}: got what is no array ({error}), wants an array of floating-point numbers") from None
    native = _floating(name, X.dtype)
    if X.ndim < least_axes:
        raise ValueError(f"{name}: got shape {X.shape}, wants at least {least_axes} axes (..., rows, width)")
    return X if X.dtype == native else X.astype(native)


def _floating(name: str, dtype: Any) -> np.dtype:
    """A dtype that is computed in or read, in native byte order."""
    try:
        native = np.dtype(dtype).newbyteorder("=")
    except TypeError:
        raise TypeError(f"{name}: got {_kind(dtype)}, wants a dtype: float32, float64, float16 or bfloat16") from None
    if native not in (np.float16, np.float32, np.float64) and native.name != "bfloat16":
        raise TypeError(f"{name}: got dtype {dtype}, wants float32 or float64 (or float16, bfloat16)")
    return native


def _product_shape(given: dict[str, np.ndarray], *names: str) -> tuple[int, ...]:
    """The shape of X @ W_X @ ... of those that are given."""
    shape = given[names[0]].shape
    for name in names[1:]:
        if name not in given:
            continue
        factor = given[name].shape
        if factor[-2] != shape[-1]:
            raise ValueError(
                f"{name}: got shape {factor}, wants ({shape[-1]}, _) to multiply {names[0]}, of width {shape[-1]} there"
            )
        try:
            lead = np.broadcast_shapes(shape[:-2], factor[:-2])
        except ValueError:
            raise ValueError(
                f"{name}: got leading axes {factor[:-2]}, wants axes that broadcast with {shape[:-2]} of {names[0]}"
            ) from None
        shape = lead + (shape[-2], factor[-1])
    return shape


def _lead(shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The leading axes of the result: broadcast, where the heads of K and V may divide those of Q."""
    leads = {name: shape[:-2] for name, shape in shapes.items()}
    if len(set(leads.values())) == 1:
        return leads["Q"]
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
    """Bytes of those of Q, K, V that are copied into contiguous rows for each head: projected, `turned` by a Rotary,
    of another dtype, or in another order or with fewer leading axes than the result.
    """
    size = 0.0
    for name, projections in (("Q", ("W_Q", "W")), ("K", ("W_K",)), ("V", ("W_V",))):
        if name not in given:
            continue
        X, shape = given[name], projected[name]
        # Heads of K and V are shared by those of Q.
        own = lead if name == "Q" or not lead else lead[:-1] + shape[:-2][-1:]
        as_it_is = X.shape[:-2] == own and X.flags.c_contiguous and X.dtype == compute
        if not as_it_is or (turned and name != "V") or given.keys() & projections:
            size += float(math.prod(own + shape[-2:])) * compute.itemsize
    return size


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))


def _row_shape(name: str, shape: tuple[int, ...], lead: tuple[int, ...], length: int) -> None:
    """One axis, or all leading axes beside it: anything between would guess which axis is meant."""
    if shape == (length,):
        return
    if len(shape) == len(lead) + 1 and _broadcasts(shape[:-1], lead) and shape[-1] == length:
        return
    wants = f"({length},)"
    if lead:
        wants += f" or {lead + (length,)} (leading axes may be 1)"
        if len(shape) == len(lead) and len(shape) > 1 and shape[:-1] == lead[:-1] and shape[-1] == length:
            wants += f"; for one row in each batch element, {lead[:-1] + (1, length)}"
            wants += f" by {name}[..., None, :], as (b, 1, n_k) beside Q (b, h, n, d)"
    raise ValueError(f"{name}: got shape {shape}, wants {wants}")


def _key_mask(key_mask: Any, lead: tuple[int, ...], n_k: int) -> np.ndarray | None:
    """The mask with all leading axes or none; None where it hides nothing."""
    key_mask = np.asarray(key_mask)
    if key_mask.dtype != np.bool_:
        raise TypeError(f"key_mask: got dtype {key_mask.dtype}, wants bool, True for a key that is kept")
    _row_shape("key_mask", key_mask.shape, lead, n_k)
    return None if _once(key_mask).all() else key_mask


def _positions(name: str, positions: Any, lead: tuple[int, ...], length: int, start: int = 0) -> np.ndarray:
    """int64 positions with all leading axes or none."""
    if positions is None:
        return np.arange(start, start + length, dtype=np.int64)
    positions = np.asarray(positions)
    if positions.dtype.kind not in "iu" and positions.size:
        raise TypeError(f"{name}: got dtype {positions.dtype}, wants integers")
    _row_shape(name, positions.shape, lead, length)
    if positions.dtype.kind == "u" and positions.size and int(positions.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{name}: got {positions.max()}, wants integers below 2**63")
    return positions.astype(np.int64)


def _hide(X: np.ndarray, key_mask: np.ndarray, lead: tuple[int, ...]) -> np.ndarray:
    """A copy of X (K or V, before projection) where rows that no mask keeps are 0: they are never read further."""
    kept = np.broadcast_to(key_mask, lead + key_mask.shape[-1:])
    own = X.shape[:-2]
    if lead:
        # The mask of the heads that share a row of X, then of the batch elements that do.
        heads = own[-1] if own else 1
        kept = kept.reshape(lead[:-1] + (heads, lead[-1] // max(heads, 1)) + kept.shape[-1:]).any(axis=-2)
        own = (1,) * (len(lead) - len(own)) + own
        shared = tuple(a for a, size in enumerate(own) if size == 1 < lead[a])
        kept = kept.any(axis=shared, keepdims=True).reshape(X.shape[:-1])
    return np.where(kept[..., None], X, np.zeros((), X.dtype))
