"""What `plan` predicts beside what is measured, and what auto takes beside the best engine taken by hand."""

import itertools
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

    def least(self, methods):
        """The least seconds of each method, in turns: what else the machine does counts least in them."""
        times = {method: [] for method in methods}
        start = time.perf_counter()
        # Three turns, and up to 101 for what is quick; fewer of what takes many seconds.
        for turn in range(101):
            if turn and time.perf_counter() - start > (0.4 if turn > 2 else 10):
                break
            methods = methods[::-1]
            for method in methods:
                times[method].append(self.run(method))
        return {method: min(found) for method, found in times.items()}

    def hopeful(self):
        """The plans of the engines that are worth a try, by engine."""
        plans = {engine: self.plan(engine) for engine in ENGINES}
        plans = {engine: made for engine, made in plans.items() if made is not None}
        best = min(made.seconds[engine] for engine, made in plans.items())
        return {engine: made for engine, made in plans.items() if made.seconds[engine] <= HOPELESS * best}


class Worst:
    """The worst of head sizes, causal or not, and bounds, in one process; 65,536 tokens take minutes."""

    params = (WORK, (128, 1024, 8192, 65536))
    param_names = ("work", "n")
    timeout = 1800

    def setup(self, work, n):
        grid = itertools.product((8, 16, 64), (False, True), (0.2, 1.0, 2.0, 8.0))
        self.problems = [Problem(work, n, d, causal, B, None) for d, causal, B in grid]

    def track_auto(self, work, n):
        """Seconds of auto over those of the best engine taken by hand."""
        found = []
        for problem in self.problems:
            times = problem.least(["auto", *problem.hopeful()])
            found.append(times.pop("auto") / min(times.values()))
        return max(found)

    def track_predicted(self, work, n):
        """By what factor predicted seconds are off."""
        found = []
        for problem in self.problems:
            plans = problem.hopeful()
            times = problem.least(list(plans))
            found += [abs(np.log(made.seconds[engine] / times[engine])) for engine, made in plans.items()]
        return float(np.exp(max(found)))

    track_auto.unit = "of the best engine"
    track_predicted.unit = "factor"
