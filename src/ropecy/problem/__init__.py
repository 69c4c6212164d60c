"""The checked arguments of users; the numeric problem that engines solve, with its mask and outline; the processes that
share a sequence; and the ways from a user's arrays to a problem and back.

May import `approximation`, `kernels` and the doors `rotary` and `relative`. All rooms above may import it.
"""
