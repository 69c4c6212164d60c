"""plan(): what will be computed, what it promises and costs, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from numpy.typing import ArrayLike

from .options import Options
from .planning.explain import explained
from .planning.plan import Alternative, Plan
from .problem.call import prepare_for
from .problem.normal_form import normal_form
from .relative import RelativeFamily
from .rotary import Rotary

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Alternative", "Plan", "plan"]


def plan(
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike | None = None,
    R: Rotary | RelativeFamily | None = None,
    *,
    grad: bool = False,
    comm: Any = None,
    **options: Unpack[Options],
) -> Plan:
    """What `attention` would do with these arguments: the bound B of its scores, the engine, its degree and its cost;
    what the other engines would promise and cost; and which changes would let a polynomial certify eps.

    Parameters
    ----------
    Q, K, V, R, **options
        As in `attention`, without ``return_certificate`` and ``return_lse``; V may be left out.
    grad : bool
        Plan for `attention_vjp`.
    comm : mpi4py.MPI.Intracomm, optional
        Plan for `ropecy.mpi.attention`, where Q, K and V are this rank's piece, as `ropecy.mpi.plan` does.

    Returns
    -------
    Plan
        ``print(plan)`` explains it in words; ``plan.alternatives`` and ``plan.advice`` hold the same as objects. No
        attention is computed.

    Raises
    ------
    TypeError, ValueError, BoundedEntryError, NotImplementedError, MemoryError
        As `attention` does.

    Notes
    -----
    Planning takes time O(n d), some passes over Q and K for each engine and each piece of advice. Where fourth moments
    are used, each takes up to 80 n d^2 in products of matrices too. Seconds are predicted from constants that come with
    the package, by which the engine is chosen too, times one factor that is measured on this machine.

    Examples
    --------
    >>> import numpy as np
    >>> Q, K = np.random.default_rng(0).uniform(-1, 1, (2, 5000, 4))
    >>> print(plan(Q, K, Rotary(4)))
    forward: 1 x 5,000 queries, 1 x 5,000 keys, d = 4, d_v = 1, float64, eps = 0.001
    scores    |s| <= ... (Cauchy-Schwarz), ...; root mean square of a row 0.17, at most 0.2...
       engine                   degree    features    error   seconds        MiB  pays from n
    ...
    -> polynomial, ...
    result    polynomial, degree ...
    because   the cheapest engine that certifies eps...
    """
    if isinstance(V, Rotary | RelativeFamily) and R is None:
        V, R = None, V
    if comm is not None:
        from . import mpi

        return mpi.plan(comm, Q, K, V, R, grad=grad, **options)
    call = prepare_for("plan", Q, K, V, R, options)
    problem = call.problem if call.problem.empty else normal_form(call.problem, grad).problem
    return explained(problem, replace(call.request, grad=grad), call.dtype)
