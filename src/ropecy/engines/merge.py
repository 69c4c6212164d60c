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


def row_sums(do: np.ndarray, own: np.ndarray, o: np.ndarray, own_share: np.ndarray) -> np.ndarray:
    """sum_j dS_ij over the keys of a part, (H, G, n) float64.

    `own` is O over these keys alone, `own_share` what they have of the weight of each row, and o is O over all keys. A
    row's gradient does not see what is taken from all of its keys where this sum is 0, as it is over all keys.
    """
    return np.einsum("hgnc,hgnc->hgn", do, own - o, dtype=np.float64) * own_share
