"""A matrix for each offset between a query and a key, as engines read it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np


@dataclass(slots=True)
class Family:
    """Matrices W_t, t = i + offset - j, that stand between q_i and k_j in the scores ``scale q_i W_t k_j^T``.

    Attributes
    ----------
    values : (M, |S|) float32 or float64
        W_t[a, b] at index t + zero, clipped to 0 .. M - 1, for the pairs (a, b) of the support.
    left, right : (|S|,) intp
        The pairs: a, of queries, and b, of keys.
    zero : int
        The index of W_0.
    """

    values: np.ndarray
    left: np.ndarray
    right: np.ndarray
    zero: int

    @property
    def used(self) -> list[int]:
        """The pairs of the support whose entries are not 0 at all offsets."""
        return np.flatnonzero(self.values.any(axis=0)).tolist()

    def rows(self, first: int, last: int) -> np.ndarray:
        """The index in `values` of the offsets t from first to last."""
        return np.clip(np.arange(first, last + 1) + self.zero, 0, len(self.values) - 1)

    def matrix(self, t: int, d: int) -> np.ndarray:
        """The matrix W_t, (d, d) float64."""
        W = np.zeros((d, d))
        np.add.at(W, (self.left, self.right), self.values[self.rows(t, t)[0]])
        return W

    def transposed(self) -> Family:
        """The family of the transposed matrices W_t^T."""
        return replace(self, left=self.right, right=self.left)

    def gradient(self, dentries: np.ndarray, first: int) -> np.ndarray:
        """The gradient of `values`, (M, |S|) float64.

        `dentries`, (|S|, m), is the gradient of the entries at the offsets first, first + 1, ... Offsets that are
        clipped to one index add up.
        """
        index = self.rows(first, first + dentries.shape[1] - 1)
        dvalues = np.zeros(self.values.shape)
        starts = np.flatnonzero(np.diff(index, prepend=-1))
        if starts.size:
            dvalues[index[starts]] = np.add.reduceat(dentries, starts, axis=1).T
        return dvalues
