"""Softmax attention with rotary positions, and its gradient: what users call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike

from .certificate import Certificate, nothing_to_do
from .engines.exact import few_lengths, few_queries
from .gradients import Gradients
from .options import Integers, Options
from .planning import plain_calls, plain_gradients
from .planning.evaluation import Differentiable, Evaluation
from .planning.plain_gradients import PlainGradient
from .problem import checks
from .problem.arguments import Arguments, check_arguments, check_entries, check_method
from .problem.call import Call, check_forms, check_names
from .problem.request import Request
from .relative import RelativeBias, RelativeFamily
from .rotary import Rotary

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def attention(
    Q: ArrayLike, K: ArrayLike, V: ArrayLike, R: Rotary | RelativeFamily | None = None, *,
    return_certificate: Literal[False] = False, return_lse: Literal[False] = False, **options: Unpack[Options],
) -> np.ndarray: ...
@overload
def attention(
    Q: ArrayLike, K: ArrayLike, V: ArrayLike, R: Rotary | RelativeFamily | None = None, *,
    return_certificate: Literal[True], return_lse: Literal[False] = False, **options: Unpack[Options],
) -> tuple[np.ndarray, Certificate]: ...
@overload
def attention(
    Q: ArrayLike, K: ArrayLike, V: ArrayLike, R: Rotary | RelativeFamily | None = None, *,
    return_certificate: Literal[False] = False, return_lse: Literal[True], **options: Unpack[Options],
) -> tuple[np.ndarray, np.ndarray]: ...
@overload
def attention(
    Q: ArrayLike, K: ArrayLike, V: ArrayLike, R: Rotary | RelativeFamily | None = None, *,
    return_certificate: Literal[True], return_lse: Literal[True], **options: Unpack[Options],
) -> tuple[np.ndarray, Certificate, np.ndarray]: ...
@overload
def attention(
    Q: ArrayLike, K: ArrayLike, V: ArrayLike, R: Rotary | RelativeFamily | None = None, *,
    return_certificate: bool = False, return_lse: bool = False, **options: Unpack[Options],
) -> np.ndarray | tuple[Any, ...]: ...
def attention(
    Q: ArrayLike,
    K: ArrayLike,
    V: ArrayLike,
    R: Rotary | RelativeFamily | None = None,
    *,
    W: ArrayLike | None = None,
    W_Q: ArrayLike | None = None,
    W_K: ArrayLike | None = None,
    W_V: ArrayLike | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
    near: tuple[int, ArrayLike] | None = None,
    bias: RelativeBias | None = None,
    key_mask: ArrayLike | None = None,
    q_positions: ArrayLike | None = None,
    k_positions: ArrayLike | None = None,
    q_offset: int | Integers = 0,
    lengths: Integers | tuple[Integers, Integers] | None = None,
    eps: float = 1e-3,
    certify: str = "proof",
    method: str = "auto",
    degree: int | None = None,
    seed: int | None = None,
    threads: int | None = None,
    return_certificate: bool = False,
    return_lse: bool = False,
) -> np.ndarray | tuple[Any, ...]:
    r"""D^-1 A V, A_ij = exp(scale (Q_i W_Q) W R_{j-i} (K_j W_K)^T + b_{j-i}), D = diag(A 1), within a certified eps.

    Parameters
    ----------
    Q : (..., n, d) array
        Queries: float32 or float64, computed in themselves, or float16 or bfloat16, computed in float32. The axis
        before n is the head axis where there is one. Any strides; no input is ever written to.
    K : (..., n_k, d) array
        Keys, of Q's dtype. Leading axes of Q, K and V broadcast, and K and V may have fewer heads than Q (grouped
        queries): head h of Q's uses key head h // (heads / key heads).
    V : (..., n_k, d_v) array
        Values, of Q's dtype; projected by `W_V` where that is given.
    R : Rotary or RelativeFamily, optional
        The rotations R_m, or any matrices W_{i-j} that stand there. By default the identity.
    W, W_Q, W_K, W_V : (..., _, _) arrays, optional
        The projections of the formula, of Q's dtype; leading axes broadcast with those of what they multiply. What
        is not given is the identity.
    scale : float, optional
        By default 1/d, d the width of what meets in the score (after projection).
    causal : bool
        Row i sees the keys j <= i + q_offset.
    window : int or (int, int), optional
        w: i + q_offset - w < j <= i + q_offset; (left, right): -left <= j - (i + q_offset) <= right. Masks combine
        by "and"; a row that sees no key gives 0 and gradient 0.
    near : (int, float or (heads,) array), optional
        (w, scale_near): where \|j - (i + q_offset)\| < w the score has scale_near in the place of scale, and is always
        computed exactly. scale_near is one number, or one for each query head.
    bias : RelativeBias, optional
        b, added to the scores by index.
    key_mask : bool array, optional
        (n_k,), or with all leading axes of the result (size 1 broadcasts): True for keys that are kept. What it hides
        is never read.
    q_positions, k_positions : integer arrays, optional
        (n,) and (n_k,), or with all leading axes: what a Rotary rotates by. By default arange(n) + q_offset and
        arange(n_k). Masks, biases and families go by index all the same.
    q_offset : int
        Index of the first query among the keys; with `lengths` one for all sequences, or (s,) integers.
    lengths : (s,) integers or a pair of such, optional
        Rows are sequences packed side by side, each of which sees itself alone: their lengths, or (those of queries,
        those of keys), of which some may be 0. Masks, windows, biases and default positions count within a sequence; a
        scaled Rotary without a `length` of its own goes by the longest one.
    eps : float
        Every entry of the result is within eps * (max_j V_jc - min_j V_jc), over the keys that its row sees.
    certify : {"proof", "sample"}
        Whether eps must be proved of every row, or whether evidence from some rows will do, which says of most rows,
        and never of all, that they are within it. Gradients, and with them the forward pass before them, are proved in
        any case.
    method : {"auto", "exact", "polynomial", "fft"}
        "auto" is the cheapest that certifies eps. "polynomial" takes causal, key_mask and `near`, and biases that are
        sums of decays or constant far out (ALiBi, T5, KERPLE, clipped tables), no window and no RelativeFamily; "fft"
        takes all but `near`; "exact" takes all.
    degree : int, optional
        Fixes the degree of the polynomial.
    seed : int, optional
        Of the coins, where coins are used; by default fresh ones.
    threads : int, optional
        By default OMP_NUM_THREADS, else the CPUs that the process may use, looked up once a second at most. The result
        does not depend on it.
    return_certificate, return_lse : bool
        Return more than O, in this order.

    Returns
    -------
    O : (..., n, d_v) array
        Of Q's dtype.
    certificate : Certificate
        If `return_certificate`: the engine, and the error that is certified.
    lse : (..., n) float64 array
        If `return_lse`: log sum_j A_ij, -inf where row i sees no key, by which partial attentions can be merged.

    Raises
    ------
    TypeError
        dtypes that disagree or are not of floating point, arguments of the wrong kind.
    ValueError
        Shapes that disagree, NaN or Inf, numbers out of range; all before any work, naming the argument.
    BoundedEntryError
        `method` or `degree` can't certify eps; a ValueError.
    NotImplementedError
        `method` names an engine that doesn't do what is asked.
    MemoryError
        The plan needs more than the machine has.

    See Also
    --------
    ropecy.plan : what a call would do, promise and cost.
    ropecy.attention_vjp : the same with its gradient.
    ropecy.check : a result against a random sample of exact rows.
    ropecy.DecodeState : token by token.

    Notes
    -----
    Time n n_k (d + d_v) for the exact engine, n d_v C(d + g, g) for a polynomial of degree g; memory beyond inputs
    and outputs a few arrays of n x d, never n x n_k. The polynomial method for RoPE is that of arXiv:2412.17316 and
    arXiv:2505.11892 [1]_ [2]_.

    References
    ----------
    .. [1] J. Alman and Z. Song, "Fast RoPE Attention: Combining the Polynomial Method and Fast Fourier Transform",
       arXiv:2505.11892, 2025.
    .. [2] "Fast Gradient Computation for RoPE Attention in Almost Linear Time", arXiv:2412.17316, 2024.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> Q, K, V = rng.uniform(-1, 1, (3, 100, 8))
    >>> O, certificate = attention(Q, K, V, Rotary(8), causal=True, return_certificate=True)
    >>> O.shape, certificate.error <= 1e-3
    ((100, 8), True)
    """
    return_certificate = checks.check_flag("return_certificate", return_certificate)
    return_lse = checks.check_flag("return_lse", return_lse)
    checks.check_values(V)
    request = Request(**check_method(eps=eps, certify=certify, method=method, degree=degree, seed=seed))
    arguments = check_arguments(
        Q, K, V, R, W=W, W_Q=W_Q, W_K=W_K, W_V=W_V, scale=scale, causal=causal, window=window, near=near, bias=bias,
        key_mask=key_mask, q_positions=q_positions, k_positions=k_positions, q_offset=q_offset, lengths=lengths,
        threads=threads,
    )
    found = few = None
    if arguments.packed is not None:
        few = few_lengths.forward(arguments, request, return_lse)
    if few_queries.serves(arguments, request):
        found = few_queries.forward(arguments, request, return_lse)
    elif plain_calls.serves(arguments, request):
        found = plain_calls.forward(arguments, request, return_lse)
    if found is not None:
        O, lse = found
        certificate = partial(_exact_certificate, arguments, request)
    elif few is not None and few.done.all() and not return_certificate:
        O, lse, _ = few
    else:
        left = check_entries(arguments if few is None else few.left(arguments))
        evaluation = Evaluation(Call(left, request), want_lse=return_lse)
        O, lse = evaluation.call.to_user(evaluation.o), evaluation.lse
        if few is not None:
            few.put(O, lse, arguments)
        certificate = partial(getattr, evaluation, "certificate")
    extra = ([certificate()] if return_certificate else []) + ([lse] if return_lse else [])
    return (O, *extra) if extra else O


def _exact_certificate(arguments: Arguments, request: Request) -> Certificate:
    """Of O computed exactly, whatever computed it: what rounding costs is measured of the arguments."""
    call = Call(check_entries(arguments), request)
    if call.problem.empty:
        return replace(nothing_to_do(), rows_truncation=np.zeros(call.shape[:-1]))
    return plain_calls.certificates(call)[0]


def attention_vjp(
    Q: ArrayLike, K: ArrayLike, V: ArrayLike, R: Rotary | RelativeFamily | None = None, **options: Unpack[Options]
) -> tuple[np.ndarray, VJP]:
    """D^-1 A V, and the map from dO to the gradients of <dO, D^-1 A V>.

    Parameters
    ----------
    Q, K, V, R, **options
        As in `attention`, without ``return_certificate`` and ``return_lse``.

    Returns
    -------
    O : (..., n, d_v) array
        As `attention` gives it.
    vjp : VJP
        ``g = vjp(dO)`` has ``g.dQ``, ``g.dK``, ``g.dV``, and ``g.dW``, ``g.dW_Q``, ``g.dW_K``, ``g.dW_V``, ``g.dbias``,
        ``g.dR`` (of a RelativeFamily) of what was given, each in the shape and dtype of its argument; with `near`
        ``g.dscale_near``, sum_ij dS_ij <q_i, k_j> over the near pairs, a float, or a float64 array with that of each
        head where scale_near is one; and ``g.certificate``. ``vjp.certificate`` is that of O. May be called again; the
        inputs must not be changed before the last call.

    Raises
    ------
    TypeError, ValueError, BoundedEntryError, NotImplementedError, MemoryError
        As `attention` does; an eps that no degree certifies for the gradient shows here and not when vjp is called.

    Notes
    -----
    A gradient costs two to four times the forward pass, in the same order of memory (arXiv:2412.17316 forms matrices
    of n x (d d_v) instead); that of scale_near costs the near field's once more. First order only: the gradient has no
    derivative of its own.

    Examples
    --------
    >>> Q, K, V = np.random.default_rng(0).uniform(-1, 1, (3, 50, 4))
    >>> O, vjp = attention_vjp(Q, K, V, Rotary(4))
    >>> vjp(O).dK.shape
    (50, 4)
    """
    evaluation = differentiable(Q, K, V, R, options)
    return evaluation.output, VJP(evaluation)


def differentiable(
    Q: ArrayLike, K: ArrayLike, V: ArrayLike, R: Rotary | RelativeFamily | None, options: Mapping[str, Any]
) -> Evaluation | PlainGradient:
    """O and what its gradients need, for the arguments of `attention_vjp`; certificates are measured when asked for."""
    checks.check_values(V)
    check_names("attention_vjp", options)
    arguments, request = check_forms(Q, K, V, R, **options)
    if plain_calls.serves(arguments, request):
        found = plain_gradients.forward(arguments, request)
        if found is not None:
            return found
    return Evaluation(Call(check_entries(arguments), request), grad=True)


class VJP:
    """dO -> the gradients of <dO, O>; made by `attention_vjp`.

    Attributes
    ----------
    certificate : Certificate
        Of O.
    """

    __slots__ = ("_evaluation", "certificate")

    def __init__(self, evaluation: Differentiable | PlainGradient) -> None:
        self._evaluation = evaluation
        self.certificate: Certificate = evaluation.certificate

    def __call__(self, dO: ArrayLike) -> Gradients:
        """The gradients for this dO, which has the shape and dtype of O.

        Raises
        ------
        TypeError, ValueError
            dO has another dtype or shape, or NaN or Inf.
        """
        return Gradients(**self._evaluation.vjp(dO), certificate=self._evaluation.gradient_certificate)
