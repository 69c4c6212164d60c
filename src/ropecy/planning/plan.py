"""A plan: what will run, what it promises and costs, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..certificate import Certificate

if TYPE_CHECKING:
    from ..distributed.network import Exchange


@dataclass(frozen=True, slots=True)
class Alternative:
    """What another engine, or another call, would promise and cost; `certificate` is None where it certifies nothing.

    Attributes
    ----------
    name : str
        The engine and its rule, or what would have to change in the call.
    certificate : Certificate or None
    seconds, bytes : float
        Predicted time, and memory beyond inputs and outputs; inf where there is no certificate.
    pays_from : int or None
        The n from which it is predicted to be faster than exact attention, for n queries and n keys. None where it
        never is, and for the exact engine.
    refusal : str or None
        Why there is no certificate.
    """

    name: str
    certificate: Certificate | None
    seconds: float = math.inf
    bytes: float = math.inf
    pays_from: int | None = None
    refusal: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """Which engine runs, what it promises, and why; ``print(plan)`` explains itself.

    Attributes
    ----------
    engine : str
        "exact", "polynomial" or "fft".
    certificate : Certificate
        The certificate of O.
    gradient_certificate : Certificate or None
        The certificate of gradients, where they were asked for.
    reason : str
        Why this engine was chosen.
    seconds, bytes : dict
        By engine: predicted time on this machine, and memory beyond inputs and outputs. Over MPI ranks: the time with
        all their threads together, and the memory of the rank that needs most.
    alternatives : tuple of Alternative
        What `plan` found of each engine: its ``name``, ``certificate`` (None where it certifies nothing; ``refusal``
        then says why), ``seconds``, ``bytes``, and ``pays_from``, the n from which it is faster than exact attention.
    advice : tuple of Alternative
        Changes of the call that would allow a polynomial, or a cheaper one, with the same predictions for each.
    exchange : Exchange or None
        Over MPI ranks: bytes that this rank (`exchange.own`) and the worst one (`exchange.worst`) send and receive, and
        the seconds that this takes by `exchange.network`.
    """

    engine: str
    certificate: Certificate
    gradient_certificate: Certificate | None
    reason: str
    seconds: dict[str, float]
    bytes: dict[str, float]
    alternatives: tuple[Alternative, ...] = ()
    advice: tuple[Alternative, ...] = ()
    exchange: Exchange | None = None
    _of: tuple[str, ...] = field(default=(), repr=False)  # lines of text that describe the problem

    def __str__(self) -> str:
        lines = [
            *self._of,
            *(self._table() if self.alternatives else self._seconds()),
            *([] if self.exchange is None else [f"exchange  {self.exchange}"]),
            f"result    {self.certificate}",
        ]
        if self.gradient_certificate:
            lines.append(f"gradient  {self.gradient_certificate}")
        lines.append(f"because   {self.reason}")
        return "\n".join(lines + [_advice(place, other) for place, other in enumerate(self.advice)])

    def __repr__(self) -> str:
        return f"Plan({self.certificate}; {self.seconds.get(self.engine, 0.0):.2g} s)"

    def _table(self) -> Iterator[str]:
        yield f"   {'engine':<24} {'degree':>6} {'features':>11} {'error':>8} {'seconds':>9} {'MiB':>10}  pays from n"
        taken = {self.engine, f"{self.engine}, {self.certificate.rule}"}
        for other in self.alternatives:
            mark, certificate = "->" if other.name in taken else "  ", other.certificate
            if certificate is None:
                yield f"{mark} {other.name:<24} no: {other.refusal}"
                continue
            degree = "-" if certificate.degree is None else certificate.degree
            features = "-" if certificate.degree is None else f"{certificate.n_features:,}"
            least = "-" if other.pays_from is None else f"{other.pays_from:,}"
            yield (
                f"{mark} {other.name:<24} {degree:>6} {features:>11} {certificate.error:8.1e} {other.seconds:9.3g} "
                f"{other.bytes / 2**20:10,.1f}  {least:>11}"
            )

    def _seconds(self) -> Iterator[str]:
        for engine, seconds in self.seconds.items():
            mark = "->" if engine == self.engine else "  "
            yield f"{mark} {engine:<10} {seconds:9.3g} s {self.bytes[engine] / 2**20:10,.1f} MiB"


def _advice(place: int, other: Alternative) -> str:
    certificate = other.certificate
    proved = "not proved" if certificate.rule == "sampled" else f"error <= {certificate.error:.1e}"
    least = "" if other.pays_from is None else f", pays from n = {other.pays_from:,}"
    return (
        f"{'' if place else 'instead':<9} {other.name}: degree {certificate.degree}, {certificate.n_features:,} "
        f"features, B = {certificate.bound:.3g}, {proved}, {other.seconds:.3g} s{least}"
    )
