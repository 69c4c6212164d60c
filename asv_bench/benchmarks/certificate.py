"""What certificates cost, and what sampled ones miss."""

import statistics
import time

import numpy as np

import ropecy
from ropecy.approximation import minimax

from . import inputs

# d, degree, and the eps that it is certified for by second moments and, where that takes them, by fourth ones.
HEADS = {"64": (64, 2, 2.5e-3, 1e-3), "32": (32, 2, 5e-3, 2e-3), "16": (16, 3, 1e-3, None)}


class Cost:
    """Attention of 65,536 tokens, against the same degree certified by the largest score alone."""

    params = (list(HEADS), ("second", "fourth"))
    param_names = ("d", "moments")
    timeout = 300

    def setup(self, head, moments):
        d, degree, *eps = HEADS[head]
        eps = eps[moments == "fourth"]
        if eps is None:
            raise NotImplementedError("second moments do")
        *tokens, _ = inputs.arrays(65536, d)
        loose = minimax.tau(2 * minimax.minimax(1.0, degree).error)

        def run(eps, **options):
            return ropecy.attention(
                *tokens, eps=eps, method="polynomial", scale=1 / d, seed=1, return_certificate=True, **options
            )

        self.with_, self.without = (lambda: run(eps)), (lambda: run(loose, degree=degree))
        (_, by_moments), (_, worst) = self.with_(), self.without()
        assert (by_moments.rule, worst.rule) == ("moments", "worst case")
        assert by_moments.degree == worst.degree == degree
        assert (by_moments.seed is not None) == (moments == "fourth")

    def track_cost(self, head, moments):
        ratios = []
        for _ in range(9):
            start = time.perf_counter()
            self.without()
            middle = time.perf_counter()
            self.with_()
            ratios.append((time.perf_counter() - middle) / (middle - start))
        return statistics.median(ratios) - 1

    track_cost.unit = "of the forward pass"


class Sampled:
    """certify="sample", 65,536 tokens of width 64: what twenty seeds are off by, over all rows, and how fast it is."""

    timeout = 600

    def setup(self):
        self.tokens = inputs.arrays(65536, 64)[:3]

    def run(self, seed):
        return ropecy.attention(*self.tokens, certify="sample", scale=1 / 64, seed=seed, return_certificate=True)

    def track_error(self):
        exact = ropecy.attention(*self.tokens, scale=1 / 64, method="exact")
        spread = np.ptp(self.tokens[2], axis=0)
        found = [self.run(seed) for seed in range(20)]
        assert all(certificate.n_features < 200 for _, certificate in found)
        return max(float((np.abs(O - exact) / spread).max()) for O, _ in found)

    track_error.unit = "range(V)"


class SampledAgainstSDPA:
    """How many times faster that is than SDPA."""

    timeout = 600
    unit = "times"

    def setup(self):
        self.sdpa = inputs.forward("sdpa", 65536, 64, False)
        self.sampled = Sampled()
        self.sampled.setup()

    def track_times_faster(self):
        self.sampled.run(0)
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            self.sampled.run(0)
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        self.sdpa()
        return (time.perf_counter() - start) / statistics.median(seconds)


class Outliers:
    """65,536 tokens of width 8, eight keys and eight queries 40 times too long: auto beside the exact engine."""

    timeout = 300

    def setup(self):
        rng = np.random.default_rng(0)
        self.Q, self.K, self.V, _ = inputs.arrays(65536, 8)
        for X in (self.Q, self.K):
            X[rng.choice(65536, 8, replace=False)] *= 40
        self.R = ropecy.Rotary(8)

    def run(self, method):
        return ropecy.attention(
            self.Q, self.K, self.V, self.R, scale=1 / 8, eps=1e-3, method=method, return_certificate=True
        )

    def track_times_faster(self):
        seconds = {"auto": [], "exact": []}
        for method in ["auto"] * 5 + ["exact"] * 2:
            start = time.perf_counter()
            self.run(method)
            seconds[method].append(time.perf_counter() - start)
        return min(seconds["exact"]) / statistics.median(seconds["auto"])

    def track_error(self):
        O, certificate = self.run("auto")
        exact, _ = self.run("exact")
        return float((np.abs(O - exact) / np.ptp(self.V, axis=-2)).max()) / certificate.error

    track_times_faster.unit = "times"
    track_error.unit = "of what is certified"
