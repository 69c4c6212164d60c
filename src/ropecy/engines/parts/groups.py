"""Which slots of a problem are planned together, because one engine computes all of them with one degree."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, replace

from ..base import Alike, Context, Engine
from ..exact.cost import exact_work
from ..fft.engine import FFTEngine
from ..near_far.engine import NearFarEngine
from ..outliers.engine import worth_splitting
from ..polynomial.moment_search import search
from ..polynomial.worst_case import WorstCase, left_by_rounding, of_each_slot, worth_measuring

# With method="auto" a slot of fewer pairs of rows and keys is computed exactly, whatever its scores are.
_FEW_PAIRS = 2**14
# In the order in which the planner asks them. A slot is computed by the first one that has something for it.
_ENGINES: tuple[Engine, ...] = (WorstCase(), NearFarEngine(), FFTEngine())


@dataclass(slots=True)
class Groups:
    """The slots of a problem in groups. The group of a slot depends on its own numbers and on the shape of the call.

    Attributes
    ----------
    context : Context
        What engines are to be asked about, with what was found of moments.
    together : dict
        The slots of each group by what they have in common, by which groups are in order.
    alone : dict
        Of slots that outliers may be taken out of: their group otherwise, and the seconds that these take there.
    """

    context: Context
    together: dict[tuple[float, ...], list[int]]
    alone: dict[int, tuple[tuple[float, ...], float]]


def groups(context: Context) -> Groups | None:
    """The slots in groups; None where all of them are planned together, whatever their scores are."""
    outline, request = context.outline, context.request
    H, _, n, n_k, *_ = outline.sizes
    if H < 2 or outline.family is not None or request.method == "exact" or request.degree is not None:
        return None
    exact, most = exact_work(outline, request.grad), math.inf
    if request.method == "auto":
        most = exact.nominal
        if n * n_k < _FEW_PAIRS:
            return None
    plain = WorstCase().lacks(outline) is None
    if plain and not worth_measuring(context, exact, any_slot=True):
        return None
    context = with_a_seed(context)
    if plain and request.certify == "proof" and request.takes("polynomial"):
        found = of_each_slot(context, left_by_rounding(context))
        context = replace(context, by_moments=tuple(search(context, [0 if p is None else p.degree for p in found])))
    keys = _keys(context, most)
    together, alone = {}, {}
    promising = worth_splitting(context, [most if own is None else own.seconds for own in keys])
    for slot, own in enumerate(keys):
        # Last come those for which there is no engine but the exact one, if that may run.
        key, seconds = (math.inf,) if own is None else own.key, most if own is None else own.seconds
        if promising[slot]:
            alone[slot] = key, seconds
        else:
            together.setdefault(key, []).append(slot)
    return Groups(context, together, alone)


def _keys(context: Context, most: float) -> list[Alike | None]:
    """How each slot would be computed, if by another engine than the exact one."""
    found: list[Alike | None] = [None] * context.outline.sizes.H
    for place, engine in enumerate(_ENGINES):
        if None in found and context.request.takes(engine.name):
            for slot, own in enumerate(engine.alike(context, most)):
                if found[slot] is None and own is not None:
                    found[slot] = own._replace(key=(place, *own.key))
    return found


def with_a_seed(context: Context) -> Context:
    """The context with a seed, one for all parts, so that what was drawn can be drawn again."""
    return context if context.request.seed is not None else context.asking(seed=secrets.randbits(62))
