"""Scalar approximation: numbers go in, coefficients and a bound of their error come out.

Polynomials for exp on an interval, sums of exponentials, and the functions b_t that a relative bias can be.
Every room may import this one; it imports NumPy and nothing else of the package.
"""
