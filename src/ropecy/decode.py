"""Attention token by token, on a state whose size does not depend on how many tokens there have been."""

from __future__ import annotations

import functools
import json
import math
import os
import threading
import zipfile
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import _decode_bounds as bounds
from . import _validate, _validate_decode
from . import polynomial as poly
from .certificate import BoundedEntryError, Certificate
from .engines import exact as exact_engine
from .engines import polynomial as polynomial_engine
from .kernels import _monomials
from .memory import available_memory, fits
from .problem import Problem
from .relative import RelativeBias
from .rotary import Rotary, rotate_rows

_VERSION = 2
# Weights below e^-650 are 0: no result shows them, and their products are subnormal, which is slow.
_VANISHED = -650.0
# Elements of keys and values that `extend` works on at a time.
_PIECE = 2**21

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _one_call_at_a_time(method: _Method) -> _Method:
    """The method, which raises RuntimeError while another call of such a method works on the same state."""

    @functools.wraps(method)
    def guarded(self: DecodeState, *args: Any, **kwargs: Any) -> Any:
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError(
                f"{method.__name__}: got a state that another call is working on, wants one call at a time; "
                "a lock around the calls, or a copy() of the state for each thread, helps"
            )
        try:
            return method(self, *args, **kwargs)
        finally:
            self._in_use.release()

    return guarded  # type: ignore[return-value]


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
        Every entry of a result is within eps * (max_j v_jc - min_j v_jc).
    bound : float
        B: each key and each query must have \|scale\| \|\|x\|\|^2 <= B (after R, where an attention factor lengthens
        it), so that every score is within [-B, B]. Past it by rounding is allowed.
    scale : float, optional
        By default 1/d.
    dtype : dtype, optional
        Of what is passed and returned: float32, float64, float16 or bfloat16. By default that of the first keys.
        The state itself is float64.
    window : int, optional
        How many of the last tokens, the newest among them, are exact: one softmax with the others.
    bias : RelativeBias, optional
        ``RelativeBias.alibi(slope)``, slopes of at least 0: one, or one for each query head.
    on_break : {"raise", "exact"}
        What happens to a key or a query past `bound`. "raise": BoundedEntryError, and the state is as it was.
        "exact": keys and values are kept from the start, so a query past `bound` is answered from them, and so is
        every query once a key was past it. It costs what the state is there to save: memory of d + d_v numbers a
        token, and, where it answers, time in proportion to the text.

    Raises
    ------
    TypeError, ValueError
        Arguments of the wrong kind or out of range.
    NotImplementedError
        A bias by another rule, or a family in the place of R: no state of fixed size holds them.
    BoundedEntryError
        No degree certifies eps for this bound; a ValueError.
    MemoryError
        The state is larger than what the machine has left; with the first tokens, if for their heads alone.

    Notes
    -----
    With F = C(d + g, g) monomials for degree g, a token takes 2 F (d_v + 1) operations for a key head and as many for
    a query head, and 8 F (d_v + 1) bytes are kept for a key head, whatever the length of the text; a window adds
    w (d + d_v + 1). Where the query heads of a key head have different slopes, each has a state of its own, and this
    counts for query heads. Weights stay positive under a bias, so it changes nothing in the proof. The method is that
    of arXiv:2412.17316 and arXiv:2505.11892 for a running sum; decays: certificates.md, section 7. Features and sums
    are float64 for float32 data too: ten million tokens lose no digit, and larger bounds can be certified. One state
    serves one call at a time: what is called while another thread's call works on the same state raises RuntimeError,
    but for `length`, `nbytes` and `repr`.

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
        bias: RelativeBias | None = None,
        on_break: str = "raise",
    ) -> None:
        self._options = o = _validate_decode.check_decode(
            d, d_v, R, eps=eps, bound=bound, scale=scale, dtype=dtype, window=window, bias=bias, on_break=on_break
        )
        self._in_use = threading.Lock()
        self._length = 0
        self._largest = 0.0
        self._dtype = o.dtype
        self._lead: tuple[int, ...] | None = None
        # state, ring_keys, ring, centre; and with on_break="exact" keys and values, which have room to grow.
        self._arrays: dict[str, np.ndarray] = {}
        self._decoder: _monomials.Decoder | None = None
        # Slopes of the heads of a bias, later those of the states of each key head, (H, 1 or queries a key head).
        self._slopes = np.zeros(1) if o.bias is None else np.atleast_1d(o.bias._values)
        # What both factors of a score are multiplied by before they are rotated.
        self._root = np.full(o.d, math.sqrt(abs(o.scale)))
        if R is not None:
            self._theta, factor = R._frequencies(1)
            self._root[: R.rotary_dim] *= factor
        # What can't be had shows now, as far as it doesn't depend on a dtype and heads that are still to come.
        self._polynomial = bounds.polynomial(o, o.dtype or np.dtype(np.float64), self._slopes)
        self._check_memory(1, 1)

    # ---- what it is ----

    @property
    def length(self) -> int:
        """How many tokens there have been."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of the state: 0 before the first token, then the same for ever, unless on_break="exact"."""
        return sum(array.nbytes for array in self._arrays.values())

    @property
    @_one_call_at_a_time
    def certificate(self) -> Certificate:
        """What is promised of results in units of max_c range_j(v_jc), values being of the size of their range.

        Of the polynomial, unless a key was past `bound` and all is exact since. The rounding of a result to its dtype
        is not counted.
        """
        o, p, dtype = self._options, self._polynomial, self._dtype or np.dtype(np.float64)
        if self._exact:
            rounding = bounds.exact_rounding(o.d, dtype, self._slopes, self._length, self._largest)
            return Certificate("exact", None, None, self._largest, "exact", 0.0, rounding)
        return Certificate(
            engine="polynomial",
            degree=p.degree,
            n_features=poly.n_features(o.d, p.degree),
            bound=p.B,
            rule="worst case",
            truncation=poly.tau(p.error),
            rounding=bounds.rounding(self._limit(dtype), dtype, self._slopes),
        )

    def __repr__(self) -> str:
        o = self._options
        return (
            f"DecodeState({o.d}, {o.d_v}, {o.R!r}, eps={o.eps:g}, bound={o.bound:g}, scale={o.scale:g}, "
            f"dtype={self._dtype}, window={o.window}, bias={o.bias!r}, on_break={o.on_break!r}): "
            f"{self._length:,} tokens in {self.nbytes:,} bytes"
        )

    # ---- what it does ----

    @_one_call_at_a_time
    def extend(self, K: ArrayLike, V: ArrayLike) -> None:
        """Append n tokens at once (prefill): what n steps would leave, up to rounding.

        Parameters
        ----------
        K, V : (..., n, d), (..., n, d_v) arrays
            Leading axes broadcast, the last of them being that of key heads; the first call says which there are.

        Raises
        ------
        TypeError, ValueError
            Another dtype, other shapes, NaN or Inf. Later tokens must together have the leading axes of the first:
            those of one text are not written to several.
        BoundedEntryError
            A key is past `bound`. The state is then as it was.

        Notes
        -----
        Time 2 n F (d_v + 1) operations for each key head.
        """
        o = self._options
        K, V, lead = _validate_decode.check_tokens(
            {"K": K, "V": V}, (o.d, o.d_v), self._dtype, self._lead, o.bias, single=False
        )
        n = K.shape[-2]
        if n == 0:
            return
        largest = self._enforce("K", K)
        self._begin(lead, K.dtype, largest)

        threads = _validate.default_threads()
        rows = max(1024, _PIECE // (math.prod(lead) * o.d + self._slopes.size * o.d_v))
        k, v, added, gone = *self._recent(), 0.0, 0
        for start in range(0, n, rows):
            piece = slice(start, min(n, start + rows))
            positions = np.arange(piece.start, piece.stop) + self._length
            new_k = self._rotated(self._slots(K[..., piece, :]) * self._root, positions)
            new_v = self._slots(V[..., piece, :])
            if o.on_break == "exact":
                self._remember(self._length + start, new_k, new_v)
            if self._exact:
                continue
            if self._length + start == 0:
                self._arrays["centre"][...] = new_v[:, 0]
            k, v = np.concatenate([k, new_k], axis=1), np.concatenate([v, new_v], axis=1)
            leaving = max(0, k.shape[1] - (o.window or 0))
            if leaving:
                left = np.ascontiguousarray(k[:, :leaving]), np.ascontiguousarray(v[:, :leaving])
                added = self._decay(leaving) * added + self._decayed_states(*left, threads)
                k, v, gone = k[:, leaving:], v[:, leaving:], gone + leaving
        # Nothing that counts was written so far: an interrupted call leaves the state as it was.
        if not self._exact:
            self._arrays["state"][...] = self._decay(gone) * self._arrays["state"] + added
            self._fill_ring(k, v, self._length + n)
        self._length += n

    @_one_call_at_a_time
    def step(self, q: ArrayLike, k: ArrayLike, v: ArrayLike) -> np.ndarray:
        """Append one token, then attend with q at its position.

        Parameters
        ----------
        q : (..., d) array
            Its last leading axis may have a multiple of the key heads (grouped queries): head h uses key head
            h // (heads / key heads).
        k, v : (..., d), (..., d_v) arrays
            Leading axes broadcast.

        Returns
        -------
        (..., d_v) array
            One row for each query, in the dtype of the state.

        Raises
        ------
        TypeError, ValueError
            Another dtype, other shapes, NaN or Inf.
        BoundedEntryError
            The key or the query is past `bound`. The state is then as it was.
        """
        o = self._options
        k, v, lead = _validate_decode.check_tokens(
            {"k": k, "v": v}, (o.d, o.d_v), self._dtype, self._lead, o.bias, single=True
        )
        q = _validate_decode.check_query(q, o.d, k.dtype, lead, o.bias)
        largest_q, largest_k = self._enforce("q", q), self._enforce("k", k)
        self._begin(lead, k.dtype, largest_k)

        new_k, new_v = self._slots(k[..., None, :]) * self._root, self._slots(v[..., None, :])
        rows = self._rotated(np.concatenate([new_k, self._queries(q)], axis=1), np.int64(self._length))
        if o.on_break == "exact":
            self._remember(self._length, rows[:, :1], new_v)
        past = self._exact or largest_q > self._limit(self._dtype)
        result = None
        if not self._exact:
            if self._length == 0:
                self._arrays["centre"][...] = new_v[:, 0]
            for_state = np.ascontiguousarray(rows[:, :1]) if past else rows
            slot = self._length % (o.window or 1)
            result = self._decoder.step(for_state, new_v[:, 0], slot, _validate.default_threads())
        self._length += 1
        return self._to_user(self._from_history(rows[:, 1:]) if past else result, q)

    @_one_call_at_a_time
    def attend(self, q: ArrayLike) -> np.ndarray:
        """Attend with q (..., d) at the position of the last token, without appending one; as in `step`.

        Returns
        -------
        (..., d_v) array
        """
        if self._length == 0:
            raise ValueError("attend: got a state without tokens, wants extend or step first")
        o = self._options
        q = _validate_decode.check_query(q, o.d, self._dtype, self._lead, o.bias)
        largest = self._enforce("q", q)
        rows = self._rotated(self._queries(q), np.int64(self._length - 1))
        if self._exact or largest > self._limit(self._dtype):
            return self._to_user(self._from_history(rows), q)
        slot = (self._length - 1) % (o.window or 1)
        return self._to_user(self._decoder.step(rows, None, slot, _validate.default_threads()), q)

    @_one_call_at_a_time
    def copy(self) -> DecodeState:
        """The same state, independent from here on."""
        other = object.__new__(DecodeState)
        other.__dict__.update(self.__dict__)
        other._in_use = threading.Lock()
        other._arrays = {name: array.copy() for name, array in self._arrays.items()}
        other._connect()
        return other

    __copy__ = copy

    def __deepcopy__(self, memo: dict) -> DecodeState:
        return self.copy()

    @_one_call_at_a_time
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to an npz file, whose name is `path` as it stands; `load` on any machine goes on from it."""
        o, arrays = self._options, dict(self._arrays)
        if "state" in arrays:
            # Without the padding, which depends on the instruction set.
            arrays["state"] = arrays["state"][..., self._filled()]
            for name in ("ring_keys", "ring"):
                arrays[name] = arrays[name][..., : o.window or 0]
        for name in arrays.keys() & {"keys", "values"}:
            arrays[name] = arrays[name][:, : self._length]
        R = o.R and {
            "base": o.R.base,
            "pairing": o.R.pairing,
            "rotary_dim": o.R.rotary_dim,
            "scaling": None if o.R.scaling is None else dict(o.R.scaling),
            "length": o.R.length,
        }
        header = {
            "version": _VERSION,
            "options": {name: getattr(o, name) for name in ("d", "d_v", "eps", "bound", "scale", "window", "on_break")},
            "R": R,
            "slopes": o.bias and o.bias._values.tolist(),
            "dtype": self._dtype and self._dtype.name,
            "lead": self._lead,
            "length": self._length,
            "degree": self._polynomial.degree,
            "largest": self._largest,
        }
        with open(path, "wb") as file:
            np.savez(file, header=np.array(json.dumps(header)), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DecodeState:
        """The state that `save` wrote.

        Raises
        ------
        ValueError
            The file is not one that `save` wrote, or from another version of the format.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                saved = dict(file)
            header = json.loads(str(saved.pop("header")))
            version = header["version"]
        except (ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError):
            raise ValueError(f"path: got {os.fspath(path)!r}, wants a file that DecodeState.save wrote") from None
        if version not in range(1, _VERSION + 1):
            raise ValueError(f"path: got a state of format version {version}, wants {_VERSION} or an earlier one")
        options, R = header["options"], header["R"]
        # Version 1 knew no bias; all else is the same.
        slopes = header.get("slopes")
        bias = None if slopes is None else RelativeBias.alibi(np.array(slopes))
        options |= {"R": R and Rotary(options["d"], **R), "bias": bias, "dtype": header["dtype"]}
        state = cls(**options)
        if state._polynomial.degree != header["degree"]:
            raise ValueError(
                f"path: got a state of degree {header['degree']}, wants {state._polynomial.degree}, "
                "which this version takes for its eps and bound"
            )
        if header["lead"] is None:
            return state
        state._begin(tuple(header["lead"]), state._dtype, 0.0 if "state" in saved else math.inf)
        state._largest = header["largest"]
        for name, array in saved.items():
            if name in ("keys", "values"):
                state._arrays[name] = array
            elif name == "state":
                state._arrays[name][..., state._filled()] = array
            else:
                state._arrays[name][..., : array.shape[-1]] = array
        state._length = header["length"]
        return state

    # ---- inside ----

    @property
    def _exact(self) -> bool:
        """Whether a key was past the bound, and only the history can answer."""
        return self._lead is not None and self._decoder is None

    def _limit(self, dtype: np.dtype) -> float:
        return bounds.limit(self._options.bound, self._options.d, dtype)

    def _sizes(self, X: np.ndarray) -> np.ndarray:
        """|scale| ||x||^2 of every row."""
        rows = X.reshape(-1, X.shape[-1])
        sizes = np.empty(len(rows))
        step = max(1, _PIECE // X.shape[-1])
        with np.errstate(over="ignore"):
            for start in range(0, len(rows), step):
                piece = rows[start : start + step].astype(np.float64) * self._root
                np.einsum("ia,ia->i", piece, piece, out=sizes[start : start + step])
        return sizes.reshape(X.shape[:-1])

    def _enforce(self, name: str, X: np.ndarray) -> float:
        """The largest |scale| ||x||^2; BoundedEntryError where it is past the bound and that is to be an error."""
        sizes = self._sizes(X)
        largest = float(sizes.max(initial=0.0))
        if largest > self._limit(X.dtype) and self._options.on_break == "raise":
            index = tuple(int(i) for i in np.unravel_index(sizes.argmax(), sizes.shape))
            raise BoundedEntryError(
                f"{name}: got a row{f' at index {index}' if index else ''} with |scale| ||x||^2 = {largest:.6g}, wants "
                f"at most bound = {self._options.bound:g}; rows normalised, a larger bound, or on_break='exact' help"
            )
        self._largest = max(self._largest, largest)
        return largest

    def _begin(self, lead: tuple[int, ...], dtype: np.dtype, largest: float) -> None:
        """Make room with the first tokens; from the first key that is past the bound on, keep the history alone."""
        o = self._options
        if self._lead is None:
            self._polynomial = bounds.polynomial(o, dtype, self._slopes)
            heads = math.prod(lead)
            slopes = _slopes_of_states(self._slopes, heads, lead[-1] if lead else 1)
            self._check_memory(heads, slopes.shape[1])
            self._monomials = m = polynomial_engine.decoding_monomials(o.d, self._polynomial)
            lanes, _ = _monomials.blocking(np.float64)
            ring = -(-(o.window or 0) // lanes) * lanes
            self._arrays = {
                "state": np.zeros((slopes.size, o.d_v + 1, m.pitch)),
                "ring_keys": np.zeros((heads, o.d, ring)),
                "ring": np.zeros((heads, o.d_v + 1, ring)),
                "centre": np.zeros((heads, o.d_v)),
            }
            if o.on_break == "exact":
                for name, width in (("keys", o.d), ("values", o.d_v)):
                    self._arrays[name] = np.empty((heads, 0, width), bounds.computed(dtype))
            self._lead, self._dtype, self._slopes = lead, dtype, slopes
            self._connect()
        if largest > self._limit(self._dtype):
            # A new dictionary, for `nbytes` may be reading the old one.
            self._arrays = {name: array for name, array in self._arrays.items() if name in ("keys", "values")}
            self._connect()

    def _connect(self) -> None:
        """The kernel works on the arrays as they now are, if there is still a state among them."""
        a = self._arrays
        self._decoder = None
        if "state" in a:
            arrays = a["state"], a["ring_keys"], a["ring"], a["centre"]
            self._decoder = _monomials.Decoder(self._monomials, *arrays, self._slopes, self._options.window or 0)

    def _check_memory(self, heads: int, states: int) -> None:
        o, features = self._options, poly.n_features(self._options.d, self._polynomial.degree)
        size = 8.0 * heads * ((o.d_v + 1) * states * features + (o.window or 0) * (o.d + o.d_v + 1))
        if not fits(size):
            raise MemoryError(
                f"the state needs {size / 2**30:.3g} GiB ({heads * states} x {features:,} features, degree "
                f"{self._polynomial.degree}), and {available_memory() / 2**30:.3g} GiB are available"
            )

    def _decay(self, tokens: int) -> np.ndarray:
        """How far the states fall with so many tokens."""
        return np.exp(-self._slopes * tokens).reshape(-1, 1, 1)

    def _decayed_states(self, k: np.ndarray, v: np.ndarray, threads: int) -> np.ndarray:
        """sum_j e^{-slope (n - 1 - j)} phi(k_j) [v_j - centre, 1], j < n, as the state has it."""
        centre, slopes = self._arrays["centre"], self._slopes
        if not slopes.any():
            return polynomial_engine.key_states(k, v, self._monomials, centre, threads)
        heads, n, d_v = v.shape
        exponents = -slopes[:, None] * np.arange(n - 1.0, -1.0, -1.0)[:, None]
        weights = np.exp(exponents, where=exponents > _VANISHED, out=np.zeros_like(exponents))
        # States of different slopes are columns beside each other: features are made once.
        columns = np.concatenate([v - centre[:, None], np.ones((heads, n, 1))], axis=2)
        columns = (weights[..., None] * columns[:, :, None]).reshape(heads, n, -1)
        none = np.zeros((heads, columns.shape[2]))
        added = polynomial_engine.key_states(k, columns, self._monomials, none, threads)
        # The last column is the kernel's own, without weights.
        return added[:, :-1].reshape(-1, d_v + 1, added.shape[2])

    def _filled(self) -> np.ndarray:
        """Where in a column of the state the monomials are, in their order."""
        m = self._monomials
        sizes = m.count[:, -1]
        return np.concatenate([start + np.arange(size) for start, size in zip(m.offset, sizes, strict=True)])

    def _slots(self, X: np.ndarray) -> np.ndarray:
        """(..., n, width) as float64 (H, n, width), H all leading axes of the state."""
        if X.shape[:-2] != self._lead:
            X = np.broadcast_to(X, self._lead + X.shape[-2:])
        return np.ascontiguousarray(X.reshape((-1,) + X.shape[-2:]), np.float64)

    def _queries(self, q: np.ndarray) -> np.ndarray:
        """(..., d) as float64 (H, G, d) that are to be rotated; a negative scale has its sign here."""
        rows = q.reshape(math.prod(self._lead), -1, q.shape[-1])
        return rows * math.copysign(1.0, self._options.scale) * self._root

    def _rotated(self, rows: np.ndarray, positions: np.ndarray | np.int64) -> np.ndarray:
        """Rows (H, n, d) in the place of which their rotations are returned."""
        R = self._options.R
        if R is None:
            return rows
        threads = _validate.default_threads()
        return rotate_rows(rows, positions, self._theta, 1.0, R.pairing, threads=threads, out=rows)

    def _to_user(self, o: np.ndarray, q: np.ndarray) -> np.ndarray:
        return o.reshape(q.shape[:-1] + o.shape[-1:]).astype(self._dtype)

    def _recent(self) -> tuple[np.ndarray, np.ndarray]:
        """Rotated keys and values of the ring from the oldest, (H, m, d) and (H, m, d_v)."""
        o = self._options
        if self._exact or not o.window:
            return np.empty((math.prod(self._lead), 0, o.d)), np.empty((math.prod(self._lead), 0, o.d_v))
        slots = self._ring_slots(min(o.window, self._length), self._length)
        values = self._arrays["ring"][:, : o.d_v, slots] + self._arrays["centre"][..., None]
        return self._arrays["ring_keys"][..., slots].swapaxes(1, 2), values.swapaxes(1, 2)

    def _fill_ring(self, k: np.ndarray, v: np.ndarray, length: int) -> None:
        """The ring holds these tokens, the last of the `length` there are."""
        o = self._options
        if o.window:
            slots = self._ring_slots(k.shape[1], length)
            self._arrays["ring_keys"][..., slots] = k.swapaxes(1, 2)
            self._arrays["ring"][:, : o.d_v, slots] = (v - self._arrays["centre"][:, None]).swapaxes(1, 2)
            self._arrays["ring"][:, o.d_v, slots] = 1

    def _ring_slots(self, count: int, length: int) -> np.ndarray:
        return np.arange(length - count, length) % self._options.window

    def _remember(self, position: int, k: np.ndarray, v: np.ndarray) -> None:
        """Write keys, rotated and scaled, and values (H, n, _) into the history, which doubles where it is full."""
        for name, rows in (("keys", k), ("values", v)):
            array, end = self._arrays[name], position + rows.shape[1]
            if end > array.shape[1]:
                array = np.empty((array.shape[0], max(end, 2 * position), array.shape[2]), array.dtype)
                array[:, :position] = self._arrays[name][:, :position]
                self._arrays[name] = array
            array[:, position:end] = rows

    def _from_history(self, rows: np.ndarray) -> np.ndarray:
        """Exact attention of rotated, scaled queries (H, G, d) over all tokens, in what the dtype is computed in."""
        k, v = (np.ascontiguousarray(self._arrays[name][:, : self._length]) for name in ("keys", "values"))
        q = rows.astype(k.dtype)[:, :, None]
        bias = None
        if self._slopes.any():
            bias = -self._slopes[..., None] * np.arange(self._length - 1.0, -1.0, -1.0)
        problem = Problem(
            q=q, k=k, v=v, scale=1.0, q_offset=self._length - 1, bias=bias, threads=_validate.default_threads()
        )
        return exact_engine.forward(problem, math.inf, False)[0]


def _slopes_of_states(slopes: np.ndarray, heads: int, key_heads: int) -> np.ndarray:
    """Slopes of one bias or of all query heads as those of states, (heads, S): S is 1 where groups agree."""
    each = slopes.reshape(1 if slopes.size == 1 else key_heads, -1)
    if (each == each[:, :1]).all():
        each = each[:, :1]
    return np.ascontiguousarray(np.broadcast_to(each, (heads // key_heads, key_heads, each.shape[1]))).reshape(
        heads, -1
    )
