"""Runs of hidden keys: how far a row may be from the nearest key that it sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..problem.communicator import SERIAL, Communicator
from ..problem.problem import Outline, Slots


@dataclass(slots=True)
class Hidden:
    """How many keys in a row key_mask hides, for each slot.

    Attributes
    ----------
    between : (H,) int array
        The longest run of hidden keys between two kept ones.
    start, end : (H,) int arrays
        How many hidden keys there are before the first kept one and after the last one.
    """

    between: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def slots(self, which: Slots) -> Hidden:
        """Those of some of the slots."""
        return Hidden(self.between[which], self.start[which], self.end[which])


def hidden_keys(problem: Outline, comm: Communicator = SERIAL) -> Hidden:
    """The runs of hidden keys in the whole sequence, over all ranks. Time O(n_k)."""
    H, n_k, kept_keys = problem.sizes.H, problem.mask.n_k, problem.mask.kept
    own = Hidden(np.zeros(H, int), np.zeros(H, int), np.zeros(H, int))
    if kept_keys is not None and n_k:
        index = np.where(kept_keys, np.arange(n_k), -1)
        last = np.maximum.accumulate(index, axis=1)
        before = np.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        own.between = np.where((index >= 0) & (before >= 0), index - before - 1, 0).max(axis=1)
        own.start = np.where(last[:, -1] >= 0, kept_keys.argmax(axis=1), n_k)
        own.end = n_k - 1 - last[:, -1]
    found, seen = Hidden(np.zeros(H, int), np.zeros(H, int), np.zeros(H, int)), np.zeros(H, bool)
    for length, piece in comm.gather((n_k, own)):
        kept = piece.start < length
        across = np.where(seen & kept, found.end + piece.start, 0)
        found.between = np.maximum(found.between, np.maximum(piece.between, across))
        found.start = found.start + np.where(seen, 0, piece.start)
        found.end = np.where(kept, piece.end, found.end + length)
        seen = seen | kept
    return found
