"""The loss L = 1/2 || D^-1 A V - E ||_F^2 and its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from .gradients import LossGradients
from .options import Options
from .planning.evaluation import Evaluation
from .problem import checks
from .problem.call import Call, prepare_for
from .relative import RelativeFamily
from .rotary import Rotary

if TYPE_CHECKING:
    from typing_extensions import Unpack


def loss(
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    E: ArrayLike,
    R: Rotary | RelativeFamily | None = None,
    **options: Unpack[Options],
) -> float:
    """L = 1/2 || D^-1 A V - E ||_F^2, summed over all axes.

    Parameters
    ----------
    Q, K, V, R, **options
        As in `attention`, without ``return_certificate`` and ``return_lse``.
    E : (..., n, d_v) array
        The target, of Q's dtype; leading axes broadcast.

    Returns
    -------
    float

    Raises
    ------
    TypeError, ValueError, BoundedEntryError, NotImplementedError, MemoryError
        As `attention` does.

    Notes
    -----
    The loss of arXiv:2412.17316, with the papers' A_1, A_2, A_3 for Q, K, V. Squares are summed in float64.

    Examples
    --------
    >>> Q, K, V = np.random.default_rng(0).uniform(-1, 1, (3, 50, 4))
    >>> loss(Q, K, V, np.zeros((50, 4)), Rotary(4)) < 0.5 * float((V * V).sum())
    True
    """
    call, E = _checked("loss", Q, K, V, E, R, options)
    return _half_square(Evaluation(call).difference(E)[0])


def loss_grad(
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    E: ArrayLike,
    R: Rotary | RelativeFamily | None = None,
    **options: Unpack[Options],
) -> LossGradients:
    """The gradients of L = 1/2 || D^-1 A V - E ||_F^2 with respect to every argument that was given but E.

    Parameters
    ----------
    Q, K, V, R, **options
        As in `attention`, without ``return_certificate`` and ``return_lse``.
    E : (..., n, d_v) array
        The target, of Q's dtype; leading axes broadcast.

    Returns
    -------
    LossGradients
        ``g.loss`` and ``g.O``; the gradients ``g.dQ``, ``g.dK``, ``g.dV``, and of what was given ``g.dW``, ``g.dW_Q``,
        ``g.dW_K``, ``g.dW_V``, ``g.dbias``, ``g.dscale_near``, ``g.dR`` (of a RelativeFamily); ``g.certificate``, the
        certificate of the gradients.

    Raises
    ------
    TypeError, ValueError, BoundedEntryError, NotImplementedError, MemoryError
        As `attention_vjp` does.

    See Also
    --------
    ropecy.loss : the loss alone.
    ropecy.attention_vjp : the gradients of any other loss.

    Notes
    -----
    The vector-Jacobian product of attention with dO = D^-1 A V - E, so that dL/dW takes almost linear time
    (arXiv:2412.17316).

    Examples
    --------
    >>> A_1 = np.random.default_rng(0).uniform(-1, 1, (50, 4))
    >>> g = loss_grad(A_1, A_1, A_1, np.zeros((50, 4)), Rotary(4), W=np.eye(4), causal=True)
    >>> g.dW.shape
    (4, 4)
    """
    call, E = _checked("loss_grad", Q, K, V, E, R, options)
    return gradients_of(Evaluation(call, grad=True), E)


def gradients_of(evaluation: Evaluation, E: np.ndarray) -> LossGradients:
    """The gradients of the loss for a checked target E. For a sequence in pieces, E has this process's rows."""
    comm = evaluation.pieces.comm
    dO, largest = comm.together(evaluation.difference, E)
    return LossGradients(
        loss=float(comm.total(np.float64(_half_square(dO)))),
        O=evaluation.call.to_user(evaluation.o),
        **evaluation.gradients(dO, largest),
        certificate=evaluation.gradient_certificate,
    )


def check_target(E: Any, call: Call) -> np.ndarray:
    """The target E, checked to have the dtype of the call, and broadcast to the shape of its result."""
    E = checks.check_like("E", E, call.dtype, call.shape, broadcast=True)
    checks.check_finite("E", E)
    return E


def _checked(
    function: str, Q: Any, K: Any, V: Any, E: Any, R: Any, options: Mapping[str, Any]
) -> tuple[Call, np.ndarray]:
    checks.check_values(V)
    call = prepare_for(function, Q, K, V, R, options)
    return call, check_target(E, call)


def _half_square(X: np.ndarray) -> float:
    X = X.reshape(-1)
    with np.errstate(over="ignore"):
        return 0.5 * float(np.einsum("i,i->", X, X, dtype=np.float64))
