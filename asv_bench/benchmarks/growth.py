"""How time grows with n, and from which n on ropecy is faster than PyTorch's scaled_dot_product_attention."""

import math
import statistics
import time

from . import inputs


def seconds(run, rounds=3):
    """Median of some runs after a first."""
    run()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


class Exponent:
    """The slope of log seconds over log n, n = 2^14 to 2^20; d = 8, causal."""

    params = ("forward", "forward and backward")
    param_names = ("pass",)
    timeout = 300
    lengths = tuple(2**k for k in range(14, 21, 2))

    def track_exponent(self, which):
        make = inputs.forward if which == "forward" else inputs.forward_and_backward
        x = [math.log(n) for n in self.lengths]
        y = [math.log(seconds(make("polynomial", n, 8, True), 3 if n < 2**18 else 1)) for n in self.lengths]
        return statistics.linear_regression(x, y).slope


class Crossover:
    """The least n of 128, 256, ... from which on auto is faster than SDPA, forward, one head."""

    params = ((8, 16, 64), (False, True))
    param_names = ("d", "causal")
    timeout = 300

    def setup(self, d, causal):
        inputs.forward("sdpa", 64, d, causal)()

    def track_crossover(self, d, causal):
        found = 128
        for n in (2**k for k in range(7, 14)):
            if seconds(inputs.forward("auto", n, d, causal), 5) > seconds(inputs.forward("sdpa", n, d, causal), 5):
                found = 2 * n
        return found
