"""What `plan` predicts beside what is measured, and what auto takes beside the best engine taken by hand."""

import time

import numpy as np

import ropecy

from . import inputs

ENGINES = ("exact", "polynomial", "fft")
# Engines that are predicted to be this many times slower than the fastest are not waited for.
HOPELESS = 3.0
WORK = ("forward", "forward_and_backward")


class Problem:
    """Rows of root mean square 1, scores within B, and what is asked of them."""

    def __init__(self, work, n, d, causal, B, threads):
        # glibc gives freed memory back, and has every call touch it anew, until it has seen a larger array freed.
        np.ones(2**21)
        self.grad = work == "forward_and_backward"
        self.Q, self.K, self.V, self.dO = inputs.arrays(n, d)
        self.R = ropecy.Rotary(d)
        self.options = {"scale": B / d, "causal": causal, "eps": inputs.EPS, "threads": threads}

    def plan(self, method):
        """The plan, or None where the method does not certify eps."""
        try:
            return ropecy.plan(self.Q, self.K, self.V, self.R, method=method, grad=self.grad, **self.options)
        except (ValueError, NotImplementedError, MemoryError):
            return None

    def run(self, method):
        """One call; its seconds. What another engine did to the caches is not in them, where that counts."""
        if (taken := self.call(method)) < 0.01:
            taken = self.call(method)
        return taken

    def call(self, method):
        start = time.perf_counter()
        if self.grad:
            _, vjp = ropecy.attention_vjp(self.Q, self.K, self.V, self.R, method=method, **self.options)
            vjp(self.dO)
        else:
            ropecy.attention(self.Q, self.K, self.V, self.R, method=method, **self.options)
        return time.perf_counter() - start

    def medians(self, methods, room=1.5):
        """Seconds of each method, in turns, so that what else the machine does befalls them alike."""
        times = {method: [] for method in methods}
        start = time.perf_counter()
        for method in methods:
            self.run(method)
        while len(times[methods[0]]) < 3 or (time.perf_counter() - start < room and len(times[methods[0]]) < 31):
            methods = methods[::-1]
            for method in methods:
                times[method].append(self.run(method))
        return {method: float(np.median(found)) for method, found in times.items()}

    def hopeful(self):
        """The plans of the engines that are worth a try, by engine."""
        plans = {engine: self.plan(engine) for engine in ENGINES}
        plans = {engine: made for engine, made in plans.items() if made is not None}
        best = min(made.seconds[engine] for engine, made in plans.items())
        return {engine: made for engine, made in plans.items() if made.seconds[engine] <= HOPELESS * best}


class Predicted:
    """Predicted seconds over measured ones, of an engine taken by hand."""

    params = (("exact", "polynomial"), WORK, (128, 2048, 32768), (8, 16, 64), (False, True), (1, 2))
    param_names = ("engine", "work", "n", "d", "causal", "threads")
    timeout = 300

    def setup(self, engine, work, n, d, causal, threads):
        self.problem = Problem(work, n, d, causal, 1.0, threads)
        self.planned = self.problem.hopeful().get(engine)
        if self.planned is None:
            raise NotImplementedError("not certified, or far slower than another engine")

    def track_ratio(self, engine, work, n, d, causal, threads):
        return self.planned.seconds[engine] / self.problem.medians([engine])[engine]

    track_ratio.unit = "predicted over measured"


class Auto:
    """Seconds of auto over those of the best engine taken by hand."""

    params = (WORK, (128, 512, 2048, 8192, 65536), (8, 16, 64), (False, True), (0.2, 1.0, 2.0, 8.0))
    param_names = ("work", "n", "d", "causal", "B")
    timeout = 300

    def setup(self, work, n, d, causal, B):
        self.problem = Problem(work, n, d, causal, B, None)

    def track_over_best(self, work, n, d, causal, B):
        times = self.problem.medians(["auto", *self.problem.hopeful()])
        auto = times.pop("auto")
        return auto / min(times.values())

    track_over_best.unit = "of the best engine"
