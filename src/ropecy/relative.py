"""What depends on the offset alone: biases b_{j-i} that are added to scores, and families W_{i-j} in the place of R."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["RelativeBias", "RelativeFamily"]


class RelativeBias:
    r"""b_{j-i}, added to the score of query i and key j.

    Parameters
    ----------
    table : (2T-1,) or (h, 2T-1) float32 or float64
        ``table[t + T - 1]`` is b_t for the offset t = j - (i + q_offset), \|t\| < T; past its ends the table goes on
        with its first and last value. A leading axis gives each head a table.

    Attributes
    ----------
    heads : int or None
        h, or None where all heads share one bias.

    Raises
    ------
    TypeError
        Of another type than float32 or float64: integers, complex numbers, objects.
    ValueError
        Of even length, of the wrong number of axes, empty, or with NaN or Inf.

    See Also
    --------
    RelativeBias.alibi : -slope \|t\| without a table.

    Examples
    --------
    >>> RelativeBias([-1.0, 0.0, 0.5])
    RelativeBias(table of float64 (3,))
    """

    __slots__ = ("_linear", "_values", "heads")

    def __init__(self, table: ArrayLike) -> None:
        table = _floats("table", table)
        if table.ndim not in (1, 2) or (table.ndim == 2 and len(table) == 0):
            raise ValueError(f"table: got shape {table.shape}, wants (2T-1,) or (h, 2T-1)")
        if table.shape[-1] % 2 == 0:
            raise ValueError(f"table: got length {table.shape[-1]}, wants an odd one, 2T - 1 for offsets -(T-1) to T-1")
        self._set(table, linear=False, heads=table.shape[0] if table.ndim == 2 else None)

    @classmethod
    def alibi(cls, slope: ArrayLike) -> RelativeBias:
        r"""b_t = -slope \|t\|, the bias of ALiBi.

        Parameters
        ----------
        slope : float or (h,) float32 or float64
            One slope, or one for each head.

        Returns
        -------
        RelativeBias

        Raises
        ------
        TypeError
            Of another type than float32 or float64.
        ValueError
            More than one axis, empty, or NaN or Inf.

        Examples
        --------
        >>> RelativeBias.alibi([0.5, 0.25]).heads
        2
        """
        slope = _floats("slope", float(slope) if type(slope) is int else slope)
        if slope.ndim > 1 or slope.size == 0:
            raise ValueError(f"slope: got shape {slope.shape}, wants a number or (h,)")
        bias = cls.__new__(cls)
        bias._set(slope, linear=True, heads=slope.shape[0] if slope.ndim else None)
        return bias

    def _set(self, values: NDArray, linear: bool, heads: int | None) -> None:
        for name, value in (("_values", values), ("_linear", linear), ("heads", heads)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"RelativeBias is immutable: cannot set {name}")

    def __reduce__(self) -> tuple:
        return (RelativeBias.alibi if self._linear else RelativeBias), (self._values,)

    def __repr__(self) -> str:
        return f"RelativeBias({'slope' if self._linear else 'table'} of {self._values.dtype} {self._values.shape})"

    def _symbol(self, t_min: int, t_max: int) -> NDArray[np.float64]:
        """b_t for t_min <= t <= t_max: (h or 1, t_max - t_min + 1) float64."""
        t = np.arange(t_min, t_max + 1)
        if self._linear:
            return np.multiply.outer(np.atleast_1d(self._values).astype(np.float64), -np.abs(t))
        return np.atleast_2d(self._values)[:, self._index(t)].astype(np.float64)

    def _gradient(self, dsymbol: NDArray[np.float64], t_min: int) -> NDArray:
        """The adjoint of `_symbol`: (h or 1, m) at offsets t_min, t_min + 1, ... -> the shape and dtype of what built
        it. What lies past the ends of a table goes to its ends; d slope = -sum_t |t| dsymbol_t.
        """
        t = np.arange(t_min, t_min + dsymbol.shape[1])
        if self._linear:
            gradient = -(dsymbol * np.abs(t)).sum(axis=1)
        else:
            width = self._values.shape[-1]
            gradient = np.stack([np.bincount(self._index(t), weights=row, minlength=width) for row in dsymbol])
        return gradient.reshape(self._values.shape).astype(self._values.dtype)

    def _index(self, t: NDArray[np.int64]) -> NDArray[np.int64]:
        last = self._values.shape[-1] - 1
        return np.clip(t + last // 2, 0, last)


class RelativeFamily:
    """W_{i-j} in the place of R_{j-i}: any matrices of the offset with entries on a common support S.

    The general family of arXiv:2505.11892, of which RoPE is one member.

    Parameters
    ----------
    values : (M, d, d) or (M, |S|) array
        ``values[t + n_k - 1]`` is W_t for the offset t = (i + q_offset) - j.
    n_k : int, optional
        The number of keys.
    support : (|S|, 2) integers, optional
        The index pairs that `values` holds. By default all.

    Raises
    ------
    NotImplementedError
        Always: no engine does a family yet.
    """

    def __init__(self, values: ArrayLike, n_k: int | None = None, support: ArrayLike | None = None) -> None:
        raise NotImplementedError("RelativeFamily: no engine of this version does a general family")


def _floats(name: str, values: ArrayLike) -> NDArray:
    """A read-only copy of `values`, checked for its type and for NaN and Inf."""
    array = np.array(values)
    if array.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name}: got dtype {array.dtype}, wants float32 or float64")
    if not np.isfinite(array).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        where = f" at {at}" if at else ""
        raise ValueError(f"{name}: got {array[at]}{where}, wants finite numbers")
    array.flags.writeable = False
    return array
