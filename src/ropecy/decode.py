"""Attention token by token, on a state whose size does not depend on how many tokens there have been."""

from __future__ import annotations

import io
import os
import threading
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .certificate import Certificate
from .decoding import bounds, file, saved
from .decoding.arguments import check_counts, check_decode, check_query, check_streams, check_tokens
from .decoding.exclusive import all_or_nothing, one_call_at_a_time
from .decoding.rows import Rows, stored
from .decoding.streams import Streams
from .relative import RelativeBias
from .rotary import Rotary


class DecodeState:
    r"""o = sum_j a_j v_j / sum_j a_j, a_j = exp(scale q R_{j-m} k_j^T + b_{j-m}), j <= m, m the last token.

    Instead of its keys and values a text leaves a state of fixed size, ``sum_j phi(k_j) [v_j 1]``, phi being the
    monomials of a polynomial that stands for exp on [-B, B]; the last `window` tokens may be kept beside it and are
    then exact. A bias of slope a is a decay: every token lets the state fall by e^-a.

    An index of all leading axes of keys but the last, which is that of key heads, is a stream: a text of its own, with
    a length, positions and a certificate of its own, which no other stream changes.

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
    near : (int, float or (heads,) array), optional
        (w, scale_near): the last w tokens, the newest included, have exact weights of scores with scale_near in the
        place of scale, whatever size these scores have; `bound` and `eps` concern the other tokens. scale_near is one
        number, or one for each query head. It is the `near` of `ropecy.attention`, and takes the place of `window`.
    bias : RelativeBias, optional
        ``RelativeBias.alibi(slope)`` with one slope of at least 0, or one for each query head.
    on_break : {"raise", "exact"}
        What happens to a key or a query past `bound`. "raise": BoundedEntryError, and the state is as it was.
        "exact": keys and values are kept from the start. A query past `bound` is answered from them, and so is every
        query of a stream once a key of it was past it. This costs what the state is there to save: memory of d + d_v
        numbers for each token, and time in proportion to the length of the text for each query that is answered so.

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
    are and are exact, which takes 8 (window + 65) (d + d_v + 1) bytes; 64 of them enter the sums together, so one step
    in 64 takes longer than the others. Where the query heads of a key head have different slopes, each query head has
    sums of its own, and these numbers hold for each query head. Weights stay positive under a bias, and those of near
    tokens are exact, so the proof of the error holds as without them. The method is that of arXiv:2412.17316 and
    arXiv:2505.11892 for a running sum. Features and sums are float64 for float32 data too, so that larger bounds can be
    certified. Blocks are added with compensation and decays are exact: ten million tokens lose no digit.

    Values may be of any size in float32 and narrower dtypes. In float64 they are refused past 2^900, since their sums
    would overflow. The error of a result is a fraction of the range of values, plus that of storing it in its dtype.

    One state serves one call at a time: a call while another thread's call works on the same state raises RuntimeError,
    except `length`, `lengths`, `nbytes` and `repr`. A call that is interrupted, as by Ctrl-C, has changed the state
    wholly or not at all; `lengths` tells which. States can be pickled.

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
        near: tuple[int, ArrayLike] | None = None,
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
        self._dtype = o.dtype
        # A bound or a size that is impossible for every dtype and number of heads is refused here; what depends on them
        # is refused with the first tokens.
        self._polynomial = bounds.polynomial(o, o.dtype or np.dtype(np.float64))
        bounds.check_memory(o, self._polynomial.degree, 1, 1)
        self._rows = Rows(o)
        # None before the first tokens.
        self._streams: Streams | None = None

    # ---- what it is ----

    @property
    def length(self) -> int:
        """How many tokens there have been; ValueError where streams have had different numbers: see `lengths`."""
        lengths = self.lengths
        if (lengths != lengths.flat[0]).any():
            raise ValueError(f"length: got streams of {lengths.min()} to {lengths.max()} tokens, wants `lengths`")
        return int(lengths.flat[0])

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each stream has had, of the shape of all leading axes but the last; () before the first."""
        return np.zeros((), np.intp) if self._streams is None else self._streams.lengths.copy()

    @property
    def nbytes(self) -> int:
        """Bytes of the state: 0 before the first token, afterwards constant, unless on_break="exact"."""
        return 0 if self._streams is None else self._streams.nbytes

    @property
    @one_call_at_a_time
    def certificate(self) -> Certificate:
        """What is promised of the last result: the worst of `certificates`."""
        found = self._certificates
        return max(found.flat, key=lambda certificate: certificate.error)

    @property
    @one_call_at_a_time
    def certificates(self) -> np.ndarray:
        """What is promised of each stream's last result, of the shape of `lengths`.

        Errors are in units of max_c range_j(v_jc) over all tokens and heads of the stream. Where a key or the query of
        that result was past `bound`, it is the exact engine's certificate. `rounding` includes the error of storing a
        result in its dtype; `eps` is compared with the error before storing.
        """
        return self._certificates

    @property
    def _certificates(self) -> np.ndarray:
        lengths = self.lengths
        found = np.empty(lengths.size, object)
        for i in range(lengths.size):
            if self._streams is None:
                dtype = self._dtype or np.dtype(np.float64)
                stored = float(np.finfo(bounds.computed(dtype)).eps)
                found[i] = bounds.certificate(self._options, self._polynomial, dtype, stored)
            else:
                found[i] = self._streams.certificate(i)
        return found.reshape(lengths.shape)

    def __repr__(self) -> str:
        o, lengths = self._options, np.unique(self.lengths)
        tokens = f"{lengths[0]:,}" if lengths.size == 1 else f"{lengths[0]:,} to {lengths[-1]:,}"
        return (
            f"DecodeState({o.d}, {o.d_v}, {o.R!r}, eps={o.eps:g}, bound={o.bound:g}, scale={o.scale:g}, "
            f"dtype={self._dtype}, window={o.window}, near={o.near}, bias={o.bias!r}, on_break={o.on_break!r}): "
            f"{tokens} tokens in {self.nbytes:,} bytes"
        )

    # ---- what it does ----

    @one_call_at_a_time
    @all_or_nothing
    def extend(
        self, K: ArrayLike, V: ArrayLike, *, active: ArrayLike | None = None, lengths: ArrayLike | None = None
    ) -> None:
        """Append n tokens at once (prefill): the state becomes what n steps would make it, up to rounding.

        Parameters
        ----------
        K, V : (..., n, d), (..., n, d_v) arrays
            Leading axes broadcast, the last of them being that of key heads. The first call fixes those of the state.
        active : bool array, optional
            Which streams the tokens come to, in the shape of `lengths`. Rows of others are not read.
        lengths : integer array, optional
            In the place of `active`: each stream takes its first so many of the n rows, and others are not read.

        Raises
        ------
        TypeError, ValueError
            The dtype or the shapes don't fit, or there is NaN or Inf. K and V, broadcast together, must have the
            leading axes of the first tokens: tokens of one text are not appended to several texts.
        BoundedEntryError
            A key is past `bound`; its index says in which stream. The state is then as it was.

        Notes
        -----
        The time is that of 2 n F (d_v + 1) operations for each key head. Streams of one length that take as many tokens
        are worked on together, and others in turn.
        """
        told = {"active": active, "lengths": lengths}
        K, V, lead, counts = check_tokens({"K": K, "V": V}, self._options, *self._form, told, single=False)
        n = K.shape[-2]
        if n == 0:
            return
        sizes = self._rows.sizes(K)
        self._rows.within("K", sizes, K.dtype)
        streams = self._begun(lead, K.dtype)
        counts = np.full(streams.sums.length.size, n) if counts is None else counts
        if counts.any():
            streams.extend(K, V, counts, sizes.max(axis=-1))

    @one_call_at_a_time
    @all_or_nothing
    def step(self, q: ArrayLike, k: ArrayLike, v: ArrayLike, *, active: ArrayLike | None = None) -> np.ndarray:
        """Append one token, then attend with q at its position.

        Parameters
        ----------
        q : (..., d) array
            Its last leading axis may be a multiple of the number of key heads (grouped queries): query head h then uses
            key head h // (heads / key heads).
        k, v : (..., d), (..., d_v) arrays
            The key and the value of the token. Leading axes broadcast.
        active : bool array, optional
            Which streams take the token, in the shape of `lengths`. Rows of others are not read, and their results are
            0.

        Returns
        -------
        (..., d_v) array
            One row for each query, in the dtype of the state.

        Raises
        ------
        TypeError, ValueError
            The dtype or the shapes don't fit, or there is NaN or Inf.
        BoundedEntryError
            The key or the query is past `bound`; its index says in which stream. The state is then as it was.
        """
        o, told = self._options, {"active": active}
        k, v, lead, counts = check_tokens({"k": k, "v": v}, o, *self._form, told, single=True)
        q = check_query(q, o, k.dtype, lead, counts)
        rows, sizes = self._rows.of_step(q, k, lead)
        streams = self._begun(lead, k.dtype)
        which = np.arange(streams.sums.length.size) if counts is None else np.flatnonzero(counts)
        return stored(streams.step(rows, v, which, sizes), q)

    @one_call_at_a_time
    @all_or_nothing
    def attend(self, q: ArrayLike, *, active: ArrayLike | None = None) -> np.ndarray:
        """Attend with q (..., d), as in `step`, at the position of the last token, without appending a token.

        Returns
        -------
        (..., d_v) array
            0 for streams that are not `active`, of which nothing is read.
        """
        streams = self._streams
        if streams is None:
            raise ValueError("attend: got a state without tokens, wants extend or step first")
        counts = check_counts({"active": active}, streams.lead, 1)
        which = np.arange(streams.sums.length.size) if counts is None else np.flatnonzero(counts)
        q = check_query(q, self._options, self._dtype, streams.lead, counts)
        if not streams.sums.length[which].all():
            raise ValueError("attend: got a stream without tokens, wants extend or step first, or it not active")
        rows, sizes = self._rows.of_step(q, None, streams.lead)
        return stored(streams.step(rows, None, which, sizes), q)

    @one_call_at_a_time
    @all_or_nothing
    def reset(self, streams: Any = ...) -> None:
        """Let streams have no tokens, so that others can begin in their place; other streams stay as they are.

        Parameters
        ----------
        streams : index, optional
            What indexes an array in the shape of `lengths`: an integer, integers, a slice, bools. By default all.

        Raises
        ------
        ValueError
            The index does not fit `lengths`.
        """
        if self._streams is None:
            check_streams(streams, ())
            return
        self._streams.reset(np.unique(check_streams(streams, self._streams.lead)))

    @one_call_at_a_time
    def select(self, streams: Any) -> DecodeState:
        """A second state of some streams of this one, copied, in another order or repeated.

        Parameters
        ----------
        streams : index
            What indexes an array in the shape of `lengths`: the streams of the new state are what it gives. From one
            text without an axis of streams, ``select(None)`` makes a state with one. To add a stream, repeat one and
            `reset` it.

        Returns
        -------
        DecodeState
            Later calls on it don't change this one. Sums are shared until a state changes them, so that branches of a
            long text cost the bytes of their last tokens at first.

        Raises
        ------
        ValueError
            The index does not fit `lengths`, gives no stream, or there are no tokens yet.

        Examples
        --------
        >>> state = DecodeState(2, 1)
        >>> state.extend(np.zeros((3, 1, 4, 2)), np.ones((3, 1, 4, 1)), lengths=[1, 4, 2])
        >>> state.select([1, 1, 0]).lengths
        array([4, 4, 1])
        """
        if self._streams is None:
            raise ValueError("select: got a state without tokens, wants extend or step first")
        chosen = check_streams(streams, self._streams.lead)
        if chosen.size == 0:
            raise ValueError(f"streams: got an index of no stream (shape {chosen.shape}), wants at least one")
        return self._apart(self._streams.select(chosen))

    @one_call_at_a_time
    def copy(self) -> DecodeState:
        """A second state with the same contents; later calls on one don't change the other."""
        streams = self._streams
        return self._apart(streams and streams.select(np.arange(streams.sums.length.size).reshape(streams.lead[:-1])))

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
        file.write(path, self._options, *saved.contents(self._dtype, self._polynomial.degree, self._streams))

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
        with file.reading(path) as source:
            state = cls(**source.options())
            streams = saved.streams(source, state._options, state._rows)
            if streams is not None:
                state._streams, state._dtype, state._polynomial = streams, streams.dtype, streams.polynomial
        return state

    # ---- inside ----

    @property
    def _form(self) -> tuple[np.dtype | None, tuple[int, ...] | None]:
        """The dtype and the leading axes that tokens must have, where they are known."""
        return self._dtype, self._streams and self._streams.lead

    def _begun(self, lead: tuple[int, ...], dtype: np.dtype) -> Streams:
        """The streams, which are made when the first tokens come."""
        if self._streams is None:
            self._streams = Streams(self._options, self._rows, lead, dtype)
            self._dtype, self._polynomial = dtype, self._streams.polynomial
        return self._streams

    def _draft(self) -> DecodeState:
        """A second object with the same arrays, on which a call that may be interrupted works."""
        other = object.__new__(DecodeState)
        other.__dict__.update(self.__dict__)
        other._streams = self._streams and self._streams.draft()
        return other

    def _apart(self, streams: Streams | None) -> DecodeState:
        """A second object like this one, but for its streams, which calls may work on at the same time."""
        other = object.__new__(DecodeState)
        other.__dict__.update(self.__dict__)
        other._streams, other._in_use = streams, threading.Lock()
        return other


def _unpickled(cls: type[DecodeState], content: bytes) -> DecodeState:
    return cls.load(io.BytesIO(content))
