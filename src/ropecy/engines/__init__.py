"""The engines, one file each, with the same three functions in every one.

``forward(problem, ..., want_lse)`` gives O, the log of the denominators where they are wanted, and what backward
needs; ``backward(problem, saved, dO)`` gives dq, dk, dv and the gradient of the Toeplitz symbol; ``cost(problem,
...)`` predicts seconds and bytes. They see a :class:`ropecy.problem.Problem`: rotated, projected, validated.
"""
