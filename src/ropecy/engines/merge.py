"""Softmax over several sets of keys, merged by the log of their sums."""

from __future__ import annotations

import numpy as np


def merge(o: np.ndarray, lse: np.ndarray, part: np.ndarray, part_lse: np.ndarray) -> None:
    """Softmax over two sets of keys from softmax over each, in place."""
    both = np.logaddexp(lse, part_lse)
    o *= share(lse, both).astype(o.dtype)[..., None]
    o += share(part_lse, both).astype(o.dtype)[..., None] * part
    lse[...] = both


def share(lse: np.ndarray, both: np.ndarray) -> np.ndarray:
    """exp(lse - both), of a row's weight what some keys have; 0 where they are not seen."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(lse), 0, np.exp(lse - both))
