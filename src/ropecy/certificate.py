"""What is promised of a result, and the errors and warnings where no such promise can be made."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple

import numpy as np


class BoundedEntryError(ValueError):
    """The ``method=`` or ``degree=`` that was asked for can't certify eps for scores of this size."""


class PerformanceWarning(UserWarning):
    """The call is predicted to take more than a minute."""


class AccuracyWarning(UserWarning):
    """``method="auto"`` has no engine that certifies eps: rounding alone may be larger in the dtype of the arrays."""


CONFIDENCE = 0.99

# Heads, or heads of packed sequences, as users know them: the tuple of the indices of each.
Indices = tuple[tuple[int, ...], ...]


def unseen(n_rows: int, trials: int = 1) -> float:
    """The fraction of all rows that may, at the given confidence, be worse than the worst of n_rows drawn at random.

    Each of the `trials` draws rows of its own, and the confidence is that of all trials together.
    """
    return 1 - ((1 - CONFIDENCE) / trials) ** (1 / n_rows)


def warn(message: str, category: type[Warning] = PerformanceWarning) -> None:
    """Issue a warning that points at the line of the user's code that called the package."""
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
        "exact", "polynomial" or "fft"; "mixed" where heads, or packed sequences, are computed by different ones.
    degree, n_features : int or None
        The degree of the polynomial, and its number of monomials; None without a polynomial. Where heads or packed
        sequences have degrees of their own it is the largest, as `bound`, `truncation` and `rounding` are.
    bound : float
        B, a bound of the size of every (centred) score of a row that is not computed exactly.
    rule : str
        What `truncation` is derived from: "exact" (there is no truncation), "worst case" (every score may be B),
        "moments" (those of the scores of each row; proved once the row is computed), "mixed" (heads by different
        rules), or "sampled". The last is not proved: it is twice the largest error of `n_sampled` rows of each head,
        of which half are those where the largest errors are expected, and the other m are drawn at random from all
        other rows of the head. With a probability of 1 - degree (1 - b)^m at most a fraction b of these other rows of a
        head has an error above half of `truncation`. The factor `degree` is there since every degree that is tried
        draws rows of its own. Query heads that share keys count as one head.
    truncation : float
        Error of the polynomial, in units of range_j(V_jc), column by column.
    rounding : float
        Error of floating-point arithmetic, in units of the largest range_j(V_jc) of all columns and heads (of
        ``max |V|`` where all columns are constant). It is a model of its size, not a proof, and includes `storing`.
    rows_truncation : (..., n) float64 array or None
        `truncation` row by row, in units of the range over the keys that the row sees; None in a plan. All rows of a
        head that are not exact have the same where the rule is "sampled", or "worst case" without a causal mask. Under
        a causal mask rows with few keys far behind them have less.
    n_exact_rows : int
        How many rows were computed exactly because the polynomial's certificate would be too large for them.
    seed, failure : int or None, float
        The seed of the random numbers, where the rule uses any ("sampled", and the fourth moments of degrees 2 and 3),
        and the probability that they make a proved rule wrong.
    n_sampled : int
        How many rows of each head (of each key head) were computed exactly for comparison with the polynomial's.
    storing : float
        The part of `rounding` that is due to storing a result, which is computed in float32, as float16 or bfloat16; 0
        for float32 and float64. eps bounds the result before it is stored: where an engine certifies eps,
        ``error - storing`` is at most eps.
    parts : tuple of (tuple, Certificate)
        Where heads, or packed sequences, have plans of their own: (slots, certificate) for those of one plan. A slot is
        the tuple of its indices along the leading axes of the keys, such as (batch, key head), and of packed sequences
        the index of its sequence after these. The units of a part's `rounding` are those of its own values, and its
        `rows_truncation` is by slot, query head and row, and None where its sequences have different lengths. () where
        all have one plan.
    packed : bool
        Whether the last index of each slot in `parts` is that of a packed sequence.

    Notes
    -----
    Of a result O, ``|O_ic - Attn_ic| <= truncation range_j(V_jc) + rounding max_c range_j(V_jc)``, the maximum over
    all heads too. For a whole row, apart from rounding and where the rule is proved,
    ``||O_i - Attn_i|| <= 2 rows_truncation_i max_j ||V_j - O_i||`` over the keys that the row sees, in any norm: in
    the 2-norm this is 1.4 (uniform values) to 3 times (Gaussian) sharper than its entries' bounds added up, d_v = 64.
    For gradients, with e = error, omega_i the range over j of <dO_i, V_j>, P the softmax weights,
    zeta = 2 e / (1 - e) and c = abs(scale): dQ_i is within ``c artanh(e) / 4 omega_i diam(K)``, dK_j within ``c
    zeta sum_i P_ij omega_i ||Q_i||``, and dV_jc within ``zeta sum_i P_ij |dO_ic|``. By moments diam(K) is twice the
    largest ``||K_j - mean||``, the mean being that of the keys that are not computed exactly (or twice the largest
    ``||K_j||``, if that bounds scores better), and the bounds of dK and dV hold for the sum over j: with ddX for the
    error of dX, ``sum_j ||ddK_j|| <= c zeta sum_i omega_i ||Q_i||`` and ``sum_j |ddV_jc| <= zeta sum_i
    |dO_ic|``. For a projection Y = X W, ``||ddW||_F <= sum_i ||X_i|| ||ddY_i||``.

    Rounding does not shrink with omega_i or P_ij. With r = rounding and ``w_i = sum_c |dO_ic| range_j(V_jc)``,
    it adds up to ``c r w_i max_j ||K_j - k||`` to dQ_i, k being the mean of the keys (0 beside `near` and with a
    RelativeFamily), ``c r sum_i w_i ||Q_i||`` to every dK_j, and ``r sum_i |dO_ic|`` to every dV_jc, and storing each
    of them adds its own rounding. A bias's gradient at an offset, the sum of the scores' gradients there, is within
    ``zeta sum P_ij omega_i`` over the pairs at that offset, and ``r sum_i w_i`` for rounding. All heads are computed in
    one unit: w_i counts as at least 1e-24 of the largest w of all heads, 1e-180 in float64. Beside `near`, c is the
    larger of the two scales. Q, K and V are those after projections and rotations, as they were computed: where nearly
    all of a projection cancels in float64, gradients are those of the digits that are left.
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
    parts: tuple[tuple[Indices, Certificate], ...] = ()
    packed: bool = False

    @property
    def error(self) -> float:
        """truncation + rounding."""
        return self.truncation + self.rounding

    def __str__(self) -> str:
        heads = {slot[:-1] for slots, _ in self.parts for slot in slots} if self.packed else set()
        words = [named(slots, self.packed, len(heads) == 1) for slots, _ in self.parts]
        lines = [f"  {name}: {part._line()}" for name, (_, part) in zip(words, self.parts, strict=True)]
        return "\n".join([self._line(), *lines])

    def _line(self) -> str:
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
        """The certificate of the same result after storing it in half precision, which adds the error `storing`."""
        return replace(self, rounding=self.rounding + storing, storing=storing) if storing else self

    def _evidence(self) -> str:
        """What the sampled rows show, in words."""
        rows = f"twice that of {self.n_sampled:,} rows of each head (seed {self.seed})"
        if self.rows_truncation is None:
            return f"if {rows} is no more"
        if self.rows_truncation.size == self.n_sampled:
            return f"{rows}, which are all"
        part = unseen(self.n_sampled - self.n_sampled // 2, self.degree)
        others = f"at most {part:.1%} of the others of a head are past half of it"
        return f"{rows}, and with confidence {CONFIDENCE:.0%} {others}"


def together(
    certificates: Sequence[Certificate], units: Sequence[float], parts: tuple[tuple[Indices, Certificate], ...] = ()
) -> Certificate:
    """The certificate of what is computed in pieces, given that of each and the unit that its rounding is in, in units
    of that of the whole; `parts` are those to name. Where all units are 0, since values are constants that O has
    exactly, the rounding is the largest of the pieces.
    """
    if not any(units):
        units = [1.0] * len(units)

    def one(values: set[str]) -> str:
        return values.pop() if len(values) == 1 else "mixed"

    sampled = [c.n_sampled for c in certificates if c.rule == "sampled"]
    polynomials = [c for c in certificates if c.degree is not None]
    seeds = [c.seed for c in certificates if c.seed is not None]
    return Certificate(
        one({c.engine for c in certificates}),
        max((c.degree for c in polynomials), default=None),
        max((c.n_features for c in polynomials), default=None),
        max(c.bound for c in certificates),
        "sampled" if sampled else one({c.rule for c in certificates}),
        max(c.truncation for c in certificates),
        max(unit * c.rounding for unit, c in zip(units, certificates, strict=True)),
        n_exact_rows=sum(c.n_exact_rows for c in certificates),
        seed=seeds[0] if seeds else None,
        failure=sum(c.failure for c in certificates),
        n_sampled=min(sampled, default=0),
        storing=max(unit * c.storing for unit, c in zip(units, certificates, strict=True)),
        parts=parts,
    )


class Entry(NamedTuple):
    """The certificate of some slots, and the unit that its rounding is in."""

    slots: Indices
    certificate: Certificate
    unit: float


def in_one(entries: Sequence[Entry]) -> tuple[Indices, Certificate]:
    """The slots of all of these, and one certificate for them."""
    slots = tuple(sorted(chain.from_iterable(entry.slots for entry in entries)))
    if len(entries) == 1:
        return slots, entries[0].certificate
    largest = max(entry.unit for entry in entries) or 1.0
    return slots, together([entry.certificate for entry in entries], [entry.unit / largest for entry in entries])


def plan_key(certificate: Certificate) -> tuple[object, ...]:
    """What certificates of one plan share."""
    return certificate.engine, certificate.rule, certificate.degree


def by_plan(entries: Sequence[Entry]) -> tuple[tuple[Indices, Certificate], ...]:
    """The parts of those that have one plan; () where all have."""
    found: dict[object, list[Entry]] = {}
    for entry in entries:
        found.setdefault(plan_key(entry.certificate), []).append(entry)
    return tuple(in_one(group) for group in found.values()) if len(found) > 1 else ()


def named(slots: Indices, packed: bool = False, one_head: bool = False) -> str:
    """Some slots in words, by their indices where they are few.

    With `packed` the last index of each is that of a sequence, and with `one_head` there is one head alone.
    """
    if not packed:
        return _counted("head", slots)
    which, heads = (sorted({slot[at] for slot in slots}) for at in (slice(-1, None), slice(0, -1)))
    of = _counted("sequence", which)
    if one_head:
        return of
    every = len(slots) == len(which) * len(heads)
    return f"{_counted('head', heads) if every else f'{len(slots):,} heads'} of {of}"


def _counted(word: str, which: Sequence[tuple[int, ...]]) -> str:
    if len(which) > 4:
        return f"{len(which):,} {word}s"
    names = (str(index[0]) if len(index) == 1 else str(index) for index in which)
    return f"{word}{'s' * (len(which) > 1)} {', '.join(names)}"


def nothing_to_do() -> Certificate:
    """The certificate of a result without a pair of a query and a key: exactly 0."""
    return Certificate("exact", None, None, 0.0, "exact", 0.0, float(np.finfo(np.float64).eps))
