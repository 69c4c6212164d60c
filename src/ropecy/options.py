"""The keyword arguments that many functions share, as type checkers see them; `attention` says what they mean.

Functions take ``**options: Unpack[Options]``, by which a misspelt name is an error before the program runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .relative import RelativeBias

# One for each of some packed sequences.
Integers: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]


class _Shared(TypedDict, total=False):
    """What all of these functions take."""

    W: ArrayLike | None
    W_Q: ArrayLike | None
    W_K: ArrayLike | None
    scale: float | None
    causal: bool
    window: int | tuple[int, int] | None
    near: tuple[int, ArrayLike] | None
    bias: RelativeBias | None
    key_mask: ArrayLike | None
    q_positions: ArrayLike | None
    k_positions: ArrayLike | None
    q_offset: int | Integers
    lengths: Integers | tuple[Integers, Integers] | None
    eps: float
    certify: str
    method: str
    degree: int | None
    threads: int | None


class MatrixOptions(_Shared, total=False):
    """Of `AttentionMatrix`, which has no values to project."""

    seed: int | None


class CheckOptions(_Shared, total=False):
    """Of `check`, whose seed is that of the rows it draws."""

    W_V: ArrayLike | None


class Options(MatrixOptions, total=False):
    """Of all other functions."""

    W_V: ArrayLike | None
