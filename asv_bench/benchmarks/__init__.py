"""Benchmarks of the public API. Every time stands beside its rivals' in one plot: look at ratios of one run."""

import os

# Threads of NumPy's BLAS spin after every product and take cores from whatever is timed next.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
