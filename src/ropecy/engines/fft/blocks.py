"""How T, the matrix of the weights of offsets, is cut into blocks, and its monomials into parts: by shapes alone."""

from __future__ import annotations

from ...approximation.minimax import n_features
from ...problem.problem import Outline

# Into how many parts the monomials are cut, over all slots together, and how many bytes the sums of all parts may take.
_PARTS = 8
_PART_BYTES = 512 * 2**20


def band(problem: Outline) -> int:
    """The number of offsets that the band allows, at least 1."""
    first, stop = problem.mask.seen
    return max(1, stop - first)


def near(problem: Outline, block: int) -> float:
    """The share of the blocks of T that hold an offset which the band allows, from 0 to 1."""
    blocks = -(-problem.sizes.n // block) - (-problem.sizes.n_k // block) - 1
    return min(1.0, (band(problem) / block + 1) / blocks)


def block_size(problem: Outline, allowed: int) -> int:
    """The number of rows of a block of T, where the band allows so many offsets.

    It is a power of two, so that few FFTW plans are made. A narrow band takes small blocks. With a family each product
    takes a transform of its own T, so that larger blocks, of which there are fewer, are faster.
    """
    longest = max(problem.sizes.n, problem.sizes.n_k)
    block = 1 << max(5, (longest - 1).bit_length())
    if longest > 2048:
        block = min(max(1024, block // (8 if problem.family is None else 4)), 32768)
    return min(block, max(256, 1 << (4 * allowed - 1).bit_length()))


def parts(problem: Outline, degree: int, rows: int, keys: int) -> int:
    """The number of parts that the monomials are cut into. It follows from shapes, never from the number of threads."""
    wanted = -(-_PARTS // problem.cut_for)
    room = int(_PART_BYTES / (8 * part_size(problem, rows, keys, True) * problem.cut_for / problem.sizes.H))
    return max(1, min(wanted, max(2, room), n_features(problem.sizes.d, degree) // 2))


def part_size(problem: Outline, rows: int, keys: int, grad: bool) -> float:
    """How many numbers the sums of one part take, of forward or, with `grad`, of backward."""
    H, G, _, _, d, d_v = problem.sizes
    columns = d_v + 1
    if not grad:
        return float(H * G * rows * columns)
    own = 0 if problem.bias is None else problem.bias.shape[1]
    return float(H * (G * rows * d + keys * (d + columns) + 4 * own * (rows + keys)))


def round_up(count: int, block: int) -> int:
    """The next multiple of a block."""
    return -(-count // block) * block
