"""A few long keys and queries exactly, the rest by a polynomial.

Made of `exact` and `polynomial`; asks the planner for the rest.
"""
