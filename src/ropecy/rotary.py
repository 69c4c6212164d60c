"""Rotary position embedding: the matrices R_m, and rows times rotations."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .approximation.rotary_scaling import check_scaling, frequencies, positive
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
        checked = {"d": _integer("d", self.d, 1), "base": positive("base", self.base)}
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
        checked["scaling"] = check_scaling(self.scaling, d, checked["rotary_dim"], checked["base"])
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        # A key that the rule lacks, or a value that it can't use, is an error now and not at the first rotation.
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
        # Row k becomes a R_m e_k, which is column k of a R_m. The attention factor a multiplies queries and keys, so it
        # is in R_m twice.
        columns = rotate_rows(np.eye(self.d), np.int64(abs(m)), Planes(theta, factor, self.pairing), adjoint=m < 0)
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
        Y = rotate_rows(rows, positions, Planes(theta, factor, self.pairing), adjoint=inverse)
        return Y.astype(X.dtype, copy=False)

    def _frequencies(self, length: int) -> tuple[NDArray[np.float64], float]:
        """(theta, a): the angle per position of each plane, and the attention factor.

        `length` is the largest position of the call + 1. It doesn't count where the object has a `length` of its own.
        """
        if self.length is not None:
            length = self.length
        return _frequencies_of(self, length)


@lru_cache(maxsize=32)
def _frequencies_of(R: Rotary, length: int) -> tuple[NDArray[np.float64], float]:
    """`Rotary._frequencies`, kept for later calls with the same length."""
    theta, factor = frequencies(R.scaling, R.base, R.rotary_dim, length)
    if not (np.isfinite(theta).all() and math.isfinite(factor) and factor > 0):
        raise ValueError(f"scaling: got {R!r}, wants what gives finite frequencies and attention factor")
    theta.flags.writeable = False
    return theta, factor


class Planes(NamedTuple):
    """The planes in which rows are rotated.

    Attributes
    ----------
    theta : (pairs,) float64
        Angle per position of each plane.
    factor : float
        Multiplies the rotated coordinates.
    pairing : {"half", "interleaved"}
        Planes (b, b + pairs) or (2b, 2b + 1).
    """

    theta: NDArray[np.float64]
    factor: float
    pairing: str


def rotate_rows(
    X: NDArray,
    positions: NDArray[np.int64],
    planes: Planes,
    *,
    adjoint: bool = False,
    threads: int = 1,
    out: NDArray | None = None,
) -> NDArray:
    """y_i = factor R_{p_i} x_i, or with `adjoint` factor R_{p_i}^T x_i, for rows x_i of X.

    Parameters
    ----------
    X : (..., n, d) float32 or float64
        Any strides. d is at least twice the number of planes; coordinates past that are copied.
    positions : int64
        Broadcasts to (..., n).
    planes : Planes
    adjoint : bool
        Transpose the rotations.
    threads : int
        The most that are used; the result does not depend on it.
    out : (..., n, d) array, optional
        Where the result is written: C-contiguous, of X's dtype. It may be X.

    Returns
    -------
    (..., n, d) array
        C-contiguous, of X's dtype.

    Notes
    -----
    Time O(n d). Memory for the result, 8 n bytes where positions do not start at 0, and 16 bytes a plane for each
    block of 512 positions in which one of them lies.
    """
    if not (X.flags.aligned and X.dtype.isnative and all(s % X.itemsize == 0 for s in X.strides)):
        X = X.astype(X.dtype.newbyteorder("="), order="C")
    if out is None:
        out = np.empty(X.shape, X.dtype)
    if X.size == 0:
        return out
    # The transpose is the rotation by -theta, to the last bit, since cos is even and sin is odd.
    theta, factor = -planes.theta if adjoint else planes.theta, planes.factor
    blocks, positions = _split(np.asarray(positions, np.int64))
    if isinstance(blocks, range):
        coarse = _coarse_table(blocks, theta.tobytes(), factor)
    else:
        coarse = _table(blocks * _rotary.FINE, theta) * factor
    lead = X.shape[:-2]
    strides = (0,) * len(lead) + positions.strides
    if positions.shape != X.shape[-2:-1]:
        strides = np.broadcast_to(positions, X.shape[:-1]).strides
    offsets = _offsets(lead, strides[:-1], positions.itemsize)
    _rotary.rotate(
        (X, _offsets(lead, X.strides[:-2], X.itemsize)),
        (positions.reshape(-1), offsets, strides[-1] // positions.itemsize),
        (coarse, _fine_table(theta.tobytes())),
        out,
        planes.pairing == "interleaved",
        # A thread that gets fewer coordinates costs more than it saves.
        max(1, min(threads, X.size // 16384)),
    )
    return out


def _split(positions: NDArray[np.int64]) -> tuple[range | NDArray[np.int64], NDArray[np.int64]]:
    """The blocks of 512 positions in which positions lie, and the positions as if these blocks were 0, 1, 2, ...

    A position is 512 a + b with 0 <= b < 512. Returned are all a in ascending order, and for each position
    512 (index of its a) + b.
    """
    first, last = (int(p) // _rotary.FINE for p in (positions.min(), positions.max()))
    if last - first <= 8 + positions.size // 16:
        blocks = range(first, last + 1)
        return blocks, positions - first * _rotary.FINE if first else np.ascontiguousarray(positions)
    # Positions are far apart, and a table of all blocks between them would cost more than sorting.
    blocks, index = np.unique(positions // _rotary.FINE, return_inverse=True)
    return blocks, index.reshape(positions.shape) * _rotary.FINE + positions % _rotary.FINE


def _table(positions: NDArray[np.int64], theta: NDArray[np.float64]) -> NDArray[np.float64]:
    """A row for each position p: cos(p theta_b) for all b, then sin(p theta_b)."""
    # theta is split into its upper 26 and its lower 27 bits. Both products with an integer are then exact, so that no
    # angle is rounded.
    high = (theta.view(np.int64) & ~np.int64(2**27 - 1)).view(np.float64)
    large = np.multiply.outer(positions, high)
    small = np.multiply.outer(positions, theta - high)
    table = np.empty((len(positions), 2 * len(theta)))
    table[:, : len(theta)] = np.cos(large) * np.cos(small) - np.sin(large) * np.sin(small)
    table[:, len(theta) :] = np.sin(large) * np.cos(small) + np.cos(large) * np.sin(small)
    return table


@lru_cache(maxsize=8)
def _fine_table(theta: bytes) -> NDArray[np.float64]:
    """The table of positions 0 to 511, kept for later calls with the same frequencies, which are given as bytes."""
    table = _table(np.arange(_rotary.FINE), np.frombuffer(theta))
    table.flags.writeable = False
    return table


@lru_cache(maxsize=8)
def _coarse_table(blocks: range, theta: bytes, factor: float) -> NDArray[np.float64]:
    """factor times the table of the first position of each block, kept for later calls of the same length."""
    table = _table(np.arange(blocks.start, blocks.stop) * _rotary.FINE, np.frombuffer(theta)) * factor
    table.flags.writeable = False
    return table


@lru_cache(maxsize=32)
def _offsets(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> NDArray[np.intp]:
    """Where the rows of each index of the leading axes begin, counted in elements from the first entry."""
    offsets = np.zeros(shape, np.intp)
    for axis, (length, stride) in enumerate(zip(shape, strides, strict=True)):
        steps = np.arange(length, dtype=np.intp) * (stride // itemsize)
        offsets += steps.reshape((-1,) + (1,) * (len(shape) - axis - 1))
    offsets.flags.writeable = False
    return offsets.reshape(-1)


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
        raise ValueError(f"positions: got shape {positions.shape}, wants ({n},), or {rows} where leading axes may be 1")
    return positions.astype(np.int64, copy=False)
