"""Attention with a few long keys and queries computed exactly, so that they do not raise the bound of all scores.

The rows of q and k with the largest norms are taken out. The rest is a problem of its own, for the polynomial engine;
the long keys are a second softmax for every row, merged by lse; the rows of long queries are computed exactly.

The certificate of the rest also holds for the whole. For the worst case this is clear, since an exact weight is within
any relative error. For moments, let h be a row's sum of radii divided by its denominator, both over the keys of the
rest, s the share of the row's weight that these keys have, D the range of all values, and
r D >= h / (1 - h) max_j |V_j - T| the certificate over these keys, where r (1 - h) >= h / 2 whatever V is. With T' the
merged row,

    h s / (1 - h s) max_j |V_j - T'| <= s h / (1 - h) (s max_j |V_j - T| + (1 - s) D) <= r s (2 - s) D <= r D.
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
from ..merge import merge
from .split import Split, parts


@dataclass(slots=True)
class Saved:
    """What backward needs of forward.

    Attributes
    ----------
    rest : Result
        The result of the rest, resumed under the softmax of the whole.
    o, lse : arrays
        The results of the whole.
    """

    rest: Result
    o: np.ndarray
    lse: np.ndarray


@dataclass(slots=True)
class BesideOutliers(Executable):
    """Long keys and queries exactly, beside an executable for the rest.

    Attributes
    ----------
    split : Split
    rest : Executable
    plain : (H,) array
        A bound of the scores of each slot, as the exact engine takes it.
    """

    certificate: Certificate
    gradient_certificate: Certificate | None
    values: Values
    split: Split
    rest: Executable
    plain: np.ndarray

    engine = "polynomial"

    def forward(self, problem: Problem, want_lse: bool, pieces: Pieces = WHOLE) -> Result:
        split, grad = self.split, self.grad
        rest = self.rest.forward(split.rest, True)
        o, lse = rest.o.copy() if grad else rest.o, rest.lse.copy()
        self._merge(problem, o, lse)
        gradient = rest.gradient_certificate
        if grad:
            if split.keys is not None:
                rest = rest.executable.resume(split.rest, rest, o, lse)
            gradient = replace(gradient, rounding=max(gradient.rounding, self.gradient_certificate.rounding))
        certificate = replace(rest.certificate, rounding=max(rest.certificate.rounding, self.certificate.rounding))
        if split.rows is not None:
            count = certificate.n_exact_rows + int(np.count_nonzero(split.rows))
            certificate = replace(certificate, n_exact_rows=count)
        return Result(o, lse, self, Saved(rest, o, lse), certificate, gradient)

    def _merge(self, problem: Problem, o: np.ndarray, lse: np.ndarray) -> None:
        """Turns o and lse of the rest into those of the whole, in place, by computing long keys and queries exactly."""
        for rows, _, part in parts(problem, self.split):
            part_o, part_lse, _ = attention.forward(part, self.plain[rows[0]], True)
            merge(o[rows], lse[rows], part_o, part_lse)
        if self.split.rows is not None:
            exact_rows(problem, self.plain, self.split.rows).forward(o, lse)

    def backward(self, problem: Problem, result: Result, do: np.ndarray, pieces: Pieces = WHOLE) -> InputGradients:
        """The sum of the gradients of all parts, each with the O and the denominators of the whole.

        This is right because each entry of ``dS = P (do V^T - <do, O>)`` belongs to one row and one key.
        """
        split, saved = self.split, result.saved
        short = do if split.rows is None else np.where(split.rows[..., None], 0, do)
        found = saved.rest.backward(split.rest, short)
        for rows, (head, keys), part in parts(problem, split):
            o, lse, part_do = (np.ascontiguousarray(X[rows]) for X in (saved.o, saved.lse, short))
            own = attention.backward(part, attention.resume(part, np.inf, o, lse), part_do)
            found.dq[rows] += own.dq
            found.dk[head, keys] += own.dk
            found.dv[head, keys] += own.dv
        if split.rows is not None:
            exact_rows(problem, np.inf, split.rows).backward(saved.o, saved.lse, do, found)
        return found
