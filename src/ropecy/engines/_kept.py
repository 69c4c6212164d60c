"""Results of a function that are kept for the next call with the same arguments, where they are small."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

# What is larger goes with work that takes far longer than to make it again.
_LARGEST = 2**16


def kept_below(size: Callable[..., float], results: int = 16) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: the last so many results are kept, but for those of which `size` tells more than 65,536 entries."""

    def decorate(make: Callable[..., Any]) -> Callable[..., Any]:
        kept = lru_cache(maxsize=results)(make)

        @wraps(make)
        def found(*arguments: Any) -> Any:
            return (kept if size(*arguments) <= _LARGEST else make)(*arguments)

        return found

    return decorate
