"""Exact attention of plain problems without a plan, for which a short call has no time, nor looks at its numbers.

Most calls that are computed exactly need nothing but scores and values: no rotation, bias or key mask; numbers near 0
and of usual sizes; shapes for which the exact engine is the cheapest whatever the numbers are. The kernel sees for
itself whether the numbers are such, when it reads them to pack keys, and then computes what the exact engine would have
computed, bit by bit. All other calls go the usual way.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..certificate import Certificate
from ..certify.rounding import most_of_norms, sums_rounding
from ..certify.scores import least_bounds, query_norms, room
from ..engines.base import Context
from ..engines.cost import Work
from ..engines.exact import streaming
from ..engines.exact.cost import exact_work
from ..engines.exact.engine import Exact
from ..engines.polynomial.worst_case import may_pay, sample_is_cheap, would_pay
from ..kernels import _exact
from ..machine.memory import require
from ..problem.arguments import Arguments
from ..problem.call import Call, key_heads_of
from ..problem.mask import Mask
from ..problem.normal_form import usual_exponents
from ..problem.problem import Outline, Problem, Sizes
from ..problem.request import Request
from ..problem.rows import contiguous, spread

# So many multiply-adds take some seconds at most, less than what would have to be warned of.
_MOST_WORK = 2**35
# Queries and keys of a problem whose tables are kept, half a megabyte each.
_MOST_ROWS, _KEPT = 2**16, 16
# Where a gradient is wanted, the exponents of two of the scale and of the largest of a head's queries, keys and values
# are not further than this from 0: then dO of most sizes needs no power of two.
_NEAR_ONE = 16


class Given(NamedTuple):
    """What the kernel is given: arrays by slots, and what it is told of scores and of which sizes numbers may be."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    told: tuple[streaming.Tables, tuple]


def serves(a: Arguments, request: Request) -> bool:
    """Whether these arguments are asked nothing of but scores, a causal mask or a window, and values."""
    if not a.plain or a.packed is not None or a.key_mask is not None:
        return False
    return request.degree is None and request.method in ("auto", "exact")


def forward(a: Arguments, request: Request, want_lse: bool) -> tuple[np.ndarray, np.ndarray | None] | None:
    """O (..., n, d_v) in the caller's dtype and lse (..., n) float64 or None; None sends the call the usual way.

    Raises
    ------
    MemoryError
        The result does not fit.
    """
    found = given(a, request)
    if found is None:
        return None
    computed = _exact.forward_mild(*found, a.dtype, want_lse, a.threads)
    if computed is None:
        return None
    o, _, _, lse = computed
    shape = a.lead + (a.n, a.d_v)
    return o.reshape(shape), None if lse is None else lse.reshape(shape[:-1])


def certificates(call: Call) -> tuple[Certificate, Certificate]:
    """Of O and of its gradients, computed exactly, whatever computed them: what rounding costs is measured here."""
    context = Context.of(call.problem, call.request)
    exact = Exact(context.outline, context.statistics, True)
    of_o = replace(exact.certificate, rows_truncation=np.zeros(call.shape[:-1]))
    return exact.stored(of_o, call.dtype), exact.gradient_certificate


def given(a: Arguments, request: Request) -> Given | None:
    """What the kernel is given; None where another engine may be faster, or the problem is none for it.

    Raises
    ------
    MemoryError
        The result does not fit.
    """
    heads = key_heads_of(a)
    slots = math.prod(a.batch) * heads
    sizes = Sizes(slots, a.heads // (heads or 1), a.n, a.n_k, a.d, a.d_v)
    if 0 in sizes:
        return None
    band = a.lo, a.hi, a.q_offset
    found = _prepared(sizes, a.compute, a.scale, band, request.eps if request.method == "auto" else None, request.grad)
    if found is None:
        return None
    told, exact = found
    shape = a.lead + (a.n, a.d_v)
    require(math.prod(shape) * a.compute.itemsize, f"the result, of shape {shape},")
    q = contiguous(spread(a.Q, a.batch, a.heads)).reshape(sizes.H, sizes.G, a.n, a.d)
    k, v = (contiguous(spread(X, a.batch, heads)) for X in (a.K, a.V))
    if exact is not None:
        if a.dtype != a.compute:
            return None  # bounds of scores take numbers as they are computed with, which the usual way makes
        problem = Problem(q=q, k=k, v=v, scale=a.scale, mask=Mask(a.n, a.n_k, *band).simplified(), threads=a.threads)
        least = float(least_bounds(problem, query_norms(problem)).min())
        if not math.isfinite(least) or may_pay(problem, request, exact, least):
            return None
    return Given(q, k, v, told)


@lru_cache(maxsize=_KEPT)
def _prepared(
    sizes: Sizes,
    dtype: np.dtype,
    scale: float,
    band: tuple[int | None, int | None, int],
    eps: float | None,
    grad: bool,
) -> tuple[tuple[streaming.Tables, tuple], Work | None] | None:
    """What the kernel is told of scores, and of which sizes numbers may be, for a problem of these sizes; None where it
    is not one for the exact engine, or a large one. `eps` is that of method="auto", None for "exact"; `grad` says
    whether the gradient is wanted.

    The last is the work of the exact engine, where a polynomial might beat it if scores were small enough.
    """
    H, G, n, n_k, d, d_v = sizes
    mask = Mask(n, n_k, *band).simplified()
    if H * G * n * n_k * (d + d_v) > _MOST_WORK or n + n_k > _MOST_ROWS or mask.empty:
        return None
    outline = Outline(sizes=sizes._replace(H=1), dtype=dtype, scale=scale, mask=mask)
    # Just below the bound up to which the exact engine keeps no running maximum.
    most, exact = 0.99 * streaming.BOUNDED / streaming.LOG2E, None
    if eps is not None:
        if sums_rounding(dtype, n_k) > eps / 4:
            return None
        whole = replace(outline, sizes=sizes)
        exact = exact_work(whole, grad)
        if not would_pay(whole, 1, exact, grad):
            exact = None
        elif sample_is_cheap(whole, exact, grad):
            return None
        # Values that are not centred may be twice as large as their range is wide, which errors are given in.
        most = min(most, most_of_norms(dtype, n_k, d, eps / 4))
    if streaming.power_of_scale(outline) or (grad and abs(math.frexp(scale)[1]) > _NEAR_ONE):
        return None
    tables = streaming.tables_of(outline, most, 0.0)
    norms, values = (0.0, math.inf), usual_exponents(dtype, n_k)
    if grad:
        norms = 2.0**-_NEAR_ONE, 2.0**_NEAR_ONE
        values = max(values[0], -_NEAR_ONE), min(values[1], _NEAR_ONE)
    largest = min(math.ldexp(1.0, values[1]), streaming.most_of_sums(dtype) / n_k) / 2
    sizes = room(outline) * abs(scale), most, norms, (math.ldexp(1.0, values[0]), largest)
    return (tables, sizes), exact
