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
        The gradient at the offsets t = j - i - offset from `first` on.
    first : int
    """

    values: np.ndarray | FarGradient
    first: int


@dataclass(frozen=True, slots=True)
class Exponents:
    """The exponents of two that turn gradients of a problem in normal form into those of the problem as it was.

    Attributes
    ----------
    scores : int
        For the gradients of a bias and of a family.
    q, k : int or (H,) int array
        For the gradients of q and of k; an array if slots differ.
    v, near : int
        For the gradients of v and of the near field's scale.
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
        The gradients of q, k and v, in their shapes and dtype.
    symbol : tuple of SymbolGradient
        Parts of the gradient of the bias, to be added up. If the sequence is in pieces, those that this process found.
    family : (|S|, n + n_k - 1) float64 array or None
        The gradient of the entries of a family at the offsets t = i + offset - j, from the least on.
    scale_near : (H, G) float64 array or None
        The gradient of the near field's scale, of each slot and query head. If the sequence is in pieces, the part that
        this process found.
    """

    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    symbol: tuple[SymbolGradient, ...] = ()
    family: np.ndarray | None = None
    scale_near: np.ndarray | None = None
