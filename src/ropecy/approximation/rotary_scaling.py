"""Scaling rules of rotary frequencies for long contexts, by the names and keys of transformers' configurations.

They follow the definitions of transformers' ROPE_INIT_FUNCTIONS, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A rule takes (keys, base, r, length): the dict of a configuration, the base of the frequencies, the number r of
# coordinates that rotate, and the number of positions. It returns theta (r/2,), the angle per position of each plane,
# and the attention factor, by which rotated coordinates are multiplied.
_Frequencies = tuple[NDArray[np.float64], float]
_Rule = Callable[[Mapping[str, Any], np.float64, int, int], _Frequencies]


def frequencies(scaling: Mapping[str, Any] | None, base: float, rotary_dim: int, length: int) -> _Frequencies:
    """theta (rotary_dim/2,) and the attention factor by the rule of a checked `scaling`, or unscaled if it is None.

    Either may have NaN or Inf where the numbers of the rule lead to that.
    """
    rule = _RULES["default" if scaling is None else scaling["rope_type"]]
    with np.errstate(all="ignore"):
        return rule(scaling or {}, np.float64(base), rotary_dim, length)


def _default(keys: Mapping[str, Any], base: np.float64, r: int, length: int) -> _Frequencies:
    """theta_b = base^(-2b/r)."""
    return base ** (-np.arange(0, r, 2) / r), 1.0


def _linear(keys: Mapping[str, Any], base: np.float64, r: int, length: int) -> _Frequencies:
    """All frequencies divided by a factor, which has the same effect as dividing positions by it."""
    theta, factor = _default(keys, base, r, length)
    return theta / _number(keys, "factor"), factor


def _proportional(keys: Mapping[str, Any], base: np.float64, r: int, length: int) -> _Frequencies:
    """All frequencies divided by a factor, and those of the last planes set to 0, so that only the others rotate."""
    theta, factor = _default(keys, base, r, length)
    theta[int(_number(keys, "partial_rotary_factor", 1.0) * r // 2) :] = 0.0
    return theta / _number(keys, "factor", 1.0), factor


def _dynamic(keys: Mapping[str, Any], base: np.float64, r: int, length: int) -> _Frequencies:
    """A larger base for texts past the original length: the lowest frequency falls as the length grows."""
    if r == 2:
        raise ValueError("rotary_dim: got 2, wants 4 or more with rope_type 'dynamic'")
    original, f = _original_length(keys), _number(keys, "factor")
    stretch = f * max(length, original) / original - (f - 1.0)
    return _default(keys, base * stretch ** (r / (r - 2)), r, length)


def _yarn(keys: Mapping[str, Any], base: np.float64, r: int, length: int) -> _Frequencies:
    """High frequencies stay, low ones are divided by a factor, those between change linearly with the plane's index."""
    if base == 1.0:
        raise ValueError("base: got 1, wants another with rope_type 'yarn', which divides by its logarithm")
    original, f = _original_length(keys), _stretch(keys)

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(f) + 1.0 if f > 1.0 else 1.0

    if keys.get("mscale") and keys.get("mscale_all_dim"):
        factor = mscale(_number(keys, "mscale")) / mscale(_number(keys, "mscale_all_dim"))
    else:
        factor = mscale(1.0)

    # Indices of the planes that turn beta_fast and beta_slow times within the original length.
    low, high = (
        r * math.log(original / (_number(keys, name, default) * 2.0 * math.pi)) / (2.0 * math.log(base))
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    if keys.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, r - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(r // 2) - low) / (high - low), 0.0, 1.0)
    theta, _ = _default(keys, base, r, length)
    return theta / f * ramp + theta * (1.0 - ramp), _number(keys, "attention_factor", factor)


def _longrope(keys: Mapping[str, Any], base: np.float64, r: int, length: int) -> _Frequencies:
    """Each frequency divided by its own factor, from one list up to the original length and from another past it."""
    original = _original_length(keys)
    short, long = (_numbers(keys, name, r // 2) for name in ("short_factor", "long_factor"))
    if "attention_factor" in keys:
        factor = _number(keys, "attention_factor")
    else:
        f = _stretch(keys)
        factor = math.sqrt(1.0 + math.log(f) / math.log(original)) if f > 1.0 else 1.0
    theta, _ = _default(keys, base, r, length)
    return theta / (long if length > original else short), factor


def _llama3(keys: Mapping[str, Any], base: np.float64, r: int, length: int) -> _Frequencies:
    """High frequencies stay, low ones are divided by a factor, those between are blended linearly by frequency."""
    original, f = _original_length(keys), _number(keys, "factor")
    low, high = _number(keys, "low_freq_factor"), _number(keys, "high_freq_factor")
    if low >= high:
        raise ValueError(f"scaling: got low_freq_factor {low} and high_freq_factor {high}, wants the first smaller")
    theta, factor = _default(keys, base, r, length)
    # The frequency of a plane that turns at most `low` times within the original length is divided; that of one that
    # turns at least `high` times is kept.
    kept = np.clip((original * theta / (2.0 * math.pi) - low) / (high - low), 0.0, 1.0)
    return (1.0 - kept) * theta / f + kept * theta, factor


_RULES: dict[str, _Rule] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}

# All keys that some rule knows. "finetuned" is in old yarn configurations and doesn't change the rotation.
_KEYS = frozenset(
    "rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings max_position_embeddings "
    "attention_factor beta_fast beta_slow mscale mscale_all_dim truncate short_factor long_factor low_freq_factor "
    "high_freq_factor finetuned".split()
)


def check_scaling(
    scaling: Mapping[str, Any] | None, d: int, rotary_dim: int, base: float
) -> MappingProxyType[str, Any] | None:
    """A read-only copy of `scaling`, checked, with the rule's name as "rope_type", lists as tuples, and no None."""
    if scaling is None:
        return None
    if not isinstance(scaling, Mapping):
        raise TypeError(f"scaling: got {type(scaling).__name__}, wants a mapping with the key 'rope_type'")
    keys = {
        name: tuple(np.asarray(value).tolist()) if isinstance(value, (list, tuple, np.ndarray)) else value
        for name, value in scaling.items()
        if value is not None
    }
    kind = keys.get("rope_type", keys.pop("type", None))
    if not isinstance(kind, str) or kind not in _RULES:
        raise ValueError(f"scaling: got rope_type {kind!r}, wants one of {', '.join(map(repr, _RULES))}")
    unknown = sorted(map(str, keys.keys() - _KEYS))
    if unknown:
        raise ValueError(f"scaling: got {', '.join(unknown)}, wants no keys but {', '.join(sorted(_KEYS))}")
    if _number(keys, "rope_theta", base) != base:
        raise ValueError(f"scaling: got rope_theta {keys['rope_theta']}, wants base = {base:g}, or pass that as base")
    fraction = _number(keys, "partial_rotary_factor", rotary_dim / d)
    if kind == "proportional":
        if rotary_dim != d or fraction > 1.0:
            raise ValueError(
                f"scaling: got partial_rotary_factor {fraction:g} and rotary_dim {rotary_dim}, wants the first at most "
                f"1 and the second {d}, since rope_type 'proportional' pairs over the whole width"
            )
    elif "partial_rotary_factor" in keys and int(d * fraction) != rotary_dim:
        raise ValueError(
            f"scaling: got partial_rotary_factor {fraction:g}, which is rotary_dim {int(d * fraction)}; "
            f"wants it to agree with rotary_dim = {rotary_dim}"
        )
    return MappingProxyType({**keys, "rope_type": kind})


def _original_length(keys: Mapping[str, Any]) -> float:
    """The number of positions that a model was trained on."""
    name = "original_max_position_embeddings"
    if name not in keys and "max_position_embeddings" in keys:
        name = "max_position_embeddings"
    original = _number(keys, name)
    if original <= 1.0:
        raise ValueError(f"scaling: got {name} {original:g}, wants more than 1")
    return original


def _stretch(keys: Mapping[str, Any]) -> float:
    """`factor`, by default the ratio of the new length to the original one."""
    if "factor" not in keys and "max_position_embeddings" in keys:
        return _number(keys, "max_position_embeddings") / _original_length(keys)
    return _number(keys, "factor")


def _number(keys: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A positive number from the keys, checked."""
    value = keys.get(name, default)
    if value is None:
        raise ValueError(f"scaling: got no {name}, which rope_type {keys.get('rope_type')!r} wants")
    return positive(f"scaling[{name!r}]", value)


def _numbers(keys: Mapping[str, Any], name: str, count: int) -> NDArray[np.float64]:
    """A list of `count` positive numbers from the keys, checked."""
    value = keys.get(name)
    if value is None:
        raise ValueError(f"scaling: got no {name}, which rope_type {keys['rope_type']!r} wants")
    if not isinstance(value, tuple) or len(value) != count:
        got = f"{len(value)} of them" if isinstance(value, tuple) else repr(value)
        raise ValueError(f"scaling[{name!r}]: got {got}, wants a list of {count} numbers, one a plane")
    return np.array([positive(f"scaling[{name!r}]", v) for v in value])


def positive(name: str, value: Any) -> float:
    """The value as a float, if it is a positive finite number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, wants a number")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: got {value!r}, wants a positive finite number")
    return float(value)
