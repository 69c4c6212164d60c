"""The kernels' share of the machine's multiply-add peak, both measured in one process: one core, float32, d_v = d."""

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


def share(run, operations):
    """Operations a second by those of the peak, the median of rounds in which the two take turns."""
    found = []
    run()
    for _ in range(3):
        top = peak.rate()
        start = time.perf_counter()
        run()
        found.append(operations / (time.perf_counter() - start) / top)
    return statistics.median(found)


class Polynomial:
    """Products of features alone are counted: 4 n F (d + 1) forward; backward those of the features that it has."""

    params = (((8, 4), (16, 3), (16, 4), (32, 3), (64, 2), (128, 2)), (False, True))
    param_names = ("(d, degree)", "causal")
    timeout = 300

    def setup(self, shape, causal):
        peak.rate()

    def track_forward(self, shape, causal):
        d, degree = shape
        n = self._length(d, 4 * features(d, degree))
        Q, K, V, _ = inputs.arrays(n, d)
        how = {"causal": causal, "eps": EPS, "method": "polynomial", "degree": degree, "threads": 1}
        return share(lambda: ropecy.attention(Q, K, V, **how), 4.0 * n * features(d, degree) * (d + 1))

    def track_backward(self, shape, causal):
        d, degree = shape
        n = self._length(d, 12 * features(d, degree))
        Q, K, V, dO = inputs.arrays(n, d)
        how = {"causal": causal, "eps": EPS, "method": "polynomial", "degree": degree, "threads": 1}
        _, vjp = ropecy.attention_vjp(Q, K, V, **how)
        top = vjp(dO).certificate.degree
        # dphi(q), dphi(k), dS and dv.
        F = 2 * features(d, top) + features(d, max(top, degree)) + features(d, degree)
        return share(lambda: vjp(dO), 2.0 * n * F * (d + 1))

    def _length(self, d, F):
        return max(4096, min(1 << 17, int(WORK / (F * (d + 1)))))


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
