"""The kernels' share of the multiply-add peak of as many cores, both measured in one process: float32, d_v = d."""

import statistics
import time

import ropecy

from . import inputs, peak

# Degrees that certify this at |score| <= 1.
EPS = 0.1
WORK = 5e9  # operations of a call, about


def features(d, degree):
    """C(d + g, g)."""
    total = 1
    for k in range(degree):
        total = total * (d + k + 1) // (k + 1)
    return total


def share(run, operations, threads=1):
    """Operations a second by those of the peak of a core for each thread, the median of rounds in which the two take
    turns.
    """
    found = []
    run()
    for _ in range(3):
        top = threads * peak.rate()
        start = time.perf_counter()
        run()
        found.append(operations / (time.perf_counter() - start) / top)
    return statistics.median(found)


def options(degree, causal, threads):
    """Of a call."""
    return {"causal": causal, "eps": EPS, "method": "polynomial", "degree": degree, "threads": threads}


def length(d, F, heads):
    """Tokens of a head that make the work."""
    return max(4096, min(1 << 17, int(WORK / (heads * F * (d + 1)))))


def arrays(heads, n, d):
    """Q, K, V and dO, (heads, n, d)."""
    return [X.reshape(heads, n, d) for X in inputs.arrays(heads * n, d)]


class Forward:
    """Products of features alone are counted: 4 n F (d + 1)."""

    params = (((8, 4), (16, 3), (16, 4), (32, 3), (64, 2), (128, 2)), (False, True), (1, 8), (1, 2))
    param_names = ("(d, degree)", "causal", "heads", "threads")

    def setup(self, shape, causal, heads, threads):
        peak.rate()

    def track_share(self, shape, causal, heads, threads):
        d, degree = shape
        n = length(d, 4 * features(d, degree), heads)
        Q, K, V, _ = arrays(heads, n, d)
        how, operations = options(degree, causal, threads), 4.0 * heads * n * features(d, degree) * (d + 1)
        return share(lambda: ropecy.attention(Q, K, V, **how), operations, threads)


class Backward:
    """Those of dphi(q), dphi(k), dS and dv, of the features that backward has: one degree more."""

    params = (((8, 3), (16, 2), (16, 3), (32, 2)), (False, True), (1, 8), (1, 2))
    param_names = ("(d, degree)", "causal", "heads", "threads")

    def setup(self, shape, causal, heads, threads):
        peak.rate()

    def track_share(self, shape, causal, heads, threads):
        d, degree = shape
        F = 3 * features(d, degree + 1) + features(d, degree)
        n = length(d, 2 * F, heads)
        Q, K, V, dO = arrays(heads, n, d)
        _, vjp = ropecy.attention_vjp(Q, K, V, **options(degree, causal, threads))
        assert vjp(dO).certificate.degree == degree + 1
        return share(lambda: vjp(dO), 2.0 * heads * n * F * (d + 1), threads)


class Exact:
    """Scores and their product with V forward, 2 n^2 2 d; five products backward. exp is not counted."""

    params = ((16, 64, 128), (False, True))
    param_names = ("d", "causal")
    n = 4096

    def setup(self, d, causal):
        peak.rate()

    def track_forward(self, d, causal):
        Q, K, V, _ = inputs.arrays(self.n, d)
        pairs = self.n**2 * (0.5 if causal else 1)
        run = lambda: ropecy.attention(Q, K, V, causal=causal, method="exact", threads=1)  # noqa: E731
        return share(run, 4.0 * pairs * d)

    def track_backward(self, d, causal):
        Q, K, V, dO = inputs.arrays(self.n, d)
        pairs = self.n**2 * (0.5 if causal else 1)
        _, vjp = ropecy.attention_vjp(Q, K, V, causal=causal, method="exact", threads=1)
        return share(lambda: vjp(dO), 10.0 * pairs * d)
