"""The nouns: what users pass, checked; the numeric problem that engines solve, its mask and outline; who shares a
sequence; and the ways from one to the other.

May import `approximation`, `kernels` and the doors `rotary` and `relative`. All rooms above may import it.
"""
