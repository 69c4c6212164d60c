"""The near field of a problem: its width, and the scale that scores have in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Near(NamedTuple):
    """Where |j - i - offset| < width the score has this scale in the place of the problem's.

    Attributes
    ----------
    width : int
    scale : float or (H, G) float64 array
        One number, or one for each slot and query head.
    """

    width: int
    scale: float | np.ndarray

    @classmethod
    def of(cls, width: int, scale: float | tuple[float, ...], H: int, G: int) -> Near:
        """The near field of H slots of G query heads, given one number or one for each head of a batch element.

        Equal numbers are one number, so that results are bitwise those of that number.
        """
        if not isinstance(scale, tuple):
            return cls(width, scale)
        if len(set(scale)) == 1:
            return cls(width, scale[0])
        # The slots of each batch element follow one another.
        return cls(width, np.resize(np.array(scale, np.float64), (H, G)))

    @property
    def by_head(self) -> bool:
        """Whether each slot and query head has a scale of its own."""
        return isinstance(self.scale, np.ndarray)

    @property
    def largest(self) -> float:
        """The largest scale in size."""
        return float(np.abs(self.scale).max(initial=0)) if self.by_head else abs(self.scale)

    def at(self, which: Any) -> Near:
        """The near field of some of the slots, or of some slots and query heads: what indexes an array (H, G)."""
        return self._replace(scale=self.scale[which]) if self.by_head else self

    def ungrouped(self) -> Near:
        """The near field of the problem with a slot for each query head."""
        return self._replace(scale=self.scale.reshape(-1, 1)) if self.by_head else self

    def times_power(self, exponent: int) -> Near:
        """The near field with its scale multiplied by ``2^exponent``."""
        scale = np.ldexp(self.scale, exponent)
        return self._replace(scale=scale if self.by_head else float(scale))

    def distinct(self, H: int, G: int) -> tuple[np.ndarray, np.ndarray]:
        """The scales that are different, (m,), and which of them each slot and query head has, (H, G) intp."""
        if not self.by_head:
            return np.array([self.scale]), np.zeros((H, G), np.intp)
        scales, which = np.unique(self.scale, return_inverse=True)
        return scales, np.ascontiguousarray(which.reshape(H, G), np.intp)
