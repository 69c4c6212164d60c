"""Work and memory of transforms."""

from __future__ import annotations

import math

from ...approximation.minimax import n_features
from ...problem.problem import Outline
from . import family
from .blocks import band, block_size, near, part_size, parts, round_up

# How many operations of the exact engine's products take as long as one operation of a transform.
_SLOWNESS = {"float32": 8.0, "float64": 4.0}
_SLOWNESS_FAMILY = {"float32": 5.5, "float64": 3.2}
# How many operations of a transform take as long as what is measured, centred and copied of one row.
_ROW = 3000.0


def operations(problem: Outline, degree: int, grad: bool) -> float:
    """The work of forward, and with `grad` of backward too, as a number of operations of the exact engine's products
    that takes as long. Rows that are computed exactly are not counted.
    """
    block = block_size(problem, band(problem))
    if problem.family is not None:
        return _SLOWNESS_FAMILY[problem.dtype.name] * family.operations(
            problem, degree, block, near(problem, block), grad
        )
    rows = problem.sizes.H * (problem.sizes.G * problem.sizes.n + problem.sizes.n_k)
    return _SLOWNESS[problem.dtype.name] * (transform_operations(problem, degree, block, grad) + _ROW * rows)


def memory(problem: Outline, degree: int, grad: bool) -> float:
    """The bytes that are taken beyond inputs and outputs."""
    H, G, n, n_k, d, d_v = problem.sizes
    columns = d_v + 1
    block = block_size(problem, band(problem))
    if problem.family is not None:
        return family.memory(problem, degree, block, grad)
    rows, keys = round_up(n, block), round_up(n_k, block)
    symbols, own = 1, 1
    if problem.bias is not None:
        heads, own = problem.bias.shape[:2]
        symbols = (heads if problem.mask.kept is None else H) * own
    # A spectrum takes 4 numbers for each entry of a column.
    spectra = 4.0 * (rows + keys) * symbols
    passing = 4 * max(own * rows, keys) + (4 * max(G * rows, keys) if grad else 0)
    columns_at_hand = 2 * (G * rows + keys) * (2 if grad else 1)
    workspaces = problem.threads * float(passing + columns_at_hand)
    sums = part_size(problem, rows, keys, grad) * parts(problem, degree, rows, keys)
    held = H * G * rows * (d + columns * (2 if grad else 1)) + H * keys * (d + columns)
    return 8.0 * (held + 2 * spectra + workspaces + sums)


def transform_operations(problem: Outline, degree: int, block: int, grad: bool) -> float:
    """The number of operations in the transforms of one level, 5 N log2 N for a transform of length N, and in the
    products of spectra between them.
    """
    H, G, n, n_k, d, d_v = problem.sizes
    columns, met = d_v + 1, near(problem, block)
    query_blocks, key_blocks = round_up(n, block) // block, round_up(n_k, block) // block
    # The transform of one column: two real columns are transformed as one complex column.
    one = 5.0 * block * math.log2(block) + 6.0 * block
    own = G if problem.bias is not None and problem.bias.shape[1] > 1 else 1
    passes = (own * query_blocks + key_blocks) * one + own * query_blocks * key_blocks * met * 6 * block
    total = n_features(d, degree) * columns * H * passes
    if grad:
        back = (key_blocks * 2 + (own + G) * query_blocks) * one
        back += (own + G + (G if problem.bias is not None else 0)) * query_blocks * key_blocks * met * 6 * block
        total += n_features(d, degree + 1) * columns * H * back
    return total
