"""What is not arithmetic: small calls, planning, importing."""

import subprocess
import sys

import numpy as np

import ropecy


class Small:
    """8 heads, n tokens, causal, rotated: time of a call is all but arithmetic."""

    params = ((16, 64), (64, 256))
    param_names = ("d", "n")

    def setup(self, d, n):
        self.Q, self.K, self.V = np.random.default_rng(0).standard_normal((3, 8, n, d), "float32")
        self.R = ropecy.Rotary(d)

    def time_call(self, d, n):
        ropecy.attention(self.Q, self.K, self.V, self.R, causal=True)


class Plan:
    """Validation, rotation, bounds, planning, and what a plan explains: the other engines, and advice."""

    params = ((8, 64), (4096, 65536))
    param_names = ("d", "n")

    def setup(self, d, n):
        self.Q, self.K, self.V = np.random.default_rng(0).standard_normal((3, n, d), "float32")
        self.R = ropecy.Rotary(d)

    def time_plan(self, d, n):
        ropecy.plan(self.Q, self.K, self.V, self.R, causal=True)


class Import:
    """Milliseconds that importing ropecy takes beyond NumPy."""

    unit = "ms"

    def track_import(self):
        code = "import time, numpy; t = time.perf_counter(); import ropecy; print(time.perf_counter() - t)"
        command = [sys.executable, "-c", code]
        runs = (subprocess.run(command, capture_output=True, check=True, text=True) for _ in range(5))
        return 1e3 * min(float(run.stdout) for run in runs)
