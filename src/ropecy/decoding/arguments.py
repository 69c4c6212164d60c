"""Every check of what the constructor and the methods of `DecodeState` are given, and its message."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..approximation.bias_forms import Linear
from ..problem.checks import (
    broadcasts,
    check_array,
    check_choice,
    check_dtype,
    check_eps,
    check_finite,
    check_integer,
    check_near,
    check_number,
    described,
    scales_of,
)
from ..relative import RelativeBias, RelativeFamily
from ..rotary import Rotary

# The largest value in float64: sums of any number of such values, times weights and monomials, stay finite.
LARGEST_VALUE = 2.0**900


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """Checked arguments of `DecodeState`; `dtype` is None where the dtype of the first keys is to be taken."""

    d: int
    d_v: int
    R: Rotary | None
    eps: float
    bound: float
    scale: float
    dtype: np.dtype | None
    window: int | None
    near: tuple[int, float | tuple[float, ...]] | None
    bias: RelativeBias | None
    on_break: str

    @property
    def recent(self) -> int:
        """How many of the last tokens are exact."""
        return self.near[0] if self.near else self.window or 0

    @property
    def stretched(self) -> tuple[int, float | tuple[float, ...]]:
        """How many of the last tokens are near, and what their scores by `scale` are multiplied by in each head."""
        if self.near is None:
            return 0, 1.0
        width, scale = self.near
        return width, tuple(each / self.scale for each in scale) if isinstance(scale, tuple) else scale / self.scale

    @property
    def largest_stretch(self) -> float:
        """The largest size of what scores of near tokens are multiplied by."""
        return max(abs(each) for each in scales_of(self.stretched))

    @property
    def heads_of_near(self) -> int | None:
        """How many query heads have a near scale each; None where one is for all."""
        return len(self.near[1]) if self.near and isinstance(self.near[1], tuple) else None


def check_decode(d: Any, d_v: Any, R: Any, options: Mapping[str, Any]) -> DecodeOptions:
    """The arguments of `DecodeState`, checked; `options` are those that it takes by keyword."""
    d, d_v = check_integer("d", d, least=1), check_integer("d_v", d_v, least=1)
    if R is not None:
        _rotary_of_any_length(R, d)
    eps = check_eps(options["eps"])
    bound = check_number("bound", options["bound"])
    if bound <= 0:
        raise ValueError(f"bound: got {bound}, wants a number above 0")
    scale, dtype, window, near, bias = (options[name] for name in ("scale", "dtype", "window", "near", "bias"))
    scale = 1 / d if scale is None else check_number("scale", scale)
    if dtype is not None:
        dtype = check_dtype("dtype", dtype)
    if window is not None:
        window = check_integer("window", window, least=1)
    if near is not None:
        near = _near(near, window, scale)
    if bias is not None:
        bias = _decaying(bias)
    check_choice("on_break", options["on_break"], ("raise", "exact"))
    return DecodeOptions(d, d_v, R, eps, bound, scale, dtype, window, near, bias, options["on_break"])


def _near(near: Any, window: int | None, scale: float) -> tuple[int, float | tuple[float, ...]]:
    """The pair (w, scale_near), if a scale of far tokens and no window stand beside it."""
    near = check_near(near)
    if window is not None:
        raise ValueError(f"near: got {near} beside window={window}, wants one of the two: near tokens are exact")
    if near[1] == ():
        raise ValueError("near: got a scale_near of no head, wants a number, or one for each query head")
    if scale == 0 or not all(math.isfinite(each / scale) for each in scales_of(near)):
        raise ValueError(f"near: got {near} beside scale={scale:g}, wants a finite multiple of a scale other than 0")
    return near


def _decaying(bias: Any) -> RelativeBias:
    """The bias in float64, if exp(b_t) decays by one constant factor for each token that came after the key."""
    wants = "RelativeBias.alibi(slope) with slopes of at least 0, by which a state decays"
    if not isinstance(bias, RelativeBias):
        raise TypeError(f"bias: got {described(bias)}, wants {wants}, or None")
    if not isinstance(bias._form, Linear):
        raise NotImplementedError(f"bias: got {bias!r}, which no state of fixed size holds; wants {wants}")
    slopes = bias._values.astype(np.float64)
    if (slopes < 0).any():
        raise ValueError(f"bias: got a slope of {slopes.min():g}, wants {wants}")
    return RelativeBias.alibi(slopes)


def _rotary_of_any_length(R: Any, d: int) -> None:
    """Refuse an R that is no Rotary, and a Rotary whose angles depend on the length of the text.

    A key is rotated once, when its token comes, and the final length of the text is not known then.
    """
    if isinstance(R, RelativeFamily):
        raise NotImplementedError("R: a RelativeFamily does not factor, so no state of fixed size holds it")
    if not isinstance(R, Rotary):
        raise TypeError(f"R: got {described(R)}, wants a ropecy.Rotary or None")
    if R.d != d:
        raise ValueError(f"R: got a Rotary of width {R.d}, wants {d}, the width of keys")
    rule = "default" if R.scaling is None else R.scaling["rope_type"]
    if rule in ("dynamic", "longrope") and R.length is None:
        raise ValueError(
            f"R: got rope_type {rule!r}, whose angles change with the length of the text; "
            "wants Rotary(..., length=), since keys are rotated once"
        )


def check_tokens(
    given: dict[str, Any],
    o: DecodeOptions,
    dtype: np.dtype | None,
    lead: tuple[int, ...] | None,
    told: Mapping[str, Any],
    *,
    single: bool,
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...], np.ndarray | None]:
    """Checked keys and values, the leading axes of the state, and how many of the rows each stream takes, None for all.

    Rows that a stream does not take are 0 in what is returned.

    Parameters
    ----------
    given : dict
        Keys and values, in this order, by the names that the caller's method has for them. Their shape is
        (..., n, width), or (..., width) for a `single` token.
    o : DecodeOptions
    dtype, lead
        The dtype and the leading axes of the state, None before the first token.
    told : dict
        `active` and `lengths`, by name, as `check_counts` takes them.
    single : bool
        Whether the arrays hold one token and have no axis of tokens.
    """
    axes, bias = 1 if single else 2, o.bias
    arrays = []
    for (name, X), width in zip(given.items(), (o.d, o.d_v), strict=True):
        arrays.append(_rows(name, X, width, dtype, axes))
        dtype = arrays[-1].dtype
    names = ", ".join(given)
    leads = [X.shape[: X.ndim - axes] for X in arrays]
    if not single and arrays[0].shape[-2] != arrays[1].shape[-2]:
        raise ValueError(
            f"{names}: got {arrays[0].shape[-2]} keys and {arrays[1].shape[-2]} values, wants as many of either"
        )
    try:
        together = np.broadcast_shapes(*leads)
    except ValueError:
        raise ValueError(f"{names}: got leading axes {leads[0]} and {leads[1]}, wants axes that broadcast") from None
    if 0 in together:
        raise ValueError(f"{names}: got leading axes {together}, wants at least one of each")
    # A state of several streams needs tokens for each of them. Those of a single step may broadcast, since the query of
    # that step has all leading axes.
    if lead is not None and not (broadcasts(together, lead) if single else together == lead):
        raise ValueError(f"{names}: got leading axes {together}, wants {lead} as the state has")
    lead = together if lead is None else lead
    if bias is not None and bias.heads not in (None, 1) and lead and bias.heads % lead[-1]:
        raise ValueError(
            f"{names}: got leading axes {together}, wants a number of heads that divides the {bias.heads} of bias"
        )
    if o.heads_of_near is not None and o.heads_of_near % (lead[-1] if lead else 1):
        raise ValueError(
            f"{names}: got leading axes {together}, wants a number of heads that divides the {o.heads_of_near} of near"
        )
    counts = check_counts(told, lead, 1 if single else arrays[0].shape[-2])
    if counts is not None:
        arrays = [_taken(X, lead, counts, axes) for X in arrays]
    for name, X, most in zip(given, arrays, (math.inf, LARGEST_VALUE), strict=True):
        if (largest := check_finite(name, X)) > most:
            raise ValueError(f"{name}: got a value of size {largest:.3g}, wants at most 2^900, for sums would overflow")
    return *arrays, lead, counts


def check_query(
    q: Any, o: DecodeOptions, dtype: np.dtype | None, lead: tuple[int, ...], counts: np.ndarray | None
) -> np.ndarray:
    """A checked query (..., width). It has the leading axes of the keys, but may have a multiple of their heads.

    A bias with slopes for several heads says how many heads it must have. Rows of streams of which `counts` is 0 are 0
    in what is returned.
    """
    q, bias = _rows("q", q, o.d, dtype, 1), o.bias
    own, heads = q.shape[:-1], lead[-1] if lead else 1
    one_head = not lead and not own
    if not (one_head or (len(own) == max(1, len(lead)) and own[:-1] == lead[:-1] and own[-1] and own[-1] % heads == 0)):
        wants = f"{lead}, or a multiple of its {heads} heads" if lead else "() or (heads,)"
        raise ValueError(f"q: got leading axes {own}, wants {wants}")
    if bias is not None and bias.heads not in (None, 1) and own[-1:] != (bias.heads,):
        raise ValueError(f"q: got leading axes {own}, wants {(*lead[:-1], bias.heads)}, heads as bias has")
    if o.heads_of_near not in (None, own[-1] if own else 1):
        raise ValueError(f"q: got leading axes {own}, wants {(*lead[:-1], o.heads_of_near)}, heads as near has")
    if counts is not None:
        q = _taken(q, lead, counts, 1)
    check_finite("q", q)
    return q


def check_counts(told: Mapping[str, Any], lead: tuple[int, ...], n: int) -> np.ndarray | None:
    """How many of n rows each stream takes, (streams,) intp; None if nothing says that it is not all.

    Either `active`, bool, all or none, or `lengths`, integers from 0 to n: one for each stream.
    """
    given = {name: value for name, value in told.items() if value is not None}
    if not given:
        return None
    if len(given) > 1:
        raise ValueError(f"{', '.join(given)}: got both, wants one of the two")
    [(name, value)] = given.items()
    value, wants = np.asarray(value), ("bool", "b") if name == "active" else ("integers", "iu")
    if value.dtype.kind not in wants[1]:
        raise TypeError(f"{name}: got dtype {value.dtype}, wants {wants[0]}")
    if value.shape != lead[:-1]:
        raise ValueError(f"{name}: got shape {value.shape}, wants {lead[:-1]}, one for each stream")
    if name == "active":
        return value.reshape(-1) * np.intp(n)
    if value.size and not 0 <= (worst := value.flat[np.abs(value - n / 2).argmax()]) <= n:
        raise ValueError(f"{name}: got {worst}, wants from 0 to {n}, the rows that are given")
    return value.reshape(-1).astype(np.intp)


def check_streams(streams: Any, lead: tuple[int, ...]) -> np.ndarray:
    """What indexing an array with one number for each stream, (...), gives, of the numbers 0, 1, ...; intp."""
    shape = lead[:-1]
    try:
        chosen = np.arange(math.prod(shape), dtype=np.intp).reshape(shape)[streams]
    except (IndexError, TypeError, ValueError) as error:
        wants = f"what indexes an array of the streams, of shape {shape}"
        raise ValueError(f"streams: got {described(streams)}, wants {wants} ({error})") from None
    return chosen


def _taken(X: np.ndarray, lead: tuple[int, ...], counts: np.ndarray, axes: int) -> np.ndarray:
    """X (..., n, width), or (..., width) where `axes` is 1, with 0 in the rows that a stream does not take."""
    n = 1 if axes == 1 else X.shape[-2]
    taken = np.arange(n) < counts.reshape((*lead[:-1], 1))
    if lead:
        taken = taken[..., None, :]
    return np.where(taken if axes == 1 else taken[..., None], X, X.dtype.type(0))


def _rows(name: str, X: Any, width: int, dtype: np.dtype | None, axes: int) -> np.ndarray:
    """X as an array of at least `axes` axes, if its rows have this width and, where `dtype` is given, that dtype."""
    X = check_array(name, X, least_axes=axes)
    if dtype is not None and X.dtype != dtype:
        raise TypeError(f"{name}: got dtype {X.dtype}, wants {dtype} as the keys have")
    if X.shape[-1] != width:
        raise ValueError(f"{name}: got rows of width {X.shape[-1]} (shape {X.shape}), wants {width}")
    return X
