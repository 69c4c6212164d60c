"""A decorator for attributes that are computed once, when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class once(Generic[T]):
    """A decorator like `functools.cached_property`, without the lock that it has up to Python 3.11.

    All instances share that lock, so threads would wait for each other's measurements; and a fork while one of them
    holds it leaves it locked in the child for good. Without it, two threads that ask at once may compute the same
    thing twice.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type | None = None) -> T:
        if instance is None:
            return self
        # This descriptor has no __set__, so from now on Python finds the value in the instance's dictionary first.
        value = instance.__dict__[self._name] = self._compute(instance)
        return value
