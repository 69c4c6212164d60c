"""Gradients by name, and what they are certified to be."""

from __future__ import annotations

from typing import Any

import numpy as np

from .certificate import Certificate


class Gradients:
    """The gradients of <dO, O>, each in the shape and dtype of its argument.

    Attributes
    ----------
    dQ, dK, dV : ndarray
    dW, dW_Q, dW_K, dW_V, dbias, dR : ndarray
        There only where the argument was given, `dR` where R is a RelativeFamily.
    dscale_near : float or (heads,) float64 array
        There only with `near`, in the shape of its scale.
    certificate : Certificate
        Of the gradients.
    """

    dQ: np.ndarray
    dK: np.ndarray
    dV: np.ndarray
    dW: np.ndarray
    dW_Q: np.ndarray
    dW_K: np.ndarray
    dW_V: np.ndarray
    dbias: np.ndarray
    dR: np.ndarray
    dscale_near: float | Any
    certificate: Certificate

    def __init__(self, **entries: Any) -> None:
        vars(self).update(entries)

    def __repr__(self) -> str:
        entries = (f"{k}: {v.dtype} {v.shape}" if isinstance(v, np.ndarray) else k for k, v in vars(self).items())
        return f"{type(self).__name__}({', '.join(entries)})"


class LossGradients(Gradients):
    """The loss, the result it is the loss of, and its gradients.

    Attributes
    ----------
    loss : float
    O : ndarray
    """

    loss: float
    O: np.ndarray
