"""One sequence, or packed sequences, over the ranks of an MPI communicator: each holds a contiguous piece, in the order
of ranks.

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

from .attention import VJP
from .certificate import Certificate
from .certify.sample import steps
from .distributed.mpi_communicator import MPICommunicator
from .distributed.network import Exchange, Network
from .engines.base import Executable
from .gradients import LossGradients
from .loss import check_target, gradients_of
from .options import Options
from .planning.evaluation import Evaluation, Planned, planned
from .planning.explain import plan_of, plan_of_nothing
from .planning.plan import Plan
from .planning.shares import Share, SharedEvaluation, Shares, plan_of_shares
from .problem import checks
from .problem.arguments import Arguments
from .problem.call import Call, check, check_names, key_heads_of, length_of
from .problem.packed import Cut, Packed, check_lengths
from .problem.pieces import WHOLE, Layout, Pieces
from .problem.request import Request
from .problem.traffic import Sender, Traffic, bounds, joined, maxima, totals
from .relative import RelativeFamily
from .rotary import Rotary

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
        piece, `threads` of the rank. `q_offset` is the index of the first row of all among all keys. `lengths` are
        those of all sequences, whose rows and keys may be cut anywhere; `q_offset` is then as in `ropecy.attention`.

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

    Packed sequences (`lengths`) that lie within the piece of a rank are computed there, and nothing of them is sent:
    all but one at most for each border between ranks, where rows and keys are cut at the same places. Those that are
    cut are computed by all ranks together, one after the other, each in the time and traffic of a call of its own, in
    which ranks that hold none of it have nothing to do: a long sequence gains by being cut, a short one costs messages.
    Each sequence has the plan that it has alone, or beside those of its shape on its rank.
    """
    flags = {"return_certificate": return_certificate, "return_lse": return_lse}
    call, pieces = _prepare(MPICommunicator(comm), "attention", (Q, K, V, R), options, **flags)
    evaluation = _evaluate(call, pieces, want_lse=return_lse)
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
    call, pieces = _prepare(MPICommunicator(comm), "attention_vjp", (Q, K, V, R), options)
    evaluation = _evaluate(call, pieces, grad=True)
    return evaluation.output, VJP(evaluation)


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
    ranks = MPICommunicator(comm)
    call, pieces = _prepare(ranks, "loss_grad", (Q, K, V, R), options)
    E = ranks.together(check_target, E, call)
    return gradients_of(_evaluate(call, pieces, grad=True), E)


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
    ranks = MPICommunicator(comm)
    ranks.together(_check_network, network)
    ranks.agree({"network": network})
    call, pieces = _prepare(ranks, "plan", (Q, K, V, R), options, grad=grad)
    if isinstance(call, Shares):
        every = [ranks.together(_planned, call.own.call, WHOLE, grad)]
        every += [_planned(share.call, share.pieces, grad) for share in call.cut]
        plans, executables, traffic = (list(each) for each in zip(*every, strict=True))
        made, own = plan_of_shares(call, pieces, plans, executables), sum(traffic, Traffic())
    else:
        made, _, own = _planned(call, pieces, grad)
    everyone = ranks.gather(own)
    worst = Traffic(*(max(getattr(t, name) for t in everyone) for name in ("sent", "received", "messages")))
    return replace(made, exchange=Exchange(ranks.size, own, worst, network or ranks.network()))


def _planned(call: Call, pieces: Pieces, grad: bool) -> tuple[Plan, Executable | None, Traffic]:
    """The plan of a call, what it runs, and what this rank sends and receives."""
    found = planned(call, pieces, grad)
    if found.context is None:
        made = pieces.comm.first(plan_of_nothing, found.whole, replace(call.request, grad=grad))
    else:
        made = pieces.comm.first(lambda: plan_of(found.context, found.choice, call.dtype))
    return made, found.executable, _traffic(call, pieces, found, grad) if pieces.distributed else Traffic()


def _evaluate(call: Call | Shares, pieces: Pieces, **how: bool) -> Evaluation | SharedEvaluation:
    if isinstance(call, Shares):
        return SharedEvaluation(call, pieces=pieces, **how)
    return Evaluation(call, pieces=pieces, **how)


def _prepare(
    ranks: MPICommunicator, function: str, given: tuple[Any, ...], options: Mapping[str, Any], **flags: Any
) -> tuple[Call | Shares, Pieces]:
    """The rank's call, with indices and positions that go on where the rank before ends, and where the others are."""

    def checked():
        for name, value in flags.items():
            checks.check_flag(name, value)
        check_names(function, options)
        if function != "plan":
            checks.check_values(given[2])
        if isinstance(given[3], RelativeFamily):
            raise NotImplementedError("R: got a RelativeFamily, which attention over MPI ranks does not do")
        # The lengths are those of all ranks' rows, and are checked when these are known.
        of_piece = options if lengths is None else {**options, "lengths": None, "q_offset": 0}
        return check(*given, **of_piece)

    lengths = options.get("lengths")
    a, request = ranks.together(checked)
    ranks.agree({**_facts(function, a, request, options), **flags, "lengths": lengths is not None})
    n, n_k = np.array(ranks.gather((a.n, a.n_k))).T
    starts = (X.tolist() for X in (np.cumsum(n) - n, np.cumsum(n_k) - n_k))
    layout = Layout(n.tolist(), n_k.tolist(), *starts, a.q_offset, a.lo, a.hi)
    if lengths is not None:
        packed = ranks.together(check_lengths, lengths, options.get("q_offset", 0), sum(n.tolist()), sum(n_k.tolist()))
        fields = {"lengths": (packed.q_lengths, packed.k_lengths), "q_offset": packed.offsets}
        ranks.agree({name: _digest(np.stack(X)) for name, X in fields.items()})
        return _shares(ranks, a, request, options, (layout, packed))
    q_start, k_start = layout.q_start[ranks.rank], layout.k_start[ranks.rank]
    a.q_offset += q_start - k_start
    if a.R is not None:
        a.q_positions += q_start if options.get("q_positions") is None else 0
        a.k_positions += k_start if options.get("k_positions") is None else 0
    return _call(ranks, a, request, layout, _common(ranks, a))


def _common(ranks: MPICommunicator, a: Arguments) -> dict[str, int]:
    """What the calls of all ranks have in common."""
    lengths, heads = zip(*ranks.gather((length_of(a), key_heads_of(a))), strict=True)
    return {"length": max(lengths), "least_key_heads": int(np.lcm.reduce(heads))}


def _call(
    ranks: MPICommunicator, a: Arguments, request: Request, layout: Layout, common: dict[str, int]
) -> tuple[Call, Pieces]:
    """The call of a sequence that lies so among the ranks, given what is this one's."""
    call = ranks.together(Call, a, request, **common)
    masked = any(ranks.gather(call.problem.mask.kept is not None))
    symbol = None if a.bias is None else call.symbol
    return call, Pieces(ranks, layout, masked, symbol)


def _shares(
    ranks: MPICommunicator, a: Arguments, request: Request, options: Mapping[str, Any], places: tuple[Layout, Packed]
) -> tuple[Shares, Pieces]:
    """The packed sequences that lie within the rank's piece, and each that is cut."""
    layout, packed = places
    rows, keys = (Cut(*cut) for cut in ((packed.q_lengths, layout.n), (packed.k_lengths, layout.n_k)))
    if a.R is not None:
        own_rows, own_keys = (cut.of_rank(ranks.rank) for cut in (rows, keys))
        a.q_positions = packed.q_positions[own_rows] if options.get("q_positions") is None else a.q_positions
        a.k_positions = packed.k_positions[own_keys] if options.get("k_positions") is None else a.k_positions
    common = _common(ranks, a)
    both = (packed.q_lengths > 0) & (packed.k_lengths > 0)
    within = both & (rows.rank >= 0) & (rows.rank == keys.rank)
    mine = np.flatnonzero(within & (rows.rank == ranks.rank))
    first, stop = (int(mine[0]), int(mine[-1]) + 1) if len(mine) else (0, 0)
    where = rows.of(ranks.rank, first, stop), keys.of(ranks.rank, first, stop)
    call = ranks.together(lambda: Call(a.stretch(*where, packed=packed.some(first, stop)), request, **common))
    own, cut = Share(call, WHOLE, *where, first), []
    for j in np.flatnonzero(both & ~within).tolist():
        q, k = ([each.of(rank, j, j + 1) for rank in range(ranks.size)] for each in (rows, keys))
        n, n_k = ([span.stop - span.start for span in spans] for spans in (q, k))
        q_start, k_start = ((np.cumsum(lengths) - lengths).tolist() for lengths in (n, n_k))
        offset, where = int(packed.offsets[j]), (q[ranks.rank], k[ranks.rank])
        piece = a.stretch(*where, q_offset=offset + q_start[ranks.rank] - k_start[ranks.rank])
        of_j = Layout(n, n_k, q_start, k_start, offset, a.lo, a.hi)
        cut.append(Share(*_call(ranks, piece, request, of_j, common), *where, j))
    sizes = {name: X.shape for name, X in a.arrays.items() if name in ("Q", "K", "V")}
    return Shares(own, cut, (*a.lead, a.n, a.d_v), a.dtype, a.compute, sizes), Pieces(ranks)


def _facts(function: str, a: Arguments, request: Request, options: Mapping[str, Any]) -> dict[str, Any]:
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
        **{name: getattr(request, name) for name in ("eps", "certify", "method", "degree", "seed")},
    }


def _digest(X: np.ndarray | None) -> str | None:
    if X is None:
        return None
    content = hashlib.blake2b(np.ascontiguousarray(X), digest_size=8).hexdigest()
    return f"an array {X.shape} of content {content}"


def _traffic(call: Call, pieces: Pieces, found: Planned, grad: bool) -> Traffic:
    """The bytes and messages that this rank sends and receives in a call that is planned like this, if no row fails its
    certificate by moments.
    """
    outline, size, a, total = found.normal.problem, pieces.comm.size, call.arguments, Traffic()
    if found.executable is not None:
        # The sizes of queries and of keys.
        total += maxima(16 * outline.sizes.H, size) if grad else Traffic()
        total += bounds(outline, size)
        if not found.context.request.each_weight:
            total += _sample_traffic(call, pieces)
        total += found.executable.traffic(Sender(outline, pieces.layout, pieces.comm.rank, pieces.masked, grad))
    if grad:
        total += maxima(8, size)
        total += Traffic() if a.near is None else totals(a.heads if isinstance(a.near[1], tuple) else 1, size)
        for X in (a.W, a.W_Q, a.W_K, a.W_V, None if a.bias is None else call.bias_gradient(None)):
            total += Traffic() if X is None else totals(X.size, size)
    return total


def _sample_traffic(call: Call, pieces: Pieces) -> Traffic:
    """The traffic of taking a sample of keys and rows together, and of counting kept keys."""
    (H, G, _, _, d, _), item, layout = call.problem.sizes, call.problem.dtype.itemsize, pieces.layout
    found = totals(H, pieces.comm.size)
    row_step, key_step = steps(call.problem, sum(layout.n), sum(layout.n_k))
    # Each sampled row is sent with three float64 numbers: its place, its weight and its bound.
    keys = (layout.n_k, key_step, H * d * item)
    for lengths, step, width in (keys, (layout.n, row_step, H * G * 24), (layout.n, row_step, H * G * d * item)):
        found += joined([-(-length // step) * width for length in lengths], pieces.comm.rank)
    return found


def _check_network(network: Any) -> None:
    if not isinstance(network, Network | None):
        raise TypeError(f"network: got {type(network).__name__}, wants a ropecy.mpi.Network")
