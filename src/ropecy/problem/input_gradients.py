"""The gradients that every engine gives, by name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..approximation.bias_forms import FarGradient


@dataclass(slots=True)
class SymbolGradient:
    """A part of the gradient of a bias, by offset.

    Attributes
    ----------
    values : (H, G, m) float64 array or FarGradient
        At the offsets t = j - i from `first` on.
    first : int
    """

    values: np.ndarray | FarGradient
    first: int


@dataclass(frozen=True, slots=True)
class Exponents:
    """The powers of two that gradients of a normal form are to be multiplied with, for those of what it was made of.

    Attributes
    ----------
    scores : int
        Of gradients of a bias and of a family.
    q, k : int or (H,) int array
        Of those of q and k, one for each slot where they are unlike.
    v, near : int
        Of those of v and of a near field's scale.
    """

    scores: int = 0
    q: int | np.ndarray = 0
    k: int | np.ndarray = 0
    v: int = 0
    near: int = 0


AS_IT_IS = Exponents()


@dataclass(slots=True)
class InputGradients:
    """The gradients of ``<do, O>`` with respect to what a `Problem` holds.

    Attributes
    ----------
    dq, dk, dv : arrays
        In the shapes and the dtype of q, k and v.
    symbol : tuple of SymbolGradient
        Parts of the gradient of the bias, which add up; of a sequence in pieces, those that this process has found.
    family : (|S|, n + n_k - 1) float64 array or None
        That of the entries of a family at the offsets t = i + offset - j, from the least on.
    scale_near : float or None
        That of the near field's scale; of a sequence in pieces, the part of this process.
    """

    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    symbol: tuple[SymbolGradient, ...] = ()
    family: np.ndarray | None = None
    scale_near: float | None = None
