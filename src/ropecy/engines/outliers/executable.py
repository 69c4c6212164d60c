"""Attention with a few long keys and queries: these exactly, so that they do not set the bound of everybody's scores.

Rows of q and k of the largest norms are taken out. What is left is a problem of its own, for the polynomial; the long
keys are a second softmax for every row, merged by its lse; the rows of long queries are computed exactly. A weight
that is exact is within any relative error, so the worst case's certificate is that of the whole. So is that of
moments: let h be a row's sum of radii by its denominator, s the share that the kept keys have of it, D the range of
all values and r D >= h / (1 - h) max_j |V_j - T| the certificate over the kept keys, r (1 - h) >= h / 2 whatever V
is. With T' the merged row

    h s / (1 - h s) max_j |V_j - T'| <= s h / (1 - h) (s max_j |V_j - T| + (1 - s) D) <= r s (2 - s) D <= r D.

Nothing of this is in the papers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...certificate import Certificate
from ...certify.values import Values
from ...problem.input_gradients import InputGradients
from ...problem.pieces import WHOLE, Pieces
from ...problem.problem import Problem
from ..base import Executable, Result
from ..exact import attention
from ..exact.rows import exact_rows
from ..merge import merge, share
from .split import Split, parts


@dataclass(slots=True)
class Saved:
    """What backward needs of forward: the result of the rest resumed under the whole's softmax, its own results before
    that, and those of the whole.
    """

    rest: Result
    own: np.ndarray | None
    own_lse: np.ndarray | None
    o: np.ndarray
    lse: np.ndarray


@dataclass(slots=True)
class BesideOutliers(Executable):
    """The rest by an executable of its own, merged with the long keys; and the long queries.

    Attributes
    ----------
    split : Split
    rest : Executable
    centre : array or None
        Of the rest's keys.
    plain : float
        A bound of all scores, as the exact engine takes it.
    """

    certificate: Certificate
    gradient_certificate: Certificate | None
    values: Values
    split: Split
    rest: Executable
    centre: np.ndarray | None
    plain: float

    engine = "polynomial"

    def forward(self, problem: Problem, want_lse: bool, pieces: Pieces = WHOLE) -> Result:
        split, grad = self.split, self.grad
        rest = self.rest.forward(split.rest, True)
        own, own_lse = (rest.o.copy(), rest.lse.copy()) if grad else (None, None)
        o, lse = rest.o, rest.lse.copy()
        self._merge(problem, o, lse)
        gradient = rest.gradient_certificate
        if grad:
            rest = rest.executable.resume(split.rest, rest, o, lse)
            gradient = replace(gradient, rounding=max(gradient.rounding, self.gradient_certificate.rounding))
        certificate = replace(rest.certificate, rounding=max(rest.certificate.rounding, self.certificate.rounding))
        if split.rows is not None:
            count = certificate.n_exact_rows + int(np.count_nonzero(split.rows))
            certificate = replace(certificate, n_exact_rows=count)
        return Result(o, lse, self, Saved(rest, own, own_lse, o, lse), certificate, gradient)

    def _merge(self, problem: Problem, o: np.ndarray, lse: np.ndarray) -> None:
        """o and lse of the rest become those of the whole, in place: n pairs for every long key, n_k for every long
        query.
        """
        for rows, _, part in parts(problem, self.split):
            part_o, part_lse, _ = attention.forward(part, self.plain, True)
            merge(o[rows], lse[rows], part_o, part_lse)
        if self.split.rows is not None:
            exact_rows(problem, self.plain, self.split.rows).forward(o, lse)

    def backward(self, problem: Problem, result: Result, do: np.ndarray, pieces: Pieces = WHOLE) -> InputGradients:
        """Each part's backward pass, with the whole's O and denominators: ``dS = P (do V^T - <do, O>)`` splits over
        keys and over rows.
        """
        split, saved = self.split, result.saved
        short = do if split.rows is None else np.where(split.rows[..., None], 0, do)
        found = saved.rest.backward(split.rest, short)
        if split.keys is not None and self.centre is not None and saved.rest.executable.engine == "polynomial":
            # The polynomial's keys are centred, which a row's gradient forgets where dS sums to 0.
            own_share = share(saved.own_lse, saved.lse)
            sums = np.einsum("hgnc,hgnc->hgn", short, saved.own - saved.o, dtype=np.float64) * own_share
            if saved.rest.saved.exact is not None:
                sums[saved.rest.saved.exact] = 0
            found.dq += (problem.scale * sums[..., None] * self.centre[:, None, None]).astype(found.dq.dtype)
        for rows, (head, keys), part in parts(problem, split):
            o, lse, part_do = (np.ascontiguousarray(X[rows]) for X in (saved.o, saved.lse, short))
            own = attention.backward(part, attention.resume(part, np.inf, o, lse), part_do)
            found.dq[rows] += own.dq
            found.dk[head, keys] += own.dk
            found.dv[head, keys] += own.dv
        if split.rows is not None:
            exact_rows(problem, np.inf, split.rows).backward(saved.o, saved.lse, do, found)
        return found
