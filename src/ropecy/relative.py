"""What depends on the offset alone: biases b_{j-i} that are added to scores, and families W_{i-j} in the place of R."""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .approximation import bias_forms as forms

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
    RelativeBias.alibi, RelativeBias.t5, RelativeBias.kerple : without a table of all offsets.

    Examples
    --------
    >>> RelativeBias([-1.0, 0.0, 0.5])
    RelativeBias(table of float64 (3,))
    """

    __slots__ = ("_form", "_values", "heads")

    def __init__(self, table: ArrayLike) -> None:
        table = _floats("table", table)
        if table.ndim not in (1, 2) or (table.ndim == 2 and len(table) == 0):
            raise ValueError(f"table: got shape {table.shape}, wants (2T-1,) or (h, 2T-1)")
        if table.shape[-1] % 2 == 0:
            raise ValueError(f"table: got length {table.shape[-1]}, wants an odd one, 2T - 1 for offsets -(T-1) to T-1")
        self._set(table, forms.Table(table.shape[-1]), heads=table.shape[0] if table.ndim == 2 else None)

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

        Notes
        -----
        In float32 the slope's gradient, a sum over all distances, carries rounding of about 1e-7 n^1.5 times the size
        of dO and V where the polynomial engine computes it.

        Examples
        --------
        >>> RelativeBias.alibi([0.5, 0.25]).heads
        2
        """
        slope = _per_head("slope", slope)
        return cls._of(slope, forms.Linear(), heads=slope.shape[0] if slope.ndim else None)

    @classmethod
    def t5(
        cls, table: ArrayLike, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
    ) -> RelativeBias:
        r"""b_t = table[bucket(t)], the bias of T5: near offsets have buckets of their own, far ones share them.

        Parameters
        ----------
        table : (num_buckets,) or (h, num_buckets) float32 or float64
            The transpose of what transformers calls ``relative_attention_bias.weight``.
        num_buckets : int
        max_distance : int
            From here on all offsets of a side share the last bucket.
        bidirectional : bool
            Keys after the query have half of the buckets; else they share bucket 0 with the query's own.

        Returns
        -------
        RelativeBias

        Raises
        ------
        TypeError
            A table of another type than float32 or float64, numbers that are not integers.
        ValueError
            Another length than num_buckets, fewer than 4 buckets (2 where not bidirectional) or an odd number, a
            max_distance that the near buckets cover, or NaN or Inf.

        Examples
        --------
        >>> RelativeBias.t5(np.zeros((12, 32))).heads
        12
        """
        table = _floats("table", table)
        num_buckets, max_distance = _integer("num_buckets", num_buckets), _integer("max_distance", max_distance)
        bidirectional = bool(bidirectional)
        least = 4 if bidirectional else 2
        if num_buckets < least or num_buckets % 2:
            raise ValueError(f"num_buckets: got {num_buckets}, wants an even number, at least {least}")
        if table.ndim not in (1, 2) or table.shape[-1] != num_buckets or len(table) == 0:
            raise ValueError(f"table: got shape {table.shape}, wants ({num_buckets},) or (h, {num_buckets})")
        near = num_buckets // (4 if bidirectional else 2)
        if max_distance <= near:
            raise ValueError(f"max_distance: got {max_distance}, wants more than the {near} buckets of single offsets")
        form = forms.Buckets(num_buckets, max_distance, bidirectional)
        return cls._of(table, form, heads=table.shape[0] if table.ndim == 2 else None)

    @classmethod
    def kerple(cls, r1: ArrayLike, r2: ArrayLike, variant: str = "log") -> RelativeBias:
        r"""b_t = -r1 log(1 + r2 \|t\|), or -r1 \|t\|^r2 ("power"): the biases of KERPLE (arXiv:2205.09921).

        Parameters
        ----------
        r1, r2 : float or (h,) float32 or float64
            Above 0; r2 at most 2 for "power". The polynomial engine takes r2 < 1 there.
        variant : {"log", "power"}

        Returns
        -------
        RelativeBias
            Whose gradient is (2,) or (2, h): that of r1, then that of r2.

        Raises
        ------
        TypeError
            Of another type than float32 or float64, or of two.
        ValueError
            Shapes that disagree, numbers out of range, NaN or Inf, another variant.

        Examples
        --------
        >>> RelativeBias.kerple([1.0, 2.0], [0.1, 0.1]).heads
        2
        """
        r1, r2 = _per_head("r1", r1), _per_head("r2", r2)
        if r1.dtype != r2.dtype:
            raise TypeError(f"r2: got dtype {r2.dtype}, wants that of r1, {r1.dtype}")
        if r1.shape != r2.shape:
            raise ValueError(f"r2: got shape {r2.shape}, wants that of r1, {r1.shape}")
        if variant not in ("log", "power"):
            raise ValueError(f"variant: got {variant!r}, wants 'log' or 'power'")
        for name, r in (("r1", r1), ("r2", r2)):
            if not np.all(r > 0):
                raise ValueError(f"{name}: got {r.min()}, wants numbers above 0")
        if variant == "power" and not np.all(r2 <= 2):
            raise ValueError(f"r2: got {r2.max()}, wants at most 2 where variant is 'power'")
        form = forms.Power() if variant == "power" else forms.Logarithmic()
        return cls._of(np.stack([r1, r2]), form, heads=r1.shape[0] if r1.ndim else None)

    @classmethod
    def _of(cls, values: NDArray, form: forms.Form, heads: int | None) -> RelativeBias:
        bias = cls.__new__(cls)
        values.flags.writeable = False
        bias._set(values, form, heads)
        return bias

    def _set(self, values: NDArray, form: forms.Form, heads: int | None) -> None:
        for name, value in (("_values", values), ("_form", form), ("heads", heads)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"RelativeBias is immutable: cannot set {name}")

    def __reduce__(self) -> tuple:
        return RelativeBias._of, (self._values, self._form, self.heads)

    def __repr__(self) -> str:
        return f"RelativeBias({_SAID[type(self._form)]} of {self._values.dtype} {self._values.shape})"

    def _rows(self) -> NDArray[np.float64]:
        """What it was built of, a row for each head."""
        values = self._values.astype(np.float64)
        if isinstance(self._form, forms.Logarithmic):
            values = values.T
        return values.reshape(self.heads or 1, -1)

    def _symbol(self, t_min: int, t_max: int) -> NDArray[np.float64]:
        """b_t for t_min <= t <= t_max: (h or 1, t_max - t_min + 1) float64."""
        return self._form.symbol(self._rows(), np.arange(t_min, t_max + 1))

    def _tail(self, longest: int, tolerance: float) -> forms.Tail | None:
        """How exp(b_t) factors up to |t| = longest, sums of exponentials being right within `tolerance`."""
        return self._form.tail(self._rows(), longest, tolerance)

    def _gradient(
        self, dsymbol: NDArray[np.float64] | None, t_min: int, far: forms.FarGradient | None = None
    ) -> NDArray:
        """The adjoint of `_symbol`: (h or 1, m) at offsets t_min, t_min + 1, ..., and what lies in a far field, with
        heads likewise -> the shape and dtype of what built it.
        """
        rows = self._rows()
        gradient = np.zeros(rows.shape)
        if dsymbol is not None:
            gradient += self._form.gradient(rows, np.arange(t_min, t_min + dsymbol.shape[1]), dsymbol)
        if far is not None:
            gradient += self._form.far_gradient(rows, far)
        if isinstance(self._form, forms.Logarithmic):
            gradient = gradient.T
        return gradient.reshape(self._values.shape).astype(self._values.dtype)


_SAID = {
    forms.Table: "table",
    forms.Linear: "slope",
    forms.Buckets: "buckets",
    forms.Logarithmic: "r1, r2 of a logarithm",
    forms.Power: "r1, r2 of a power",
}


class RelativeFamily:
    r"""W_{i-j} in the place of R_{j-i}: any matrices of the offset, with entries on a common support S.

    The score of query i and key j is ``scale Q_i W_t K_j^T``, t = (i + q_offset) - j. RoPE is one member of this
    family, on \|S\| = 2 d pairs: W_t = R_{-t}.

    Parameters
    ----------
    values : (M, d, d) or (M, \|S\|) float32 or float64
        ``values[t + n_k - 1]`` is W_t, for t from -(n_k - 1) on; past its ends the family goes on with its first and
        last matrix.
    n_k : int, optional
        Which of the values is W_0. By default the number of keys that the family meets; M must then be n + n_k - 1.
    support : (\|S\|, 2) integers, optional
        The pairs (a, b) whose entries W_t[a, b] `values` holds, one for each column; all others are 0, and have no
        gradient. By default all pairs.

    Raises
    ------
    TypeError
        Values of another type than float32 or float64, pairs or n_k of another kind than integers.
    ValueError
        Shapes that disagree, NaN or Inf, n_k outside 1 to M, a negative index, a pair that comes twice.

    Notes
    -----
    The general family of arXiv:2505.11892 and arXiv:2412.17316. It doesn't factor, so that the engines are "exact",
    about n n_k \|S\| operations, and "fft", where each monomial is a multiset of S with a Toeplitz matrix of its own.
    All heads share it. Its gradient, ``g.dR``, has the shape and dtype of `values`.

    Examples
    --------
    >>> RelativeFamily(np.ones((9, 2)), support=[(0, 0), (1, 1)])
    RelativeFamily(2 entries at 9 offsets, float64)
    """

    __slots__ = ("_pairs", "_values", "n_k")

    def __init__(self, values: ArrayLike, n_k: int | None = None, support: ArrayLike | None = None) -> None:
        values = _floats("values", values)
        if support is None:
            if values.ndim != 3 or values.shape[1] != values.shape[2]:
                raise ValueError(f"values: got shape {values.shape}, wants (M, d, d), or (M, |S|) beside support=")
            pairs = None
        else:
            pairs = _pairs(support)
            if values.ndim != 2 or values.shape[1] != len(pairs):
                raise ValueError(
                    f"values: got shape {values.shape}, wants (M, {len(pairs)}), a column for each pair of support"
                )
        if values.size == 0:
            raise ValueError(f"values: got shape {values.shape}, wants at least one offset and one entry")
        if n_k is not None:
            if isinstance(n_k, (bool, np.bool_)) or not hasattr(n_k, "__index__"):
                raise TypeError(f"n_k: got {type(n_k).__name__} {n_k!r}, wants an integer")
            n_k = operator.index(n_k)
            if not 1 <= n_k <= len(values):
                raise ValueError(f"n_k: got {n_k}, wants 1 to {len(values)}, for values[n_k - 1] is W_0")
        for name, value in (("_values", values), ("_pairs", pairs), ("n_k", n_k)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(f"RelativeFamily is immutable: cannot set {name}")

    def __reduce__(self) -> tuple:
        return RelativeFamily, (self._values, self.n_k, self._pairs)

    def __repr__(self) -> str:
        entries = self._values[0].size
        return f"RelativeFamily({entries} entries at {len(self._values)} offsets, {self._values.dtype})"

    @property
    def _width(self) -> int:
        """d where values are (M, d, d), else the least d that the support fits into."""
        return self._values.shape[1] if self._pairs is None else int(self._pairs.max()) + 1

    @property
    def _dense(self) -> bool:
        """Whether every pair is in the support."""
        return self._pairs is None

    def _table(self, n_k: int) -> tuple[NDArray, NDArray[np.intp], int]:
        """Values (M, |S|), pairs (|S|, 2), and the index of W_0 beside n_k keys."""
        M = len(self._values)
        pairs = np.argwhere(np.ones(self._values.shape[1:])) if self._pairs is None else self._pairs
        return self._values.reshape(M, -1), pairs, (n_k if self.n_k is None else self.n_k) - 1

    def _gradient(self, dvalues: NDArray[np.float64]) -> NDArray:
        """The gradient of `values` from that of the (M, |S|) of `_table`."""
        return dvalues.reshape(self._values.shape).astype(self._values.dtype)


def _pairs(support: ArrayLike) -> NDArray[np.intp]:
    """A read-only copy of `support`, checked."""
    pairs = np.array(support)
    if pairs.dtype.kind not in "iu":
        raise TypeError(f"support: got dtype {pairs.dtype}, wants integers")
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"support: got shape {pairs.shape}, wants (|S|, 2), a pair of indices for each entry")
    pairs = pairs.astype(np.intp)
    negative = np.flatnonzero((pairs < 0).any(axis=1))
    if negative.size:
        raise ValueError(f"support: got the pair {_shown(pairs[negative[0]])}, wants indices from 0 on")
    found, count = np.unique(pairs, axis=0, return_counts=True)
    if np.any(count > 1):
        raise ValueError(f"support: got the pair {_shown(found[count > 1][0])} twice, wants every pair once")
    pairs.flags.writeable = False
    return pairs


def _shown(pair: NDArray[np.intp]) -> str:
    return str(tuple(int(index) for index in pair))


def _per_head(name: str, values: ArrayLike) -> NDArray:
    """One number, or one for each head."""
    values = _floats(name, float(values) if type(values) is int else values)
    if values.ndim > 1 or values.size == 0:
        raise ValueError(f"{name}: got shape {values.shape}, wants a number or (h,)")
    return values


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, wants an integer") from None


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
