"""Attention token by token, on a state whose size does not depend on how many tokens there have been."""

from __future__ import annotations

import io
import math
import os
import threading
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .approximation import minimax as poly
from .certificate import Certificate
from .decoding import bounds, file
from .decoding.arguments import check_decode, check_query, check_tokens
from .decoding.exclusive import all_or_nothing, one_call_at_a_time
from .decoding.history import History
from .decoding.rows import PIECE, Rows, flat, stored
from .decoding.sums import Sums, slopes_of_key_heads
from .engines.polynomial import features
from .machine.threads import default_threads
from .relative import RelativeBias
from .rotary import Rotary

# The largest number of tokens that `extend` works on at a time; `decoding.bounds.rounding` assumes blocks of that size.
_TOKENS = 2**16


class DecodeState:
    r"""o = sum_j a_j v_j / sum_j a_j, a_j = exp(scale q R_{j-m} k_j^T + b_{j-m}), j <= m, m the last token.

    Instead of its keys and values a text leaves a state of fixed size, ``sum_j phi(k_j) [v_j 1]``, phi being the
    monomials of a polynomial that stands for exp on [-B, B]; the last `window` tokens may be kept beside it and are
    then exact. A bias of slope a is a decay: every token lets the state fall by e^-a.

    Parameters
    ----------
    d, d_v : int
        Widths of keys and queries, and of values.
    R : Rotary, optional
        The rotations; the position of a token is the number of tokens before it. A scaling rule whose angles depend
        on the length of the text needs ``Rotary(..., length=)``.
    eps : float
        Every entry o_c of a result is within eps * (max_j v_jc - min_j v_jc) of the exact one.
    bound : float
        B: each key and each query x must have \|scale\| \|\|x\|\|^2 <= B (after R, where an attention factor lengthens
        it), so that every score is within [-B, B]. It may exceed B by the rounding of x.
    scale : float, optional
        By default 1/d.
    dtype : dtype, optional
        The dtype of arrays that are passed and returned: float32, float64, float16 or bfloat16. By default that of the
        first keys. The state itself is float64.
    window : int, optional
        How many of the last tokens, the newest included, have exact weights, in one softmax with all other tokens.
    near : (int, float), optional
        (w, scale_near): the last w tokens, the newest included, have exact weights of scores with scale_near in the
        place of scale, whatever size these scores have; `bound` and `eps` concern the other tokens. It is the `near` of
        `ropecy.attention`, and takes the place of `window`.
    bias : RelativeBias, optional
        ``RelativeBias.alibi(slope)`` with one slope of at least 0, or one for each query head.
    on_break : {"raise", "exact"}
        What happens to a key or a query past `bound`. "raise": BoundedEntryError, and the state is as it was.
        "exact": keys and values are kept from the start. A query past `bound` is answered from them, and so is every
        query once a key was past it. This costs what the state is there to save: memory of d + d_v numbers for each
        token, and time in proportion to the length of the text for each query that is answered so.

    Raises
    ------
    TypeError, ValueError
        Arguments of the wrong kind or out of range.
    NotImplementedError
        The bias is of another kind, or R is a RelativeFamily: no state of fixed size represents them.
    BoundedEntryError
        No degree certifies eps for this bound; a ValueError.
    MemoryError
        The state is larger than the memory that is left. The first tokens raise it if their number of heads causes it.

    Notes
    -----
    With F = C(d + g, g) monomials for degree g, a token takes 2 F (d_v + 1) operations for a key head and as many for
    a query head, and 16 F (d_v + 1) bytes are kept for a key head, whatever the length of the text: sums in float64,
    and their rounding errors. The last tokens, `window` of them (or w of `near`) and at most 64 more, are kept as they
    are and are exact, which takes 8 (window + 64) (d + d_v + 1) bytes; 64 of them enter the sums together, so one step
    in 64 takes longer than the others. Where the query heads of a key head have different slopes, each query head has
    sums of its own, and these numbers hold for each query head. Weights stay positive under a bias, and those of near
    tokens are exact, so the proof of the error holds as without them. The method is that of arXiv:2412.17316 and
    arXiv:2505.11892 for a running sum. Features and sums are float64 for float32 data too, so that larger bounds can be
    certified. Blocks are added with compensation and decays are exact: ten million tokens lose no digit.

    Values may be of any size in float32 and narrower dtypes. In float64 they are refused past 2^900, since their sums
    would overflow. The error of a result is a fraction of the range of values, plus that of storing it in its dtype.

    One state serves one call at a time: a call while another thread's call works on the same state raises RuntimeError,
    except `length`, `nbytes` and `repr`. A call that is interrupted, as by Ctrl-C, has changed the state wholly or not
    at all; `length` tells which. States can be pickled.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> K, V = rng.uniform(-1, 1, (2, 100, 8))
    >>> state = DecodeState(8, 8, Rotary(8))
    >>> state.extend(K[:99], V[:99])
    >>> o = state.step(K[0], K[99], V[99])
    >>> o.shape, state.length, state.certificate.error <= 1e-3
    ((8,), 100, True)
    """

    def __init__(
        self,
        d: int,
        d_v: int,
        R: Rotary | None = None,
        *,
        eps: float = 1e-3,
        bound: float = 1.0,
        scale: float | None = None,
        dtype: DTypeLike | None = None,
        window: int | None = None,
        near: tuple[int, float] | None = None,
        bias: RelativeBias | None = None,
        on_break: str = "raise",
    ) -> None:
        self._options = o = check_decode(
            d,
            d_v,
            R,
            {
                "eps": eps,
                "bound": bound,
                "scale": scale,
                "dtype": dtype,
                "window": window,
                "near": near,
                "bias": bias,
                "on_break": on_break,
            },
        )
        self._in_use = threading.Lock()
        self._length = 0
        # |scale| ||x||^2: the largest of all keys, and that of the last query if it was answered from the history.
        self._largest = self._asked = 0.0
        self._dtype = o.dtype
        self._lead: tuple[int, ...] | None = None
        self._values: bounds.Values | None = None
        # None before the first token, and from the first key past the bound on, when only the history can answer.
        self._sums: Sums | None = None
        # None before the first token, and always unless on_break="exact".
        self._history: History | None = None
        # The bias's slopes for each head; from the first token on those of each key head's sums, (H, S) as in `Sums`.
        self._slopes = np.zeros(1) if o.bias is None else np.atleast_1d(o.bias._values)
        # A bound or a size that is impossible for every dtype and number of heads is refused here; what depends on them
        # is refused with the first tokens.
        self._polynomial = bounds.polynomial(o, o.dtype or np.dtype(np.float64))
        bounds.check_memory(o, self._polynomial.degree, 1, 1)
        self._rows = Rows(o)

    # ---- what it is ----

    @property
    def length(self) -> int:
        """How many tokens there have been."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of the state: 0 before the first token, afterwards constant, unless on_break="exact"."""
        return sum(array.nbytes for array in self._arrays.values())

    @property
    @one_call_at_a_time
    def certificate(self) -> Certificate:
        """What is promised of the last result, in units of max_c range_j(v_jc) over all tokens and heads.

        Where a key or the query of that result was past `bound`, it is the exact engine's certificate. `rounding`
        includes the error of storing a result in its dtype; `eps` is compared with the error before storing.
        """
        dtype, half, stored = self._dtype or np.dtype(np.float64), 0.0, 0.0
        if self._length:
            # The first value is added to the result in float64, and that sum is rounded.
            stored = 2 * self._values.storing(np.dtype(np.float64))
            if dtype.itemsize == 4:
                stored += self._values.storing(dtype)
            elif dtype.itemsize == 2:
                half = self._values.storing(dtype)
        else:
            stored = float(np.finfo(bounds.computed(dtype)).eps)
        return self._computed(dtype, stored).stored(half)

    def _computed(self, dtype: np.dtype, stored: float) -> Certificate:
        """The certificate of results before they are stored in half precision."""
        o, p = self._options, self._polynomial
        if self._exact or self._asked:
            largest = math.sqrt(self._largest * (self._asked or self._largest))
            reach = max(1.0, abs(o.stretched[1])) * largest
            rounding = bounds.exact_rounding(o.d, dtype, self._slopes, self._length, reach)
            return Certificate("exact", None, None, largest, "exact", 0.0, rounding + stored)
        return Certificate(
            engine="polynomial",
            degree=p.degree,
            n_features=poly.n_features(o.d, p.degree),
            bound=p.B,
            rule="worst case",
            truncation=poly.tau(p.error),
            rounding=bounds.rounding(self._limit(dtype)) + bounds.rounding_of_near(o, self._limit(dtype)) + stored,
        )

    def __repr__(self) -> str:
        o = self._options
        return (
            f"DecodeState({o.d}, {o.d_v}, {o.R!r}, eps={o.eps:g}, bound={o.bound:g}, scale={o.scale:g}, "
            f"dtype={self._dtype}, window={o.window}, near={o.near}, bias={o.bias!r}, on_break={o.on_break!r}): "
            f"{self._length:,} tokens in {self.nbytes:,} bytes"
        )

    # ---- what it does ----

    @one_call_at_a_time
    @all_or_nothing
    def extend(self, K: ArrayLike, V: ArrayLike) -> None:
        """Append n tokens at once (prefill): the state becomes what n steps would make it, up to rounding.

        Parameters
        ----------
        K, V : (..., n, d), (..., n, d_v) arrays
            Leading axes broadcast, the last of them being that of key heads. The first call fixes those of the state.

        Raises
        ------
        TypeError, ValueError
            The dtype or the shapes don't fit, or there is NaN or Inf. K and V, broadcast together, must have the
            leading axes of the first tokens: tokens of one text are not appended to several texts.
        BoundedEntryError
            A key is past `bound`. The state is then as it was.

        Notes
        -----
        The time is that of 2 n F (d_v + 1) operations for each key head.
        """
        o = self._options
        K, V, lead = check_tokens({"K": K, "V": V}, (o.d, o.d_v), self._dtype, self._lead, o.bias, single=False)
        if K.shape[-2] == 0:
            return
        largest = self._rows.within("K", K)
        self._begin(lead, K.dtype, largest)
        if self._length == 0:
            self._values.first[...] = flat(V[..., :1, :], lead)[:, 0]
        pieces = self._pieces(K, V)
        if self._sums is None:
            for _ in pieces:
                pass
        else:
            self._sums.extend(pieces, default_threads())
        self._largest = max(self._largest, largest)
        self._length += K.shape[-2]

    @one_call_at_a_time
    @all_or_nothing
    def step(self, q: ArrayLike, k: ArrayLike, v: ArrayLike) -> np.ndarray:
        """Append one token, then attend with q at its position.

        Parameters
        ----------
        q : (..., d) array
            Its last leading axis may be a multiple of the number of key heads (grouped queries): query head h then uses
            key head h // (heads / key heads).
        k, v : (..., d), (..., d_v) arrays
            The key and the value of the token. Leading axes broadcast.

        Returns
        -------
        (..., d_v) array
            One row for each query, in the dtype of the state.

        Raises
        ------
        TypeError, ValueError
            The dtype or the shapes don't fit, or there is NaN or Inf.
        BoundedEntryError
            The key or the query is past `bound`. The state is then as it was.
        """
        o = self._options
        k, v, lead = check_tokens({"k": k, "v": v}, (o.d, o.d_v), self._dtype, self._lead, o.bias, single=True)
        q = check_query(q, o.d, k.dtype, lead, o.bias)
        largest_q, largest_k = self._rows.within("q", q), self._rows.within("k", k)
        self._begin(lead, k.dtype, largest_k)

        new_k, new_v = self._rows.keys(k[..., None, :], lead), flat(v[..., None, :], lead)
        queries = self._rows.queries(q, lead)
        rows = self._rows.rotated(np.concatenate([new_k, queries], axis=1), np.int64(self._length))
        if self._length == 0:
            self._values.first[...] = new_v[:, 0]
        if self._history is not None:
            self._history.write(self._length, rows[:, :1], new_v)
        past = self._sums is None or largest_q > self._limit(self._dtype)
        result = None
        if self._sums is not None:
            for_sums = np.ascontiguousarray(rows[:, :1]) if past else rows
            result = self._sums.step(for_sums, new_v[:, 0], default_threads())
        self._values.see(new_v)
        self._largest, self._asked = max(self._largest, largest_k), largest_q if past else 0.0
        self._length += 1
        return stored(self._exactly(rows[:, 1:]) if past else result, q)

    @one_call_at_a_time
    @all_or_nothing
    def attend(self, q: ArrayLike) -> np.ndarray:
        """Attend with q (..., d), as in `step`, at the position of the last token, without appending a token.

        Returns
        -------
        (..., d_v) array
        """
        if self._length == 0:
            raise ValueError("attend: got a state without tokens, wants extend or step first")
        o = self._options
        q = check_query(q, o.d, self._dtype, self._lead, o.bias)
        largest = self._rows.within("q", q)
        rows = self._rows.rotated(self._rows.queries(q, self._lead), np.int64(self._length - 1))
        past = self._sums is None or largest > self._limit(self._dtype)
        self._asked = largest if past else 0.0
        result = self._exactly(rows) if past else self._sums.step(rows, None, default_threads())
        return stored(result, q)

    @one_call_at_a_time
    def copy(self) -> DecodeState:
        """A second state with the same contents; later calls on one don't change the other."""
        other = self._draft()
        other._in_use = threading.Lock()
        if self._history is not None:
            other._history = self._history.copy()
        if self._values is not None:
            other._values = self._values.copy()
        if self._sums is not None:
            other._sums = self._sums.copy(other._values.first)
        return other

    __copy__ = copy

    def __deepcopy__(self, memo: dict) -> DecodeState:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        file = io.BytesIO()
        self.save(file)
        return _unpickled, (type(self), file.getvalue())

    @one_call_at_a_time
    def save(self, path: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write the state to an npz file, which `load` can read on any machine.

        Parameters
        ----------
        path : path or binary file object
            A path is used as it is, without adding a suffix. A new file is written beside the old one and takes its
            place when it is complete and on the disk, so that an interrupted call leaves the old one. A file object is
            written to from its current position.
        """
        arrays = {}
        if self._length:
            arrays = {} if self._history is None else self._history.arrays(self._length)
            arrays |= self._values.arrays() | ({} if self._sums is None else self._sums.saved())
        header = {
            "dtype": self._dtype and self._dtype.name,
            "lead": self._lead if self._length else None,
            "length": self._length,
            "folded": self._length if self._sums is None else self._sums.folded,
            "degree": self._polynomial.degree,
            "largest": self._largest,
            "asked": self._asked,
        }
        file.write(path, self._options, header, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str] | IO[bytes]) -> DecodeState:
        """The state in a file that `save` wrote, in this version of the package or an earlier one.

        Parameters
        ----------
        path : path or binary file object
            A file object must be able to seek.

        Raises
        ------
        ValueError
            The file is not one that `save` wrote: every array and every number in it is checked against the options
            before a state is made of them. The message says what is wrong.
        MemoryError
            A state of the size that the file says is larger than the memory that is left.
        OSError
            The file is not there or cannot be read.
        """
        with file.reading(path) as saved:
            header = saved.header
            state = cls(**saved.options())
            if header["lead"] is None:
                saved.check_arrays({})
                return state
            lead, dtype = tuple(header["lead"]), state._dtype
            o = state._options
            exact = o.on_break == "exact" and "state" not in saved.names
            heads, key_heads = math.prod(lead), lead[-1] if lead else 1
            states = slopes_of_key_heads(state._slopes, key_heads).shape[1]
            state._polynomial = bounds.polynomial(o, dtype, header["degree"])
            bounds.check_memory(o, header["degree"], heads, states, 0 if exact else header["length"])
            arrays = saved.arrays(o, heads, heads * states, exact, bounds.computed(dtype))
            state._begin(lead, dtype, math.inf if exact else 0.0, header["degree"])
            if state._history is not None:
                state._history = History(arrays["keys"], arrays["values"], o.stretched)
            file.restore(header, arrays, state._values, state._sums, state._limit(dtype))
            state._length, state._largest, state._asked = header["length"], header["largest"], header["asked"]
        return state

    # ---- inside ----

    def _draft(self) -> DecodeState:
        """A second object with the same arrays, on which a call that may be interrupted works."""
        other = object.__new__(DecodeState)
        other.__dict__.update(self.__dict__)
        if self._lead is not None:
            other._values = self._values.draft()
            other._history = self._history and self._history.draft()
            other._sums = self._sums and self._sums.draft()
        return other

    def _exactly(self, rows: np.ndarray) -> np.ndarray:
        """Exact attention (H, G, d_v) of rotated, scaled queries (H, G, d) over the history."""
        return self._history.attend(rows, self._length, self._values, self._slopes)

    @property
    def _exact(self) -> bool:
        """Whether a key was past the bound, so that only the history can answer."""
        return self._lead is not None and self._sums is None

    @property
    def _arrays(self) -> dict[str, np.ndarray]:
        """All arrays that the state keeps, by name."""
        kept = (self._history, self._values, self._sums)
        return {name: array for part in kept if part is not None for name, array in part.arrays().items()}

    def _limit(self, dtype: np.dtype) -> float:
        return bounds.limit(self._options.bound, self._options.d, dtype)

    def _begin(self, lead: tuple[int, ...], dtype: np.dtype, largest: float, degree: int | None = None) -> None:
        """Allocate arrays when the first tokens come, and drop the sums for good at the first key past the bound.

        `largest` is the largest |scale| ||k||^2 of the new keys.
        """
        o = self._options
        if self._lead is None:
            self._polynomial = bounds.polynomial(o, dtype, degree)
            heads, key_heads = math.prod(lead), lead[-1] if lead else 1
            slopes = slopes_of_key_heads(self._slopes, key_heads)
            bounds.check_memory(o, self._polynomial.degree, heads, slopes.shape[1])
            self._slopes = np.tile(slopes, (heads // len(slopes), 1))
            self._values = bounds.Values.none(heads, o.d_v)
            monomials = features.decoding_monomials(o.d, self._polynomial)
            self._sums = Sums(monomials, self._slopes, o, self._values.first)
            if o.on_break == "exact":
                self._history = History.empty(heads, o, bounds.computed(dtype))
            self._lead, self._dtype = lead, dtype
        if largest > self._limit(self._dtype):
            self._sums = None

    def _pieces(self, K: np.ndarray, V: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rotated keys (H, n, d) and values (H, n, d_v), piece by piece.

        Each piece is also written into the history, if there is one, and its values update the ranges of columns.
        """
        o, n = self._options, K.shape[-2]
        rows = PIECE // (math.prod(self._lead) * o.d + self._slopes.size * o.d_v)
        rows = min(_TOKENS, max(1024, rows))
        for start in range(0, n, rows):
            piece = slice(start, min(n, start + rows))
            positions = np.arange(piece.start, piece.stop) + self._length
            k = self._rows.rotated(self._rows.keys(K[..., piece, :], self._lead), positions)
            v = flat(V[..., piece, :], self._lead)
            if self._history is not None:
                self._history.write(self._length + start, k, v)
            self._values.see(v)
            yield k, v


def _unpickled(cls: type[DecodeState], content: bytes) -> DecodeState:
    return cls.load(io.BytesIO(content))
