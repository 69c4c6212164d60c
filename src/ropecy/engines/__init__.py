"""The engines, a folder each: what they can do, what it costs, and how it is run, forward and backward.

May import `certify`, `problem`, `approximation` and `kernels`, and one another; `planning` and the doors import them.
"""
