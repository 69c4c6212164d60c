"""Decorators for methods of a state: one call works on it at a time, and a call changes it wholly or not at all.

While a call works on a state, calls from other threads on the same state are refused.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar


class _Guarded(Protocol):
    _in_use: threading.Lock

    def _draft(self) -> _Guarded: ...


_Method = TypeVar("_Method", bound=Callable[..., Any])


def one_call_at_a_time(method: _Method) -> _Method:
    """The method, made to raise RuntimeError while another call of a method decorated like this uses the same object.

    The object holds a `threading.Lock` in its attribute ``_in_use``.
    """

    @functools.wraps(method)
    def guarded(self: _Guarded, *args: Any, **kwargs: Any) -> Any:
        # Two threads that both find the lock free here take turns at the `with` below. A `with` is used because only it
        # gives the lock back no matter when a Ctrl-C comes.
        if self._in_use.locked():
            raise RuntimeError(
                f"{method.__name__}: got a state that another call is working on, wants one call at a time; "
                "a lock around the calls, or a copy() of the state for each thread, helps"
            )
        with self._in_use:
            return method(self, *args, **kwargs)

    return guarded  # type: ignore[return-value]


def all_or_nothing(method: _Method) -> _Method:
    """The method, made to leave the object as it was if an exception ends it, such as KeyboardInterrupt by Ctrl-C.

    The method works on a second object with the same contents, which ``_draft`` makes. When it has returned, all
    attributes of the second object are given to the first in one step of the interpreter. Python handles signals
    between such steps only, so a Ctrl-C can't come in the middle.
    """

    @functools.wraps(method)
    def whole(self: _Guarded, *args: Any, **kwargs: Any) -> Any:
        draft = self._draft()
        result = method(draft, *args, **kwargs)
        self.__dict__.update(draft.__dict__)
        return result

    return whole  # type: ignore[return-value]
