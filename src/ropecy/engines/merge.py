"""Merging the results of softmax over several sets of keys by the logs of their sums of weights (lse)."""

from __future__ import annotations

import numpy as np


def merge(o: np.ndarray, lse: np.ndarray, part: np.ndarray, part_lse: np.ndarray) -> None:
    """Turns o and lse, in place, from results over one set of keys into results over two, given those of the other."""
    both = np.logaddexp(lse, part_lse)
    o *= share(lse, both).astype(o.dtype)[..., None]
    o += share(part_lse, both).astype(o.dtype)[..., None] * part
    lse[...] = both


def share(lse: np.ndarray, both: np.ndarray) -> np.ndarray:
    """``exp(lse - both)``, the share of a row's weight that some of its keys have; 0 if it sees none of them."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(lse), 0, np.exp(lse - both))
