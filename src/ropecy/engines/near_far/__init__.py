"""Biases and scales that factor at large distances: near pairs exactly, far ones by states that decay with distance.

It is made of `exact` and `polynomial`.
"""
