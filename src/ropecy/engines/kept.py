"""A decorator that keeps the latest results of a function, in bounded memory, for calls with the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

_RESULTS = 16  # how many results are kept: few, because a look-up compares the arguments with those of each


def kept_below(size: Callable[..., int], most: int = 2**16) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that keeps the results of the latest calls, as long as they have at most `most` entries together.

    `size` tells from the arguments how many entries a result has. A result larger than `most` is made again by every
    call: it is used in work that takes far longer.
    """

    def decorate(make: Callable[..., Any]) -> Callable[..., Any]:
        # Pairs of arguments and result, the latest first. Threads replace the whole tuple, so none sees a part of it
        # and no lock can be left locked by a fork; where two do so at once, one of the results is made again later.
        kept: tuple[tuple[tuple[Any, ...], Any], ...] = ()

        @wraps(make)
        def found(*arguments: Any) -> Any:
            nonlocal kept
            known = kept
            if known and known[0][0] == arguments:
                return known[0][1]
            if size(*arguments) > most:
                return make(*arguments)
            result = next((own for of, own in known if of == arguments), None)
            if result is None:
                result = make(*arguments)
            latest, room = [], most
            for of, own in ((arguments, result), *(pair for pair in known if pair[0] != arguments)):
                room -= size(*of)
                if room < 0:
                    break
                latest.append((of, own))
            kept = tuple(latest[:_RESULTS])
            return result

        return found

    return decorate
