"""Plans for parts of a problem: for heads whose scores are of about one size, and for packed sequences of one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np

from ...certificate import BoundedEntryError, named
from ...certify.scores import measure_norms, room
from ...problem.problem import Slots, in_order
from ..base import Candidate, Context, Engine, Refusal, Search
from ..cost import Work
from ..exact.engine import ExactEngine
from .executable import InParts, Part
from .groups import Groups, with_a_seed
from .selection import Heads, Sequences

Plan = Callable[[Context], Candidate]
Split = Callable[[Context, float], Candidate | None]


class _Group(NamedTuple):
    """Some slots, the context that they were planned in, and their candidate."""

    slots: Slots
    context: Context
    candidate: Candidate


def by_head(groups: Groups, plan: Plan, split: Split) -> Candidate:
    """The candidate that runs a plan for each group of slots.

    `plan` is for slots together, without a look at outliers; ``split(context, seconds)`` takes outliers out of one
    slot, if that takes less.

    Raises
    ------
    BoundedEntryError
        The engine that is insisted on has no candidate for some heads; the error names them.
    """
    context, together = groups.context, {key: list(slots) for key, slots in groups.together.items()}
    apart = []
    for slot, (key, seconds) in groups.alone.items():
        own = context.slots(slice(slot, slot + 1))
        candidate = split(own, seconds * own.outline.share / context.outline.share)
        if candidate is None:
            together.setdefault(key, []).append(slot)
        else:
            apart.append(_Group(slice(slot, slot + 1), own, candidate))
    alike = [in_order(np.sort(slots)) for _, slots in sorted(together.items())]
    found = _exact_in_one(context, _planned(context, alike, plan) + apart)
    if len(found) == 1:
        return found[0].candidate
    origin, H = context.outline.origin, context.outline.sizes.H
    parts = []
    for slots, own, candidate in found:
        planned = context.problem, own.problem
        parts.append(Part(Heads(slots), candidate.executable, partial(origin.named, slots, H), planned))
    candidates = [group.candidate for group in found]
    reasons = [(part.named(), own.reason) for part, own in zip(parts, candidates, strict=True)]
    reasons = _joined(reasons, partial(named, packed=origin.sequences is not None))
    copied = sum(0 if isinstance(group.slots, slice) else len(group.slots) for group in found)
    return _of_parts(context, parts, candidates, reasons, copied * _slot(context))


def _planned(context: Context, together: list[Slots], plan: Plan) -> list[_Group]:
    found, refused = [], []
    for slots in together:
        own = context.slots(slots)
        try:
            found.append(_Group(slots, own, plan(own)))
        except BoundedEntryError as error:
            origin = context.outline.origin
            slots = origin.named(slots, context.outline.sizes.H)
            refused.append(f"{named(slots, origin.sequences is not None)}: {error}")
    if refused:
        raise BoundedEntryError("; ".join(refused))
    return found


@dataclass(slots=True)
class BySequence(Engine):
    """Offers a plan for each shape of packed sequences; those of one shape are slots of one problem.

    Parameters
    ----------
    plan : callable
        ``plan(context)`` is the planner's candidate for the sequences of one shape.
    """

    plan: Plan

    name: ClassVar[str] = "mixed"
    SUPPORTS: ClassVar[frozenset[str]] = frozenset({"bias", "near", "window", "causal", "key_mask", "packed"})

    def offer(self, context: Context, search: Search) -> Candidate | Refusal:
        lacking = self.lacks(context.outline)
        if lacking:
            return self.unable(lacking)
        whole, request, parts, found = context.problem, with_a_seed(context).request, [], []
        if whole.origin.projected:
            # What projections lost is relative to the longest row of a head, which may be in another sequence.
            norms = measure_norms(whole)
            k_norm = norms.k if whole.origin.k_norm is None else whole.origin.k_norm
            whole = replace(whole, origin=replace(whole.origin, q_norm=norms.q, k_norm=k_norm))
        for alike in context.outline.mask.packed.alike:
            selection = Sequences(alike)
            problem = selection.problem(whole)
            if not problem.empty:
                own = Context.of(problem, request)
                found.append(ExactEngine().offer(_as_given(own), Search(request)) if alike.done else self.plan(own))
                slots = partial(problem.origin.named, slice(None), problem.sizes.H)
                parts.append(Part(selection, found[-1].executable, slots, planned=(context.problem, problem)))
        reasons = [(part.selection.alike.which, own.reason) for part, own in zip(parts, found, strict=True)]
        # The sequences, which are taken out of the whole.
        extra = context.outline.sizes.H * _slot(context)
        return _of_parts(context, parts, found, _joined(reasons, _counted), extra)


def _as_given(context: Context) -> Context:
    """The context of sequences whose results are computed from keys and values as they were given: rounding is in
    proportion to these, and not to what their normal form leaves.
    """
    problem, statistics = context.problem, context.statistics
    origin, values = problem.origin, statistics.values
    # One value alone is the result as it is.
    if origin.largest is not None and problem.sizes.n_k > 1:
        values.exact = False
        values.residual = max(values.residual, float(origin.largest.max()) / (values.spread or 1.0))
    if origin.k_norm is not None:
        products = float((measure_norms(problem).q * origin.k_norm).max()) * room(problem)
        statistics.plain = replace(statistics.plain, products=products, plain=products * abs(problem.scale))
    return context


def _exact_in_one(context: Context, found: list[_Group]) -> list[_Group]:
    """The groups, with all heads that are computed exactly in one of them, the last."""
    exact = [group for group in found if group.candidate.engine == "exact"]
    if len(exact) < 2:
        return found
    every = np.arange(context.outline.sizes.H)
    slots = in_order(np.sort(np.concatenate([every[group.slots] for group in exact])))
    own = context if len(exact) == len(found) else context.slots(slots)
    merged = ExactEngine().offer(own, Search(context.request))
    merged = replace(merged, reason=exact[-1].candidate.reason)
    return [group for group in found if group.candidate.engine != "exact"] + [_Group(slots, own, merged)]


def _of_parts(
    context: Context, parts: list[Part], found: list[Candidate], reason: str, extra: float
) -> Candidate:
    """The candidate that runs all parts; `extra` are the bytes of the copies that are taken out of the whole."""
    executable = InParts(tuple(parts), context.statistics, context.request.grad)
    work = sum((candidate.work for candidate in found), Work())
    return Candidate(executable, work, sum(candidate.bytes for candidate in found) + extra, reason)


def _joined(reasons: list[tuple[Sequence, str]], words: Callable[[tuple], str]) -> str:
    """The reasons of all parts, each once, after what they are the reasons for."""
    found: dict[str, list] = {}
    for which, reason in reasons:
        found.setdefault(reason, []).extend(which)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{words(tuple(which))}: {reason}" for reason, which in found.items())


def _counted(which: tuple) -> str:
    return f"{len(which):,} sequence{'s' * (len(which) > 1)}"


def _slot(context: Context) -> float:
    """The bytes of the rows, keys, values and results of a slot."""
    _, G, n, n_k, d, d_v = context.piece.sizes
    return (G * n + n_k) * (d + d_v) * context.piece.dtype.itemsize * (2 if context.request.grad else 1)
