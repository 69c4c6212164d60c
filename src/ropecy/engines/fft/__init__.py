"""Monomials with Toeplitz matrices between them, applied by transforms: any bias, band or family.

Imports `exact` for rows that transforms do not compute well enough, and the choice of a degree from `polynomial`.
"""
