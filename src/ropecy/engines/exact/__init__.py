"""Exact attention, by blocks of a streaming softmax: every feature, no bound, also of a sequence in pieces.

Any engine may import it, for parts that are to be exact.
"""
