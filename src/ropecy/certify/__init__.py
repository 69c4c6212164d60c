"""What can be promised of a result: bounds of the scores, models of rounding, moments, samples of rows.

May import `problem`, `approximation` and `kernels`. Engines and what is above them may import it.
"""
