"""What is promised of a result, and what stands in the way of a promise."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field, replace

import numpy as np


class BoundedEntryError(ValueError):
    """A method or a degree that was insisted on can't certify eps for scores of this size."""


class PerformanceWarning(UserWarning):
    """Work that is predicted to take more than a minute."""


class AccuracyWarning(UserWarning):
    """``method="auto"`` has no engine that certifies eps: rounding alone may be larger in the dtype of the arrays."""


CONFIDENCE = 0.99


def unseen(n_rows: int, trials: int = 1) -> float:
    """The part of all rows that may be worse than the worst of n_rows drawn at random, with that confidence, where each
    of so many trials draws its own.
    """
    return 1 - ((1 - CONFIDENCE) / trials) ** (1 / n_rows)


def warn(message: str, category: type[Warning] = PerformanceWarning) -> None:
    """A warning at the line that called the package."""
    frame, level = sys._getframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is promised of a result.

    Attributes
    ----------
    engine : str
        "exact", "polynomial" or "fft".
    degree, n_features : int or None
        Of the polynomial.
    bound : float
        B, a bound of every (centred) score of a row that is not computed exactly.
    rule : str
        What the bound of the truncation rests on: "exact" (there is none), "worst case" (every score may be B),
        "moments" (of the scores of each row; proved once the row is computed), or "sampled": not proved, but twice the
        largest error of `n_sampled` rows, half of them those that have most to fear, half drawn from the others. m of
        these say, with a probability of 1 - degree (1 - b)^m, that at most a part b of the others is past half of it:
        every degree that is tried has rows of its own.
    truncation : float
        Error of the polynomial, in units of range_j(V_jc), column by column.
    rounding : float
        Of floating point, in units of the largest range_j(V_jc) of all columns and heads (of ``max |V|`` where
        all are constant): a model of its size, not a proof. It includes `storing`.
    rows_truncation : (..., n) float64 array or None
        `truncation` row by row, in units of the range over the keys that the row sees; None in a plan. By the worst
        case without a causal mask, and where it is "sampled", all rows that are not exact have the same; under a causal
        mask rows with few keys far behind them have less.
    n_exact_rows : int
        How many rows were computed exactly, the polynomial's certificate being too large there.
    seed, failure : int or None, float
        Of the coins behind the rule, where coins were used ("sampled", and the fourth moments of degrees 2 and 3), and
        the probability that they make a proved rule wrong.
    n_sampled : int
        How many rows were computed exactly to be compared.
    storing : float
        The part of `rounding` that comes of storing a result, which is computed in float32, as float16 or bfloat16; 0
        for float32 and float64. eps is asked of the result before it is stored: ``error - storing`` is within eps where
        an engine certifies it.

    Notes
    -----
    Of a result O, ``|O_ic - Attn_ic| <= truncation range_j(V_jc) + rounding max_c range_j(V_jc)``, the maximum over
    all heads too. Of a whole row, but for rounding and where it is proved,
    ``||O_i - Attn_i|| <= 2 rows_truncation_i max_j ||V_j - O_i||`` over the keys that the row sees, in any norm: in
    the 2-norm 1.4 (uniform values) to 3 times (Gaussian) sharper than its entries' bounds added up, d_v = 64. Of
    gradients, with e = error, omega_i the range over j of <dO_i, V_j>, P the softmax weights,
    zeta = 2 e / (1 - e) and c = abs(scale): dQ_i is within ``c artanh(e) / 4 omega_i diam(K)``, dK_j within ``c
    zeta sum_i P_ij omega_i ||Q_i||``, and dV_jc within ``zeta sum_i P_ij |dO_ic|``. By moments diam(K) is twice the
    largest ``||K_j - mean||``, the mean being that of the keys that are not computed exactly (or twice the largest
    ``||K_j||``, if that bounds scores better), and what is said of dK and dV holds of the sum over j: with ddX for
    what dX is off by, ``sum_j ||ddK_j|| <= c zeta sum_i omega_i ||Q_i||`` and ``sum_j |ddV_jc| <= zeta sum_i
    |dO_ic|``. Of the projection of X, ``||ddW||_F <= sum_i ||X_i|| ||ddY_i||``, Y = X W.

    Rounding does not shrink with omega_i or P_ij. With r = rounding and ``w_i = sum_c |dO_ic| range_j(V_jc)``,
    it adds up to ``c r w_i max_j ||K_j - k||`` to dQ_i, k being the mean of the keys (0 beside `near` and with a
    RelativeFamily), ``c r sum_i w_i ||Q_i||`` to every dK_j, and ``r sum_i |dO_ic|`` to every dV_jc, and that of
    storing each of them. What a bias receives at an offset, the sum of the scores' gradients there, is within
    ``zeta sum P_ij omega_i`` over the pairs at that offset, and ``r sum_i w_i`` for rounding. All heads are computed in
    one unit: w_i counts as at least 1e-24 of the largest w of all heads, 1e-180 in float64. Beside `near`, c is the
    larger of the two scales. Q, K and V are those behind projections and rotations, as they were computed: where nearly
    all of a projection cancels in float64, gradients follow what is left of it.
    """

    engine: str
    degree: int | None
    n_features: int | None
    bound: float
    rule: str
    truncation: float
    rounding: float
    rows_truncation: np.ndarray | None = field(default=None, repr=False, compare=False)
    n_exact_rows: int = 0
    seed: int | None = None
    failure: float = 0.0
    n_sampled: int = 0
    storing: float = 0.0

    @property
    def error(self) -> float:
        """truncation + rounding."""
        return self.truncation + self.rounding

    def __str__(self) -> str:
        how = self.engine
        if self.degree is not None:
            how += f", degree {self.degree} ({self.n_features:,} features)"
        coins = f" but for a probability of {self.failure:g} (seed {self.seed})" if self.failure else ""
        if self.rule == "sampled":
            coins = f", {self._evidence()}, not proved"
        rows = f", {self.n_exact_rows:,} rows exactly" if self.n_exact_rows else ""
        storing = f", of which {self.storing:.2g} for storing it in half precision" if self.storing else ""
        return (
            f"{how}{rows}: error <= {self.error:.2g}{coins} ({self.rule}: truncation {self.truncation:.2g}, "
            f"rounding {self.rounding:.2g}{storing}), scores within {self.bound:.4g}"
        )

    def stored(self, storing: float) -> Certificate:
        """That of the same result once it is stored in half precision, which adds so much."""
        return replace(self, rounding=self.rounding + storing, storing=storing) if storing else self

    def _evidence(self) -> str:
        """What sampled rows say."""
        rows = f"twice that of {self.n_sampled:,} rows (seed {self.seed})"
        if self.rows_truncation is None:
            return f"if {rows} is no more"
        if self.rows_truncation.size <= self.n_sampled:
            return f"{rows}, which are all"
        part = unseen(self.n_sampled - self.n_sampled // 2, self.degree)
        return f"{rows}, and with confidence {CONFIDENCE:.0%} at most {part:.1%} of the others are past half of it"


def nothing_to_do() -> Certificate:
    """The certificate of a result without a pair of a query and a key: exactly 0."""
    return Certificate("exact", None, None, 0.0, "exact", 0.0, float(np.finfo(np.float64).eps))
