"""The processes that hold the pieces of a sequence: the protocol by which they communicate, and the case of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np

T = TypeVar("T")


class Communicator(Protocol):
    """Processes that each hold a contiguous piece of a sequence, in the order of their ranks.

    Every method is collective: all ranks call it, in the same order. `distributed` is True over MPI even if there is a
    single rank, so that it plans in the same way as many ranks do.
    """

    distributed: bool
    rank: int
    size: int

    def together(self, function: Callable[..., T], *args: Any) -> T:
        """Calls function(...) on every rank; if it raises on one rank, all raise."""

    def first(self, function: Callable[..., T], *args: Any) -> T:
        """What function(...) returns or raises on rank 0, on all ranks."""

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in their order."""

    def largest(self, X: np.ndarray) -> np.ndarray:
        """The largest of every rank's X, entry by entry."""

    def largest_before(self, X: np.ndarray) -> np.ndarray:
        """The largest of all lower ranks' X, entry by entry; -inf where there are none."""

    def total(self, X: np.ndarray) -> np.ndarray:
        """The sum of every rank's X."""

    def joined(self, X: np.ndarray, axis: int) -> np.ndarray:
        """Every rank's X along an axis, in their order."""

    def before(self, X: np.ndarray, fall: np.ndarray | None = None) -> np.ndarray:
        """The sum of the X of all lower ranks, which decays by fall[r] on its way past rank r."""

    def after(self, X: np.ndarray, fall: np.ndarray | None = None) -> np.ndarray:
        """The sum of the X of all higher ranks, which decays in the same way."""

    def turned(self) -> Communicator:
        """The same ranks in the other order."""

    def recut(self, X: np.ndarray, cuts: list[int], wanted: list[int]) -> np.ndarray:
        """The rows (axis 2) that this rank has if they are cut among the ranks at `wanted`, given X cut at `cuts`."""


class Serial:
    """The communicator of one process, which holds the whole sequence."""

    distributed = False
    rank, size = 0, 1

    def together(self, function: Callable[..., T], *args: Any) -> T:
        return function(*args)

    def first(self, function: Callable[..., T], *args: Any) -> T:
        return function(*args)

    def gather(self, value: T) -> list[T]:
        return [value]

    def largest(self, X: np.ndarray) -> np.ndarray:
        return X

    def largest_before(self, X: np.ndarray) -> np.ndarray:
        return np.full_like(X, -np.inf)

    def total(self, X: np.ndarray) -> np.ndarray:
        return X

    def joined(self, X: np.ndarray, axis: int) -> np.ndarray:
        return X

    def before(self, X: np.ndarray, fall: np.ndarray | None = None) -> np.ndarray:
        return np.zeros_like(X)

    def after(self, X: np.ndarray, fall: np.ndarray | None = None) -> np.ndarray:
        return np.zeros_like(X)

    def turned(self) -> Serial:
        return self

    def recut(self, X: np.ndarray, cuts: list[int], wanted: list[int]) -> np.ndarray:
        return X


SERIAL = Serial()
