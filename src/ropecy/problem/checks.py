"""Checks of single values that a user passes: numbers, choices and arrays, with the messages of their errors.

A message names the argument, what it got and what it wants. A wrong type is a TypeError, a wrong value a ValueError.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import numpy as np

from ..kernels import _rows

# The dtypes that computations are done in, in native byte order.
_COMPUTED = (np.dtype(np.float32), np.dtype(np.float64))


def described(value: Any) -> str:
    """A value as messages show it: its type, and the value itself unless it is an array."""
    alone = not isinstance(value, (tuple, list)) and np.ndim(value) == 0
    return f"{type(value).__name__} {value!r}" if alone else type(value).__name__


def check_integer(name: str, value: Any, least: int | None = None) -> int:
    """The value as an int, if it is an integer of less than 63 bits and at least `least`; a bool is refused."""
    if type(value) is int and (0 if least is None else least) <= value <= 2**62:
        return value
    wants = "an integer" if least is None else f"an integer of at least {least}"
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {described(value)}, wants {wants}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {described(value)}, wants {wants}") from None
    if least is not None and number < least:
        raise ValueError(f"{name}: got {number}, wants {wants}")
    if abs(number) > 2**62:
        raise ValueError(f"{name}: got {number}, wants {wants} of less than 63 bits")
    return number


def check_number(name: str, value: Any) -> float:
    """A finite real number, as a float."""
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (float, numbers.Real, np.floating)):
        raise TypeError(f"{name}: got {described(value)}, wants a real number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: got {value}, wants a finite number (no NaN, no Inf)")
    return number


def check_eps(eps: Any) -> float:
    """eps as a float strictly between 0 and 1."""
    eps = check_number("eps", eps)
    if not 0 < eps < 1:
        raise ValueError(f"eps: got {eps}, wants a number between 0 and 1, both excluded")
    return eps


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless the value is one of these strings."""
    if not isinstance(value, str) or value not in choices:
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"{name}: got {described(value)}, wants one of {', '.join(map(repr, choices))}")


def as_pair(value: Any) -> tuple[Any, Any] | None:
    """A tuple or a list of two items as a tuple; None for any other value."""
    return tuple(value) if isinstance(value, (tuple, list)) and len(value) == 2 else None


def check_near(near: Any) -> tuple[int, float | tuple[float, ...]]:
    """The pair (w, scale_near): an integer of at least 1, and a finite number or a tuple of them, one for each head."""
    pair = as_pair(near)
    if pair is None:
        raise TypeError(f"near: got {described(near)}, wants a pair (w, scale_near)")
    width, scale = check_integer("near", pair[0], least=1), pair[1]
    try:
        axes = np.ndim(scale)
    except ValueError:
        raise TypeError(f"near: got {described(scale)} of unlike things, wants numbers, one for each head") from None
    if axes > 1:
        raise ValueError(f"near: got a scale_near of shape {np.shape(scale)}, wants a number, or shape (heads,)")
    if axes == 0:
        return width, check_number("near", scale)
    return width, tuple(check_number("near", each) for each in scale)


def scales_of(near: tuple[int, float | tuple[float, ...]]) -> tuple[float, ...]:
    """The scale of a checked pair (w, scale_near), or those of all heads."""
    return near[1] if isinstance(near[1], tuple) else (near[1],)


def check_heads_of_near(near: tuple[int, float | tuple[float, ...]] | None, heads: int) -> None:
    """Raise unless scale_near is one number or has one for each of so many heads."""
    if near is not None and isinstance(near[1], tuple) and len(near[1]) != heads:
        raise ValueError(
            f"near: got a scale_near of shape ({len(near[1])},), wants a number, or shape ({heads},), one for each head"
        )


def check_flag(name: str, value: Any) -> bool:
    """The value if it is a bool. Other values that Python takes for true or false are refused: most are mistakes."""
    if value is True or value is False:
        return value
    if not isinstance(value, np.bool_):
        raise TypeError(f"{name}: got {described(value)}, wants True or False")
    return bool(value)


def check_count(name: str, value: Any) -> int:
    """The value as an int, if it is an integer of at least 1."""
    return check_integer(name, value, least=1)


def check_like(name: str, X: Any, dtype: np.dtype, shape: tuple[int, ...], *, broadcast: bool = False) -> np.ndarray:
    """X as an array, if it has this dtype and this shape, which are those of the result.

    With `broadcast` the leading axes of X may also be of size 1 or missing.
    """
    X = check_array(name, X)
    if X.dtype != dtype:
        raise TypeError(f"{name}: got dtype {X.dtype}, wants {dtype} as Q has")
    wanted = X.shape[-2:] == shape[-2:] and broadcasts(X.shape, shape) if broadcast else X.shape == shape
    if not wanted:
        raise ValueError(f"{name}: got shape {X.shape}, wants {shape}, the shape of the result")
    return X


def check_values(V: Any) -> None:
    """Raise where V is None. `check_arguments` accepts None, since a plan needs no V."""
    if V is None:
        raise TypeError("V: got None, wants an array (..., n_k, d_v)")


def check_factor(X: Any, dtype: np.dtype, lead: tuple[int, ...], length: int, axis: int = -2) -> np.ndarray:
    """X as an array, if it can be multiplied with matrices that have the leading axes `lead`.

    X has the shape (length,), or its axis `axis` has this length. The axis is -2 where X is multiplied from the right
    of the matrices, and -1 where it is multiplied from their left.
    """
    X = check_array("X", X, least_axes=1)
    if X.dtype != dtype:
        raise TypeError(f"X: got dtype {X.dtype}, wants {dtype} as Q has")
    leads_fit = X.ndim < 3 or broadcasts(X.shape[:-2], lead)
    if X.shape[axis if X.ndim > 1 else 0] != length or not leads_fit:
        rows = f"{length}, m" if axis == -2 else f"m, {length}"
        raise ValueError(f"X: got shape {X.shape}, wants ({length},) or (..., {rows}), leading axes as in {lead}")
    check_finite("X", X)
    return X


def check_real(name: str, X: Any, dtype: np.dtype) -> np.ndarray:
    """X, real numbers of any dtype, as an array of `dtype`."""
    X = np.asarray(X)
    if X.dtype.kind not in "biuf" and X.dtype.name != "bfloat16":
        raise TypeError(f"{name}: got dtype {X.dtype}, wants real numbers")
    with np.errstate(over="ignore"):
        return X.astype(dtype, copy=False)


def check_finite(name: str, X: np.ndarray, threads: int = 1) -> float:
    """max |X|, which is 0 for an empty X; ValueError where X has NaN or Inf, saying where the first one is."""
    if X.size == 0:
        return 0.0
    if 0 in X.strides:
        X = without_repeats(X)
    if X.dtype.itemsize == 2:
        largest = _largest_half(X)
    elif X.dtype in _COMPUTED and X.flags.forc and X.flags.aligned:
        largest = _rows.largest(X, threads)
    else:
        # max and min take two passes but no temporary array. Where an entry is NaN, both are NaN.
        with np.errstate(invalid="ignore"):
            largest = max(float(X.max()), -float(X.min()))
    if not largest < math.inf:
        index = tuple(int(a) for a in np.argwhere(~np.isfinite(X))[0])
        got = "NaN" if np.isnan(X[index]) else "Inf" if X[index] > 0 else "-Inf"
        raise ValueError(f"{name}: got {got} at index {index}, wants finite numbers only")
    return largest


def _largest_half(X: np.ndarray) -> float:
    """max |X| of float16 or bfloat16; inf or NaN where an entry is such, NaN above all. Nothing is widened for it."""
    # Without its sign a number grows with its bits. As signed integers all positive numbers are above the others.
    bits = X.view(np.uint16)
    positive, negative = int(bits.view(np.int16).max()), int(bits.max()) - 2**15
    return float(np.array([max(positive, negative)], np.uint16).view(X.dtype)[0])


def check_array(name: str, X: Any, least_axes: int = 2) -> np.ndarray:
    """X as an array of float32, float64, float16 or bfloat16 in native byte order, with any strides."""
    if type(X) is not np.ndarray:
        try:
            X = np.asarray(X)
        except ValueError as error:
            wants = "wants an array of floating-point numbers"
            raise ValueError(f"{name}: got what is no array ({error}), {wants}") from None
    native = X.dtype if X.dtype in _COMPUTED else check_dtype(name, X.dtype)
    if X.ndim < least_axes:
        raise ValueError(f"{name}: got shape {X.shape}, wants at least {least_axes} axes (..., rows, width)")
    return X if X.dtype == native else X.astype(native)


def check_dtype(name: str, dtype: Any) -> np.dtype:
    """The dtype in native byte order, if it is float32, float64, float16 or bfloat16."""
    try:
        native = np.dtype(dtype).newbyteorder("=")
    except TypeError:
        raise TypeError(
            f"{name}: got {described(dtype)}, wants a dtype: float32, float64, float16 or bfloat16"
        ) from None
    if native not in (np.float16, np.float32, np.float64) and native.name != "bfloat16":
        raise TypeError(f"{name}: got dtype {dtype}, wants float32 or float64 (or float16, bfloat16)")
    return native


def without_repeats(X: np.ndarray) -> np.ndarray:
    """X with size 1 along every axis of stride 0: such an axis repeats the same entries."""
    return X[tuple(slice(1) if stride == 0 else slice(None) for stride in X.strides)]


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of this shape broadcasts to the other shape."""
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))
