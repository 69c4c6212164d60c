"""Approximation of functions of one number: the results are coefficients and a bound of their error.

There are polynomials for exp on an interval, sums of exponentials, and the functions b_t that a relative bias can be.
Every folder of the package may import this one, which imports NumPy and nothing else of the package.
"""
