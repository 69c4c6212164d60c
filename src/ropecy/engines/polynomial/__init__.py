"""A polynomial in the place of exp: certified for all scores within a bound, row by row by moments, or by a sample.

`near_far` and `outliers` are made of it; `fft` shares its choice of a degree.
"""
