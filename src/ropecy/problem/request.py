"""What the caller asks of planning: how accurate the result must be, and how it may be computed."""

from __future__ import annotations

from dataclasses import dataclass

# What `method` may be: "auto", and the names of engines, which the planner adds when it registers them.
METHODS = ["auto"]


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked beside the problem itself.

    Attributes
    ----------
    eps : float
        The error that is allowed.
    certify : str
        "proof" or "sample".
    method : str
        "auto", or the name of the engine that is insisted on.
    degree : int or None
        The degree of the polynomial, if one is insisted on.
    seed : int or None
        The seed of random numbers; None for a fresh one.
    grad : bool
        Whether there will be a backward pass.
    each_weight : bool
        Whether every single weight must be close to exp, as products with A need. Certificates by moments and samples
        are about sums over keys, so they do not serve then.
    """

    eps: float = 1e-3
    certify: str = "proof"
    method: str = "auto"
    degree: int | None = None
    seed: int | None = None
    grad: bool = False
    each_weight: bool = False

    def takes(self, engine: str) -> bool:
        """Whether an engine of that name may run."""
        return self.method in ("auto", engine)
