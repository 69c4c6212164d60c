"""One call at a time on one state, and a call that changes it does so wholly or not at all.

What calls it meanwhile from another thread is refused.
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
    """The method, which raises RuntimeError while another call of such a method works on the same object.

    The object holds a `threading.Lock` in its attribute ``_in_use``.
    """

    @functools.wraps(method)
    def guarded(self: _Guarded, *args: Any, **kwargs: Any) -> Any:
        # Two threads that both find it free take turns. Only a `with` gives the lock back whenever a Ctrl-C comes.
        if self._in_use.locked():
            raise RuntimeError(
                f"{method.__name__}: got a state that another call is working on, wants one call at a time; "
                "a lock around the calls, or a copy() of the state for each thread, helps"
            )
        with self._in_use:
            return method(self, *args, **kwargs)

    return guarded  # type: ignore[return-value]


def all_or_nothing(method: _Method) -> _Method:
    """The method, after which the object is changed as a whole, or as it was if an exception came, as by Ctrl-C.

    The method works on what ``_draft`` gives, a second object with the same contents. Its attributes then become those
    of the first in one step of the interpreter, and signals are handled between two steps.
    """

    @functools.wraps(method)
    def whole(self: _Guarded, *args: Any, **kwargs: Any) -> Any:
        draft = self._draft()
        result = method(draft, *args, **kwargs)
        self.__dict__.update(draft.__dict__)
        return result

    return whole  # type: ignore[return-value]
