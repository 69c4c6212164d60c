"""The gradient of exact attention of plain problems, as `plain_calls` computes O: without a plan, from arrays as they
are stored. Gradients of float16 and bfloat16 are rounded once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..certificate import Certificate
from ..certify.once import once
from ..engines.exact import streaming
from ..kernels import _exact, _exact_gradient, _halves
from ..problem import checks
from ..problem.arguments import Arguments, check_entries
from ..problem.call import Call
from ..problem.request import Request
from ..problem.rows import contiguous
from .evaluation import Evaluation
from .plain_calls import Given, certificates, given

# If the largest entry of dO is in this range, or 0, `plain_calls` has seen that nothing needs a power of two.
_LEAST, _MOST = 2.0**-26, 2.0**36


class PlainGradient:
    """O, and its gradients as often as asked; what `Evaluation` is to the usual way.

    Attributes
    ----------
    output : (..., n, d_v) array
        O in the caller's dtype.
    """

    def __init__(self, a: Arguments, request: Request, found: Given, computed: tuple[np.ndarray, ...]) -> None:
        self._arguments, self._request, self._v = a, request, found.v
        o, maximum, inverse, _ = computed
        self._saved = streaming.Saved(streaming.Sized(found.q, found.k), found.told[0], o, maximum, inverse)
        o = o.reshape(a.lead + (a.n, a.d_v))
        # A copy, for gradients need O as it is and users subtract targets in place.
        self.output = o.copy() if o.dtype == a.dtype else _halves.narrowed(o, a.dtype, a.threads)

    @property
    def certificate(self) -> Certificate:
        """The certificate of O."""
        return self._certificates[0]

    @property
    def gradient_certificate(self) -> Certificate:
        """The certificate of gradients."""
        return self._certificates[1]

    def vjp(self, dO: Any) -> dict[str, np.ndarray]:
        """The gradients by name for this dO."""
        a, saved = self._arguments, self._saved
        do = checks.check_like("dO", dO, a.dtype, a.lead + (a.n, a.d_v))
        largest = checks.check_finite("dO", do)
        if largest and not _LEAST <= largest < _MOST:
            return self._usual.vjp(do)
        segments = _exact_gradient.segments_of(len(self._v), a.n_k, a.compute)
        do = contiguous(do).reshape(saved.o.shape)
        dq, dk, dv, _ = _exact_gradient.backward(saved, self._v, do, False, segments, a.threads)
        return {"dQ": dq.reshape(a.Q.shape), "dK": dk.reshape(a.K.shape), "dV": dv.reshape(a.V.shape)}

    @once
    def _certificates(self) -> tuple[Certificate, Certificate]:
        return certificates(Call(check_entries(self._arguments), self._request))

    @once
    def _usual(self) -> Evaluation:
        return Evaluation(Call(check_entries(self._arguments), self._request), grad=True)


def forward(a: Arguments, request: Request) -> PlainGradient | None:
    """O and what its gradient needs; None sends the call the usual way.

    Raises
    ------
    MemoryError
        The result does not fit.
    """
    request = replace(request, grad=True)
    found = given(a, request)
    # What several heads or batch elements share has the sum of their gradients.
    if found is None or any(X.size != x.size for X, x in ((a.Q, found.q), (a.K, found.k), (a.V, found.v))):
        return None
    computed = _exact.forward_mild(*found, a.compute, False, a.threads)
    return None if computed is None else PlainGradient(a, request, found, computed)
