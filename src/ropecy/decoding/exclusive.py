"""One call at a time on one state: what calls it meanwhile from another thread is refused, and waits for nothing."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar


class _Guarded(Protocol):
    _in_use: threading.Lock


_Method = TypeVar("_Method", bound=Callable[..., Any])


def one_call_at_a_time(method: _Method) -> _Method:
    """The method, which raises RuntimeError while another call of such a method works on the same object.

    The object holds a `threading.Lock` in its attribute ``_in_use``.
    """

    @functools.wraps(method)
    def guarded(self: _Guarded, *args: Any, **kwargs: Any) -> Any:
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError(
                f"{method.__name__}: got a state that another call is working on, wants one call at a time; "
                "a lock around the calls, or a copy() of the state for each thread, helps"
            )
        try:
            return method(self, *args, **kwargs)
        finally:
            self._in_use.release()

    return guarded  # type: ignore[return-value]
