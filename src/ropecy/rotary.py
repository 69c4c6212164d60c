"""Rotary position embedding: the matrices R_m, rows times rotations, and the scaling rules of published models."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Real
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .kernels import _rotary

__all__ = ["Rotary", "rotate_rows"]

PAIRINGS = ("half", "interleaved")


@dataclass(frozen=True, repr=False)
class Rotary:
    r"""R_m, the block-diagonal matrix of plane rotations by m theta_b, with theta_b = base^(-2b/r).

    ``R[j - i]`` is what stands between query i and key j in the score ``Q_i R_{j-i} K_j^T``, and since
    ``R_{j-i} = R_i^T R_j`` that score is the inner product of row i of ``R.rotate(Q)`` and row j of ``R.rotate(K)``.

    Parameters
    ----------
    d : int
        Width of the rows.
    base : float, default 10000.0
        theta_b = base^(-2b/r), before any scaling.
    pairing : {"half", "interleaved"}
        The planes: coordinates (b, b + r/2), as in Llama and GPT-NeoX, or (2b, 2b + 1), as in RoFormer and GPT-J.
    rotary_dim : int, optional
        r, an even number: the first r coordinates rotate, the others pass. By default d, which must then be even.
    scaling : mapping, optional
        The rule for long contexts, in the keys that transformers' configurations carry: ``rope_type`` (or ``type``) is
        "default", "linear", "dynamic", "yarn", "longrope", "llama3" or "proportional", beside the rule's own keys. A
        ``rope_theta`` or ``partial_rotary_factor`` in it must agree with `base` and `rotary_dim`, and a key that no
        rule knows is an error, since leaving it out would change the result.
    length : int, optional
        The number of positions that "dynamic" and "longrope" scale for, by default the largest position of a call + 1
        (for ``R[m]``, \|m\| + 1). Other rules do not look at it.

    Raises
    ------
    TypeError
        An argument is of the wrong kind.
    ValueError
        d or rotary_dim odd or out of range, base not positive and finite, an unknown pairing, rule or key, a key that
        the rule needs and does not get.

    See Also
    --------
    ropecy.RelativeBias : what is added to scores by the offset.
    ropecy.RelativeFamily : any matrices in the place of rotations.

    Notes
    -----
    An attention factor a ("yarn", "longrope") multiplies the rotated coordinates on both sides, so R_m carries a^2
    there and 1 elsewhere.

    Frequencies, angles, cosines and sines are float64 whatever the type of the rows. The family is the one of RoPE
    attention in arXiv:2412.17316 and arXiv:2505.11892. Rotary embeddings are from [1]_.

    References
    ----------
    .. [1] J. Su, Y. Lu, S. Pan, A. Murtadha, B. Wen and Y. Liu, "RoFormer: Enhanced Transformer with Rotary Position
       Embedding", arXiv:2104.09864, 2021.

    Examples
    --------
    >>> R = Rotary(4)
    >>> bool(np.allclose(R[3].T @ R[5], R[2]))
    True
    >>> R.rotate(np.eye(4)[:1], positions=[1]).round(4)
    array([[0.5403, 0.    , 0.8415, 0.    ]])
    """

    d: int
    base: float = 10000.0
    pairing: str = "half"
    rotary_dim: int | None = None
    # Left out of the hash, for a mapping has none; equal objects still have equal hashes.
    scaling: Mapping[str, Any] | None = field(hash=False, default=None)
    length: int | None = None

    def __post_init__(self) -> None:
        checked = {"d": _integer("d", self.d, 1), "base": _positive("base", self.base)}
        d = checked["d"]
        if self.pairing not in PAIRINGS:
            raise ValueError(f"pairing: got {self.pairing!r}, wants one of {', '.join(map(repr, PAIRINGS))}")
        if self.rotary_dim is None:
            if d % 2:
                raise ValueError(f"d: got {d}, which is odd; wants an even d, or an even rotary_dim below it")
            checked["rotary_dim"] = d
        else:
            checked["rotary_dim"] = r = _integer("rotary_dim", self.rotary_dim)
            if r % 2 or not 2 <= r <= d:
                raise ValueError(f"rotary_dim: got {r}, wants an even integer from 2 to d = {d}")
        checked["length"] = None if self.length is None else _integer("length", self.length, 1)
        checked["scaling"] = _scaling(self.scaling, d, checked["rotary_dim"], checked["base"])
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        # What a rule lacks or cannot use shows now, not at the first rotation.
        self._frequencies(1)

    def __repr__(self) -> str:
        scaling = None if self.scaling is None else dict(self.scaling)
        return (
            f"Rotary({self.d}, base={self.base!r}, pairing={self.pairing!r}, rotary_dim={self.rotary_dim}, "
            f"scaling={scaling}, length={self.length})"
        )

    def __reduce__(self) -> tuple:
        scaling = None if self.scaling is None else dict(self.scaling)
        return Rotary, (self.d, self.base, self.pairing, self.rotary_dim, scaling, self.length)

    def __getitem__(self, m: int) -> NDArray[np.float64]:
        """R_m, so that the score of query i and key j is ``Q_i @ R[j - i] @ K_j``.

        Parameters
        ----------
        m : int
            The offset, key position minus query position.

        Returns
        -------
        (d, d) float64

        Raises
        ------
        TypeError
            m is no integer.
        ValueError
            m is past 2**63 - 1 in size.
        """
        m = _integer("m", m)
        if abs(m) > np.iinfo(np.int64).max:
            raise ValueError(f"m: got {m}, wants an offset between -(2**63 - 1) and 2**63 - 1")
        theta, factor = self._frequencies(abs(m) + 1)
        # Row k is a R_m e_k, column k of a R_m; the other a is the query's.
        columns = rotate_rows(np.eye(self.d), np.int64(abs(m)), theta, factor, self.pairing, adjoint=m < 0)
        columns[:, : 2 * len(theta)] *= factor
        return np.ascontiguousarray(columns.T)

    def rotate(self, X: ArrayLike, positions: ArrayLike | None = None, inverse: bool = False) -> NDArray:
        """Rows x_i -> a R_{p_i} x_i, or with `inverse` back again.

        Parameters
        ----------
        X : (..., n, d) array
            float32 or float64, computed in themselves, or float16 or bfloat16, computed in float32. Any strides.
        positions : integers, optional
            p: one for all rows, (n,), or the shape of X without its last axis, where leading axes of size 1 broadcast.
            Negative and repeated ones are fine. By default ``arange(n)``.
        inverse : bool
            Undo the rotation: ``rotate(rotate(X), inverse=True)`` is X, so an attention factor is divided out.

        Returns
        -------
        (..., n, d) array
            C-contiguous, of X's dtype.

        Raises
        ------
        TypeError
            X is not of a floating type named above, or positions are not integers.
        ValueError
            Shapes disagree.

        Notes
        -----
        Time O(n d) without a call of cos or sin per angle. Angles are exact to float64 rounding for positions below
        2^35 in size.
        """
        X = np.asarray(X)
        if X.ndim < 2 or X.shape[-1] != self.d:
            raise ValueError(f"X: got shape {X.shape}, wants (..., n, {self.d})")
        # bfloat16 is no dtype of NumPy's own, so it is known by its name.
        if X.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
            raise TypeError(f"X: got dtype {X.dtype}, wants float32, float64, float16 or bfloat16")
        positions = _positions(positions, X.shape[:-1])
        theta, factor = self._frequencies(int(positions.max(initial=-1)) + 1)
        rows = X.astype(np.float32) if X.dtype.itemsize == 2 else X
        if inverse:
            factor = 1.0 / factor
        Y = rotate_rows(rows, positions, theta, factor, self.pairing, adjoint=inverse)
        return Y.astype(X.dtype, copy=False)

    def _frequencies(self, length: int) -> tuple[NDArray[np.float64], float]:
        """(theta, a): angles per position of the planes, in their order, and the attention factor.

        `length` is the largest position of the call + 1; the object's own `length` goes before it.
        """
        if self.length is not None:
            length = self.length
        return _frequencies_of(self, length)


@lru_cache(maxsize=32)
def _frequencies_of(R: Rotary, length: int) -> tuple[NDArray[np.float64], float]:
    """`Rotary._frequencies`, which calls of one length share."""
    rule = _RULES["default" if R.scaling is None else R.scaling["rope_type"]]
    with np.errstate(all="ignore"):
        theta, factor = rule(R.scaling or {}, np.float64(R.base), R.rotary_dim, length)
    if not (np.isfinite(theta).all() and math.isfinite(factor) and factor > 0):
        raise ValueError(f"scaling: got {R!r}, wants what gives finite frequencies and attention factor")
    theta.flags.writeable = False
    return theta, factor


def rotate_rows(
    X: NDArray,
    positions: NDArray[np.int64],
    theta: NDArray[np.float64],
    factor: float,
    pairing: str,
    *,
    adjoint: bool = False,
    threads: int = 1,
    out: NDArray | None = None,
) -> NDArray:
    """y_i = factor R_{p_i} x_i, or with `adjoint` factor R_{p_i}^T x_i, for rows x_i of X.

    Parameters
    ----------
    X : (..., n, d) float32 or float64
        Any strides; d >= 2 len(theta), and what is past that is copied.
    positions : int64
        Broadcasts to (..., n).
    theta : (pairs,) float64
        Angle per position of each plane.
    factor : float
        Multiplies the rotated coordinates.
    pairing : {"half", "interleaved"}
        Planes (b, b + pairs) or (2b, 2b + 1).
    adjoint : bool
        Transpose the rotations.
    threads : int
        At most; the result does not depend on it.
    out : (..., n, d) array, optional
        C-contiguous, of X's dtype; X itself will do.

    Returns
    -------
    (..., n, d) array
        C-contiguous, of X's dtype.

    Notes
    -----
    Time O(n d); memory the result, 8 n bytes where positions do not start at 0, and 16 pairs bytes for each block of
    512 positions that is met.
    """
    if not (X.flags.aligned and X.dtype.isnative and all(s % X.itemsize == 0 for s in X.strides)):
        X = X.astype(X.dtype.newbyteorder("="), order="C")
    if out is None:
        out = np.empty(X.shape, X.dtype)
    if X.size == 0:
        return out
    # cos is even and sin odd to the bit, so the transpose is the rotation by -theta.
    theta = -theta if adjoint else theta
    blocks, positions = _split(np.asarray(positions, np.int64))
    if isinstance(blocks, range):
        coarse = _coarse_table(blocks, theta.tobytes(), factor)
    else:
        coarse = _table(blocks * _rotary.FINE, theta) * factor
    lead = X.shape[:-2]
    strides = (0,) * len(lead) + positions.strides
    if positions.shape != X.shape[-2:-1]:
        strides = np.broadcast_to(positions, X.shape[:-1]).strides
    _rotary.rotate(
        X,
        _offsets(lead, X.strides[:-2], X.itemsize),
        positions.reshape(-1),
        _offsets(lead, strides[:-1], positions.itemsize),
        strides[-1] // positions.itemsize,
        coarse,
        _fine_table(theta.tobytes()),
        out,
        pairing == "interleaved",
        # A thread has to get enough coordinates to be worth waking.
        max(1, min(threads, X.size // 16384)),
    )
    return out


def _split(positions: NDArray[np.int64]) -> tuple[range | NDArray[np.int64], NDArray[np.int64]]:
    """The blocks a of 512 positions that are met, and for each position 512 a + b its 512 (index of a) + b."""
    first, last = (int(p) // _rotary.FINE for p in (positions.min(), positions.max()))
    if last - first <= 8 + positions.size // 16:
        blocks = range(first, last + 1)
        return blocks, positions - first * _rotary.FINE if first else np.ascontiguousarray(positions)
    # Far apart: a table of all blocks between would cost more than a sort.
    blocks, index = np.unique(positions // _rotary.FINE, return_inverse=True)
    return blocks, index.reshape(positions.shape) * _rotary.FINE + positions % _rotary.FINE


def _table(positions: NDArray[np.int64], theta: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row by row cos(p theta_b) for all b, then sin(p theta_b)."""
    # theta is cut into 26 and 27 bits, so that both products with an integer are exact and no angle is rounded.
    high = (theta.view(np.int64) & ~np.int64(2**27 - 1)).view(np.float64)
    large = np.multiply.outer(positions, high)
    small = np.multiply.outer(positions, theta - high)
    table = np.empty((len(positions), 2 * len(theta)))
    table[:, : len(theta)] = np.cos(large) * np.cos(small) - np.sin(large) * np.sin(small)
    table[:, len(theta) :] = np.sin(large) * np.cos(small) + np.cos(large) * np.sin(small)
    return table


@lru_cache(maxsize=8)
def _fine_table(theta: bytes) -> NDArray[np.float64]:
    """The table of positions 0 to 511, the same for every call with the same frequencies, given by their bytes."""
    table = _table(np.arange(_rotary.FINE), np.frombuffer(theta))
    table.flags.writeable = False
    return table


@lru_cache(maxsize=8)
def _coarse_table(blocks: range, theta: bytes, factor: float) -> NDArray[np.float64]:
    """factor times the table of the first positions of blocks, which calls of one length share."""
    table = _table(np.arange(blocks.start, blocks.stop) * _rotary.FINE, np.frombuffer(theta)) * factor
    table.flags.writeable = False
    return table


@lru_cache(maxsize=32)
def _offsets(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> NDArray[np.intp]:
    """Where, in elements, each index of some leading axes begins."""
    offsets = np.zeros(shape, np.intp)
    for axis, (length, stride) in enumerate(zip(shape, strides, strict=True)):
        steps = np.arange(length, dtype=np.intp) * (stride // itemsize)
        offsets += steps.reshape((-1,) + (1,) * (len(shape) - axis - 1))
    offsets.flags.writeable = False
    return offsets.reshape(-1)


# The scaling rules: (keys, base, r, length) -> (theta, attention factor), after the definitions in transformers'
# ROPE_INIT_FUNCTIONS but in float64.


def _default(keys: Mapping[str, Any], base: np.float64, r: int, length: int) -> tuple[NDArray[np.float64], float]:
    return base ** (-np.arange(0, r, 2) / r), 1.0


def _linear(keys: Mapping[str, Any], base: np.float64, r: int, length: int) -> tuple[NDArray[np.float64], float]:
    theta, factor = _default(keys, base, r, length)
    return theta / _number(keys, "factor"), factor


def _proportional(keys: Mapping[str, Any], base: np.float64, r: int, length: int) -> tuple[NDArray[np.float64], float]:
    theta, factor = _default(keys, base, r, length)
    theta[int(_number(keys, "partial_rotary_factor", 1.0) * r // 2) :] = 0.0
    return theta / _number(keys, "factor", 1.0), factor


def _dynamic(keys: Mapping[str, Any], base: np.float64, r: int, length: int) -> tuple[NDArray[np.float64], float]:
    if r == 2:
        raise ValueError("rotary_dim: got 2, wants 4 or more with rope_type 'dynamic'")
    original, f = _original_length(keys), _number(keys, "factor")
    stretch = f * max(length, original) / original - (f - 1.0)
    return _default(keys, base * stretch ** (r / (r - 2)), r, length)


def _yarn(keys: Mapping[str, Any], base: np.float64, r: int, length: int) -> tuple[NDArray[np.float64], float]:
    if base == 1.0:
        raise ValueError("base: got 1, wants another with rope_type 'yarn', which divides by its logarithm")
    original, f = _original_length(keys), _stretch(keys)

    def mscale(m: float) -> float:
        return 0.1 * m * math.log(f) + 1.0 if f > 1.0 else 1.0

    if keys.get("mscale") and keys.get("mscale_all_dim"):
        factor = mscale(_number(keys, "mscale")) / mscale(_number(keys, "mscale_all_dim"))
    else:
        factor = mscale(1.0)

    # The pairs that turn beta_fast and beta_slow times within the original length.
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


def _longrope(keys: Mapping[str, Any], base: np.float64, r: int, length: int) -> tuple[NDArray[np.float64], float]:
    original = _original_length(keys)
    short, long = (_numbers(keys, name, r // 2) for name in ("short_factor", "long_factor"))
    if "attention_factor" in keys:
        factor = _number(keys, "attention_factor")
    else:
        f = _stretch(keys)
        factor = math.sqrt(1.0 + math.log(f) / math.log(original)) if f > 1.0 else 1.0
    theta, _ = _default(keys, base, r, length)
    return theta / (long if length > original else short), factor


def _llama3(keys: Mapping[str, Any], base: np.float64, r: int, length: int) -> tuple[NDArray[np.float64], float]:
    original, f = _original_length(keys), _number(keys, "factor")
    low, high = _number(keys, "low_freq_factor"), _number(keys, "high_freq_factor")
    if low >= high:
        raise ValueError(f"scaling: got low_freq_factor {low} and high_freq_factor {high}, wants the first smaller")
    theta, factor = _default(keys, base, r, length)
    # Turns within the original length: at most `low` is divided, at least `high` is kept, between is blended.
    kept = np.clip((original * theta / (2.0 * math.pi) - low) / (high - low), 0.0, 1.0)
    return (1.0 - kept) * theta / f + kept * theta, factor


_Rule = Callable[[Mapping[str, Any], np.float64, int, int], tuple[NDArray[np.float64], float]]
_RULES: dict[str, _Rule] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}

# "finetuned" is in old yarn configurations and says nothing about the rotation.
_KEYS = frozenset(
    "rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings max_position_embeddings "
    "attention_factor beta_fast beta_slow mscale mscale_all_dim truncate short_factor long_factor low_freq_factor "
    "high_freq_factor finetuned".split()
)


def _scaling(
    scaling: Mapping[str, Any] | None, d: int, rotary_dim: int, base: float
) -> MappingProxyType[str, Any] | None:
    """A read-only copy of `scaling` with rope_type in its place, lists as tuples, and nothing that is None."""
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
    name = "original_max_position_embeddings"
    if name not in keys and "max_position_embeddings" in keys:
        name = "max_position_embeddings"
    original = _number(keys, name)
    if original <= 1.0:
        raise ValueError(f"scaling: got {name} {original:g}, wants more than 1")
    return original


def _stretch(keys: Mapping[str, Any]) -> float:
    """`factor`, or what the two lengths of a configuration say it is."""
    if "factor" not in keys and "max_position_embeddings" in keys:
        return _number(keys, "max_position_embeddings") / _original_length(keys)
    return _number(keys, "factor")


def _number(keys: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = keys.get(name, default)
    if value is None:
        raise ValueError(f"scaling: got no {name}, which rope_type {keys.get('rope_type')!r} wants")
    return _positive(f"scaling[{name!r}]", value)


def _numbers(keys: Mapping[str, Any], name: str, count: int) -> NDArray[np.float64]:
    value = keys.get(name)
    if value is None:
        raise ValueError(f"scaling: got no {name}, which rope_type {keys['rope_type']!r} wants")
    if not isinstance(value, tuple) or len(value) != count:
        got = f"{len(value)} of them" if isinstance(value, tuple) else repr(value)
        raise ValueError(f"scaling[{name!r}]: got {got}, wants a list of {count} numbers, one a plane")
    return np.array([_positive(f"scaling[{name!r}]", v) for v in value])


def _positive(name: str, value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, wants a number")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: got {value!r}, wants a positive finite number")
    return float(value)


def _integer(name: str, value: Any, least: int | None = None) -> int:
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, wants an integer") from None
    if least is not None and integer < least:
        raise ValueError(f"{name}: got {integer}, wants an integer of at least {least}")
    return integer


def _positions(positions: ArrayLike | None, rows: tuple[int, ...]) -> NDArray[np.int64]:
    """`positions` as int64 that broadcast to `rows`, the shape of X without its last axis."""
    n = rows[-1]
    if positions is None:
        return np.arange(n)
    positions = np.asarray(positions)
    if positions.size and (positions.dtype.kind not in "iu" or positions.max() > np.iinfo(np.int64).max):
        raise TypeError(f"positions: got dtype {positions.dtype}, wants integers that fit int64")
    whole = positions.ndim == len(rows) and positions.shape[-1] == n
    whole = whole and all(a in (1, b) for a, b in zip(positions.shape, rows, strict=True))
    if not (whole or positions.shape in ((), (n,))):
        raise ValueError(
            f"positions: got shape {positions.shape}, wants ({n},), or {rows} where leading axes may be 1"
        )
    return positions.astype(np.int64, copy=False)
