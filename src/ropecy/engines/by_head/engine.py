"""A plan for each group of heads whose scores are of about one size, where one plan for all would cost more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ...certificate import BoundedEntryError, named
from ...problem.problem import Slots
from ..base import Candidate, Context, Engine, Refusal, Search
from ..cost import Work
from ..exact.engine import ExactEngine
from .executable import ByHead, Part
from .groups import groups, in_order


@dataclass(slots=True)
class ByHeadEngine(Engine):
    """Offers to plan heads in groups.

    Parameters
    ----------
    plan : callable
        ``plan(context)`` is the planner's candidate for the heads of a group.
    """

    plan: Callable[[Context], Candidate]

    name: ClassVar[str] = "mixed"
    SUPPORTS: ClassVar[frozenset[str]] = frozenset({"bias", "near", "window", "causal", "key_mask"})

    def offer(self, context: Context, search: Search) -> Candidate | Refusal:
        """A candidate, or a refusal where one plan serves all heads.

        Raises
        ------
        BoundedEntryError
            The engine that is insisted on has no candidate for some heads; the error names them.
        """
        if self.lacks(context.outline):
            return Refusal(self.name)
        together = groups(context)
        if len(together) == 1:
            return Refusal(self.name)
        found = _exact_in_one(context, self._planned(context, together))
        if len(found) == 1:
            return found[0][1]
        candidate = _of_all(context, found)
        return candidate if context.request.method != "auto" or candidate.fits else Refusal(self.name)

    def _planned(self, context: Context, together: list[Slots]) -> list[tuple[Slots, Candidate]]:
        found, refused = [], []
        for slots in together:
            try:
                found.append((slots, self.plan(context.slots(slots))))
            except BoundedEntryError as error:
                heads = context.outline.origin.named(slots, context.outline.sizes.H)
                refused.append(f"{named(heads)}: {error}")
        if refused:
            raise BoundedEntryError("; ".join(refused))
        return found


def _exact_in_one(context: Context, found: list[tuple[Slots, Candidate]]) -> list[tuple[Slots, Candidate]]:
    """The groups, with all heads that are computed exactly in one of them, the last."""
    exact = [(slots, candidate) for slots, candidate in found if candidate.engine == "exact"]
    if len(exact) < 2:
        return found
    every = np.arange(context.outline.sizes.H)
    slots = in_order(np.sort(np.concatenate([every[own] for own, _ in exact])))
    own = context if len(exact) == len(found) else context.slots(slots)
    merged = ExactEngine().offer(own, Search(context.request))
    merged = replace(merged, reason=exact[-1][1].reason)
    return [pair for pair in found if pair[1].engine != "exact"] + [(slots, merged)]


def _of_all(context: Context, found: list[tuple[Slots, Candidate]]) -> Candidate:
    outline, grad = context.outline, context.request.grad
    parts = tuple(Part(slots, candidate.executable) for slots, candidate in found)
    executable = ByHead(parts, outline.sizes, outline.origin, grad)
    work = sum((candidate.work for _, candidate in found), Work())
    size = sum(candidate.bytes for _, candidate in found) + _copies(context, found)
    reasons: dict[str, list[tuple[int, ...]]] = {}
    for heads, (_, candidate) in zip(executable.names, found, strict=True):
        reasons.setdefault(candidate.reason, []).extend(heads)
    reason = "; ".join(f"{named(tuple(heads))}: {why}" for why, heads in reasons.items())
    return Candidate(executable, work, size, reason)


def _copies(context: Context, found: list[tuple[Slots, Candidate]]) -> float:
    """The bytes of the largest copy of slots that do not follow one another, and of their results."""
    _, G, n, n_k, d, d_v = context.piece.sizes
    each = (G * n + n_k) * (d + d_v) * context.piece.dtype.itemsize * (2 if context.request.grad else 1)
    return max(0 if isinstance(slots, slice) else len(slots) * each for slots, _ in found)
