"""One sequence over the ranks of an MPI communicator: each holds a contiguous piece, in the order of ranks.

Import it by name, ``import ropecy.mpi``; it needs mpi4py (``pip install "ropecy[mpi]"``). Every function is collective:
all ranks call it, with the same options. Arguments and results are those of the functions of the same name in
`ropecy`, where Q, K, V (and E, dO, key_mask, positions) are the rank's piece. Lengths may differ between ranks, pieces
may be empty, and rows need not be cut where keys are. Indices and default positions count through all pieces.

What is bad on one rank raises on all of them, with the rank named.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike

from . import _validate
from ._network import Exchange, Network, Traffic
from ._ranks import Ranks
from ._sender import Sender
from .approximation.bias_forms import FarGradient
from .attention import VJP
from .bounds import Measured, measure, measure_values
from .engines import polynomial as polynomial_engine
from .engines import scan as scan_engine
from .engines.ring import Layout, Ring
from .gradients import Gradients, LossGradients
from .normal import Normal, normal_form
from .options import Options
from .plan import Certificate, Plan, make_plan, nothing_to_do, wants_sample
from .problem import Call, Origin, Problem, check, check_names, key_heads_of, length_of
from .relative import RelativeFamily
from .rotary import Rotary
from .sample import Sample

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Network", "attention", "attention_vjp", "loss_grad", "plan"]


@overload
def attention(
    comm: Any, Q: ArrayLike, K: ArrayLike, V: ArrayLike, R: Rotary | None = None, *,
    return_certificate: Literal[False] = False, return_lse: Literal[False] = False, **options: Unpack[Options],
) -> np.ndarray: ...
@overload
def attention(
    comm: Any, Q: ArrayLike, K: ArrayLike, V: ArrayLike, R: Rotary | None = None, *,
    return_certificate: Literal[True], return_lse: Literal[False] = False, **options: Unpack[Options],
) -> tuple[np.ndarray, Certificate]: ...
@overload
def attention(
    comm: Any, Q: ArrayLike, K: ArrayLike, V: ArrayLike, R: Rotary | None = None, *,
    return_certificate: Literal[False] = False, return_lse: Literal[True], **options: Unpack[Options],
) -> tuple[np.ndarray, np.ndarray]: ...
@overload
def attention(
    comm: Any, Q: ArrayLike, K: ArrayLike, V: ArrayLike, R: Rotary | None = None, *,
    return_certificate: Literal[True], return_lse: Literal[True], **options: Unpack[Options],
) -> tuple[np.ndarray, Certificate, np.ndarray]: ...
@overload
def attention(
    comm: Any, Q: ArrayLike, K: ArrayLike, V: ArrayLike, R: Rotary | None = None, *,
    return_certificate: bool = False, return_lse: bool = False, **options: Unpack[Options],
) -> np.ndarray | tuple[Any, ...]: ...
def attention(
    comm: Any,
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    R: Rotary | None = None,
    *,
    return_certificate: bool = False,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> np.ndarray | tuple[Any, ...]:
    """The rank's rows of D^-1 A V, the sequence being that of all ranks.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Whose ranks hold the pieces.
    Q, K, V : (..., n, d), (..., n_k, d), (..., n_k, d_v) arrays
        The rank's piece; leading axes, widths and dtype are those of all ranks.
    R, return_certificate, return_lse, **options
        As in `ropecy.attention`, the same on all ranks; `key_mask`, `q_positions` and `k_positions` speak of the
        piece, `threads` of the rank. `q_offset` is the index of the first row of all among all keys.

    Returns
    -------
    O, certificate, lse
        As `ropecy.attention` gives them: the rank's rows, and the certificate of the whole.

    Raises
    ------
    TypeError, ValueError, BoundedEntryError, NotImplementedError, MemoryError
        As `ropecy.attention` does, on every rank, and ValueError where ranks disagree.

    Notes
    -----
    The polynomial engine moves one state of F (d_v + 1) float64 whatever the length is, F = C(d + g, g). Under a causal
    mask, rows that lie on other ranks than the keys of their indices go there first, and their results come back; those
    past all keys go to the last rank. A bias or a near field that factors far out has a state for each of its terms,
    which decays on its way, and its near pairs take pieces of the nearest ranks only. The exact engine moves half of
    all pieces through every rank, with each pair of ranks at work once. The same ranks give the same bits.

    Certificates are of the whole, by moments of scores too, but for the fourth at degrees 2 and 3: rows that fail are
    told to all ranks, which compute them over their own keys. Outliers are not set apart.
    """
    flags = {"return_certificate": return_certificate, "return_lse": return_lse}
    evaluation = _Evaluation(Ranks(comm), "attention", Q, K, V, R, options, flags=flags)
    extra = ([evaluation.certificate] if return_certificate else []) + ([evaluation.lse] if return_lse else [])
    O = evaluation.call.to_user(evaluation.o)
    return (O, *extra) if extra else O


def attention_vjp(
    comm: Any,
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    R: Rotary | None = None,
    **options: Unpack[Options],
) -> tuple[np.ndarray, VJP]:
    """The rank's rows of D^-1 A V, and the map from its rows of dO to gradients.

    Parameters
    ----------
    comm, Q, K, V, R, **options
        As in `attention`.

    Returns
    -------
    O : (..., n, d_v) array
    vjp : VJP
        As in `ropecy.attention_vjp`, and collective: ``g.dQ``, ``g.dK``, ``g.dV`` are the rank's piece of the gradient
        of ``<dO, O>`` summed over all ranks; ``g.dW``, ``g.dW_Q``, ``g.dW_K``, ``g.dW_V``, ``g.dbias``,
        ``g.dscale_near`` are whole on every rank.

    Raises
    ------
    TypeError, ValueError, BoundedEntryError, NotImplementedError, MemoryError
        As `attention` does.
    """
    evaluation = _Evaluation(Ranks(comm), "attention_vjp", Q, K, V, R, options, grad=True)
    return evaluation.call.to_user(evaluation.o.copy()), _VJP(evaluation)


def loss_grad(
    comm: Any,
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    E: ArrayLike,
    R: Rotary | None = None,
    **options: Unpack[Options],
) -> LossGradients:
    """The gradients of L = 1/2 || D^-1 A V - E ||_F^2 over all ranks' rows.

    Parameters
    ----------
    comm, Q, K, V, R, **options
        As in `attention`.
    E : (..., n, d_v) array
        The rank's rows of the target.

    Returns
    -------
    LossGradients
        As `ropecy.loss_grad` gives them: ``g.loss`` and the gradients of projections and biases are whole on every
        rank, ``g.O``, ``g.dQ``, ``g.dK``, ``g.dV`` the rank's piece.

    Raises
    ------
    TypeError, ValueError, BoundedEntryError, NotImplementedError, MemoryError
        As `attention` does.
    """
    ranks = Ranks(comm)
    evaluation = _Evaluation(ranks, "loss_grad", Q, K, V, R, options, grad=True, target=E)
    dO, largest = ranks.together(evaluation.difference)
    loss = 0.5 * ranks.total(np.einsum("i,i->", dO.reshape(-1), dO.reshape(-1), dtype=np.float64))
    return LossGradients(
        loss=float(loss),
        O=evaluation.call.to_user(evaluation.o),
        **evaluation.gradients(dO, largest),
        certificate=evaluation.gradient_certificate,
    )


def plan(
    comm: Any,
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike | None = None,
    R: Rotary | None = None,
    *,
    grad: bool = False,
    network: Network | None = None,
    **options: Unpack[Options],
) -> Plan:
    """What `attention` would do with these pieces, and what its ranks would send one another.

    Parameters
    ----------
    comm, Q, K, V, R, **options
        As in `attention`; V may be left out.
    grad : bool
        Plan for `attention_vjp` and one call of what it returns.
    network : Network, optional
        Latency and bandwidth between ranks. By default measured, in some milliseconds once for each communicator.

    Returns
    -------
    Plan
        As `ropecy.plan` gives it, the same on all ranks but for ``plan.exchange.own``, which is the rank's.
        ``plan.exchange`` has bytes, messages and seconds; of the exact engine, whose messages travel while it computes,
        these are the seconds there are to hide.

    Raises
    ------
    TypeError, ValueError, BoundedEntryError, NotImplementedError, MemoryError
        As `attention` does.

    Notes
    -----
    Norms, means and ranges are measured, O(n d) a rank; no attention is computed.
    """
    if isinstance(V, Rotary | RelativeFamily) and R is None:
        V, R = None, V
    ranks = Ranks(comm)
    ranks.together(_check_network, network)
    ranks.agree({"network": network})
    call, layout = _prepare(ranks, "plan", Q, K, V, R, options, {"grad": grad})
    whole, piece = _whole(ranks, call, layout)
    problem = replace(call.problem, lo=whole.lo, hi=whole.hi)
    if not whole.empty:
        problem = _normal_form(ranks, problem, whole, grad).problem
        whole = replace(whole, scale=problem.scale, near=problem.near)
    looked = False
    if whole.empty:
        made = make_plan(whole, **call.how, grad=grad)
    else:
        measured = _measured(ranks, call, problem, whole, grad)
        made, looked = _make_plan(ranks, call, whole, piece, measured, grad), measured.sample is not None
    masked = any(ranks.gather(problem.key_mask is not None))
    own = Sender(call, problem, layout, ranks.rank, masked, grad).traffic(made, looked)
    everyone = ranks.gather(own)
    worst = Traffic(*(max(getattr(t, name) for t in everyone) for name in ("sent", "received", "messages")))
    made.exchange = Exchange(ranks.size, own, worst, network or ranks.network())
    made.certificate = made.certificate.stored(made.storing(call.dtype))
    return made


class _VJP(VJP):
    """The rank's dO -> its gradients; all ranks call it together."""

    __slots__ = ()

    def __call__(self, dO: ArrayLike) -> Gradients:
        evaluation = self._evaluation
        call = evaluation.call

        def checked() -> tuple[np.ndarray, float]:
            X = _validate.check_like("dO", dO, call.dtype, call.shape)
            return X, _validate.check_finite("dO", X)

        gradients = evaluation.gradients(*evaluation.ranks.together(checked))
        return Gradients(**gradients, certificate=evaluation.gradient_certificate)


class _Evaluation:
    """One call's forward pass, and its backward pass as often as asked, on every rank."""

    def __init__(
        self,
        ranks: Ranks,
        function: str,
        Q: Any,
        K: Any,
        V: Any,
        R: Any,
        options: Mapping[str, Any],
        *,
        grad: bool = False,
        flags: dict[str, Any] | None = None,
        target: Any = None,
    ) -> None:
        self.ranks = ranks
        self.call, layout = _prepare(ranks, function, Q, K, V, R, options, flags or {})
        want_lse = bool(flags and flags["return_lse"])
        self._target = None if target is None else ranks.together(self._checked_target, target)
        whole, piece = _whole(ranks, self.call, layout)
        problem = self._problem = replace(self.call.problem, lo=whole.lo, hi=whole.hi)
        self._normal = Normal(problem)
        self._saved = self._judged = self._at_keys = self._ring = self._cuts = self._pieces = None
        if whole.empty:
            self.o = np.zeros(problem.q.shape[:3] + problem.v.shape[2:], problem.q.dtype)
            lse = np.full(problem.q.shape[:3], -np.inf)
            self.certificate = self.gradient_certificate = nothing_to_do()
        else:
            self._normal = normal = _normal_form(ranks, problem, whole, grad)
            problem = self._problem = normal.problem
            whole = replace(whole, scale=problem.scale, near=problem.near)
            measured = _measured(ranks, self.call, problem, whole, grad)
            made = _make_plan(ranks, self.call, whole, piece, measured, grad)
            masked = any(ranks.gather(problem.key_mask is not None))
            symbol = None if whole.bias is None else self.call.symbol
            pieces = scan_engine.Pieces(ranks, layout, masked, symbol)
            o, lse = self._forward(made, pieces, grad, want_lse or normal.needs_lse)
            self.o = normal.output(o, lse)
            lse = normal.log_sums(lse) if want_lse else None
            self.certificate = self.certificate.stored(made.storing(self.call.dtype))
            rows = self.certificate.rows_truncation
            if rows is None:
                rows = np.full(self.o.shape[:3], self.certificate.truncation)
            self.certificate = replace(self.certificate, rows_truncation=self.call.lse_to_user(rows))
            if grad and (rows := self.gradient_certificate.rows_truncation) is not None:
                rows = self.call.lse_to_user(rows)
                self.gradient_certificate = replace(self.gradient_certificate, rows_truncation=rows)
        self.lse = self.call.lse_to_user(lse) if want_lse else None

    def _forward(
        self, made: Plan, pieces: scan_engine.Pieces, grad: bool, want_lse: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """o and lse of this rank's rows as planned; notes what backward needs, and the certificate."""
        ranks, layout, problem = self.ranks, pieces.layout, self._problem
        self.certificate, self.gradient_certificate = made.certificate, made.gradient_certificate
        if made._split is not None:
            self._pieces = pieces
            o, lse, self._saved = scan_engine.forward(
                problem, made._split, made._scores, made._values, made._choice.polynomial, grad, want_lse, pieces
            )
            return o, lse
        if made.engine == "exact":
            self._cuts = None
            self._ring = Ring(problem, layout, ranks, made._scores.plain, pieces.masked, pieces.symbol)
            return self._ring.forward()
        if problem.hi is not None and not layout.aligned:
            self._cuts, problem = _rows_at_keys(ranks, problem, layout)
        if made.judged:
            found = made.forward_judged(problem, want_lse, ranks)
            if found is None:
                return self._forward(made._second, pieces, grad, want_lse)
            o, lse, self._judged, self._at_keys = found.o, found.lse, found, problem
            self.certificate = self._rows_back(found.certificate)
            self.gradient_certificate = self._rows_back(found.gradient_certificate) if grad else None
        else:
            self._at_keys = problem
            o, lse, self._saved = polynomial_engine.forward(
                problem, made._scores, made._values, made._choice.polynomial, grad, want_lse, ranks=ranks
            )
        return self._back(o), self._back(lse) if want_lse else None

    def gradients(self, dO: np.ndarray, largest: float) -> dict[str, np.ndarray]:
        """{"dQ": ..., ...} for the rank's dO, in the shape of its O, max |dO| = largest."""
        ranks, call = self.ranks, self.call
        largest = float(ranks.largest(np.array(largest)))
        do, exponent = self._normal.upstream(call.from_user(dO), largest)
        shared = _Shared(call)
        if self._ring is not None:
            dq, dk, dv = self._ring.backward(do, shared)
        elif self._pieces is not None:
            dq, dk, dv, far = scan_engine.backward(self._problem, self._saved, do, shared)
            if far is not None:
                shared.add_diagonals(far, 0)
        elif self._at_keys is not None:
            do = do if self._cuts is None else ranks.recut(do, *self._cuts)
            if self._judged is not None:
                dq, dk, dv, _ = self._judged.backward(self._at_keys, do, ranks)
            else:
                dq, dk, dv, _ = polynomial_engine.backward(self._at_keys, self._saved, do, ranks)
            dq = self._back(dq)
        else:
            dq, dk, dv = (np.zeros_like(X) for X in (self._problem.q, self._problem.k, self._problem.v))
        near = None if call.problem.near is None else ranks.total(shared.near)
        exponents = self._normal.exponents(exponent)
        gradients = call.gradients(dq, dk, dv, None, dscale_near=near, exponents=exponents, ranks=ranks)
        if "dbias" in gradients:
            gradients["dbias"] = shared.bias(ranks, exponents.scores)
        return gradients

    def _back(self, X: np.ndarray) -> np.ndarray:
        """Rows that were computed at their keys, on the ranks that asked for them."""
        return X if self._cuts is None else self.ranks.recut(X, *self._cuts[::-1])

    def _rows_back(self, certificate: Certificate) -> Certificate:
        rows = certificate.rows_truncation
        return certificate if rows is None else replace(certificate, rows_truncation=self._back(rows))

    def difference(self) -> tuple[np.ndarray, float]:
        """O - E in the dtype computed in, and its largest entry."""
        call = self.call
        with np.errstate(over="ignore"):
            E = self._target.astype(self.o.dtype, copy=False)
            dO = self.o[..., : call.shape[-1]].reshape(call.shape) - E
        return dO, _validate.check_finite("O - E", dO)

    def _checked_target(self, E: Any) -> np.ndarray:
        E = _validate.check_like("E", E, self.call.dtype, self.call.shape, broadcast=True)
        _validate.check_finite("E", E)
        return E


class _Shared:
    """This rank's part of the gradients of a bias and of scale_near, gathered in float64."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._bias: Any = None
        self.near = np.float64(0)

    def add_scale_near(self, part: np.float64) -> None:
        self.near += part

    def add_diagonals(self, part: np.ndarray | FarGradient, first: int) -> None:
        """The bias's, as `Call.bias_gradient` takes it."""
        found = self._call.bias_gradient(part, first).astype(np.float64)
        self._bias = found if self._bias is None else self._bias + found

    def bias(self, ranks: Ranks, exponent: int) -> np.ndarray:
        """Of all ranks."""
        nothing = self._call.bias_gradient(None, 0)
        own = nothing.astype(np.float64) if self._bias is None else self._bias
        return np.ldexp(ranks.total(own), exponent).astype(nothing.dtype)


def _prepare(
    ranks: Ranks, function: str, Q: Any, K: Any, V: Any, R: Any, options: Mapping[str, Any], flags: dict[str, Any]
) -> tuple[Call, Layout]:
    """The rank's call, with indices and positions that go on where the rank before ends, and the layout of all."""

    def checked():
        for name, value in flags.items():
            _validate.check_flag(name, value)
        check_names(function, options)
        if function != "plan":
            _validate.check_values(V)
        if isinstance(R, RelativeFamily):
            raise NotImplementedError("R: got a RelativeFamily, which attention over MPI ranks does not do")
        return check(Q, K, V, R, **options)

    a, how = ranks.together(checked)
    ranks.agree({**_facts(function, a, how, options), **flags})
    lengths = np.array(ranks.gather((a.n, a.n_k)))
    starts = np.cumsum(lengths, axis=0) - lengths
    layout = Layout(*lengths.T.tolist(), *starts.T.tolist(), a.q_offset, a.lo, a.hi)
    q_start, k_start = layout.q_start[ranks.rank], layout.k_start[ranks.rank]
    a.q_offset += q_start - k_start
    if a.R is not None:
        a.q_positions += q_start if options.get("q_positions") is None else 0
        a.k_positions += k_start if options.get("k_positions") is None else 0
    lengths, heads = zip(*ranks.gather((length_of(a), key_heads_of(a))), strict=True)
    call = ranks.together(Call, a, how, length=max(lengths), least_key_heads=int(np.lcm.reduce(heads)))
    return call, layout


def _facts(function: str, a: _validate.Arguments, how: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What all ranks must agree upon, by the names that the user knows."""

    def rows(name: str) -> Any:
        X = options.get(name)
        return None if X is None else f"an array of leading axes {np.shape(X)[:-1]}"

    given = {name: getattr(a, name) for name in "QKV" if getattr(a, name) is not None}
    return {
        "function": function,
        "arrays": ", ".join(given),
        "dtype": str(a.dtype),
        "d": a.d,
        "d_v": a.d_v,
        **{f"leading axes of {name}": X.shape[:-2] for name, X in given.items()},
        **{f"width of {name}": X.shape[-1] for name, X in given.items()},
        **{name: _digest(getattr(a, name)) for name in ("W", "W_Q", "W_K", "W_V")},
        "R": repr(a.R),
        "scale": a.scale,
        "causal and window (as a band)": (a.lo, a.hi),
        "near": a.near,
        "bias": None if a.bias is None else (repr(a.bias), _digest(a.bias._values)),
        "q_offset": a.q_offset,
        **{name: rows(name) for name in ("key_mask", "q_positions", "k_positions")},
        **how,
    }


def _digest(X: np.ndarray | None) -> str | None:
    if X is None:
        return None
    content = hashlib.blake2b(np.ascontiguousarray(X), digest_size=8).hexdigest()
    return f"an array {X.shape} of content {content}"


def _whole(ranks: Ranks, call: Call, layout: Layout) -> tuple[Problem, Problem]:
    """The problem of all ranks and the largest piece of it, of shapes and masks only: neither takes memory."""
    own = call.problem
    H, G, _, d = own.q.shape
    a = call._arguments
    everyone = ranks.gather((own.threads, own.key_mask is None or bool(own.key_mask.any())))
    threads, kept = zip(*everyone, strict=True)

    masked = any(ranks.gather(own.key_mask is not None))
    any_kept = any(k and n_k for k, n_k in zip(kept, layout.n_k, strict=True))

    def shaped(n: int, n_k: int, threads: int) -> Problem:
        zero = np.zeros((), own.q.dtype)
        first, last = -(n - 1) - layout.q_offset, n_k - 1 - layout.q_offset
        return Problem(
            q=np.broadcast_to(zero, (H, G, n, d)),
            k=np.broadcast_to(zero, (H, n_k, d)),
            v=np.broadcast_to(zero, (H, n_k, own.v.shape[2])),
            scale=own.scale,
            lo=None if a.lo is not None and a.lo <= first else a.lo,
            hi=None if a.hi is not None and a.hi >= last else a.hi,
            q_offset=layout.q_offset,
            near=own.near,
            key_mask=None if any_kept else np.zeros((H, n_k), np.bool_),
            threads=threads,
            origin=Origin(hidden=masked),
        )

    whole = shaped(sum(layout.n), sum(layout.n_k), sum(threads))
    # Causal rows that the polynomial engine moves to their keys count where they are most.
    rows = np.diff(layout.rows_at_keys()).tolist() if whole.hi is not None and not layout.aligned else []
    piece = shaped(max(layout.n + rows), max(layout.n_k), max(threads))
    if a.bias is not None and not whole.empty:
        first, last = -(sum(layout.n) - 1) - layout.q_offset, sum(layout.n_k) - 1 - layout.q_offset
        whole.bias, whole.tail = call.symbol(first, last), call.tail
    return whole, piece


def _normal_form(ranks: Ranks, problem: Problem, whole: Problem, grad: bool) -> Normal:
    """That of this rank's piece, all ranks being of one mind; rounding before it is that of the worst rank."""
    own = problem.origin
    lost = ranks.largest(np.array([own.q_lost, own.k_lost, own.v_lost])).tolist()
    return normal_form(replace(problem, origin=Origin(*lost)), ranks, grad)


def _measured(ranks: Ranks, call: Call, problem: Problem, whole: Problem, grad: bool) -> Measured:
    """What all find of the whole together, the same on every rank."""
    scores, values = measure(problem, ranks), measure_values(problem, ranks)
    measured = Measured(scores, values, scan_engine.hidden_keys(problem, ranks))
    if ranks.first(wants_sample, whole, scores, values, **call.how, grad=grad):
        measured.sample = Sample(problem, scores, values, ranks)
    return measured


def _make_plan(ranks: Ranks, call: Call, whole: Problem, piece: Problem, measured: Measured, grad: bool) -> Plan:
    """The plan of the whole, made by rank 0 of what all have measured, so that every rank has the same."""

    def planned() -> Plan:
        unsampled = measured.sample is None
        made = make_plan(whole, **call.how, grad=grad, each_weight=unsampled, measured=measured, piece=piece)
        made._sample = None  # all have it
        return made

    made = ranks.first(planned)
    made._sample = measured.sample
    return made


def _check_network(network: Any) -> None:
    if not isinstance(network, Network | None):
        raise TypeError(f"network: got {type(network).__name__}, wants a ropecy.mpi.Network")


def _rows_at_keys(ranks: Ranks, problem: Problem, layout: Layout) -> tuple[tuple[list[int], list[int]], Problem]:
    """Where rows are cut and where at their keys, and the rank's problem with the rows that lie there."""
    cuts = layout.rows, layout.rows_at_keys()
    offset = layout.q_offset + cuts[1][ranks.rank] - layout.k_start[ranks.rank]
    return cuts, replace(problem, q=ranks.recut(problem.q, *cuts), q_offset=offset)
