"""A step of decoding: the same after any number of tokens."""

import ropecy

from . import inputs


class Decode:
    """One step of d = d_v = 16 with a window of 64, after n tokens."""

    params = (4096, 131072)
    param_names = ("n",)

    def setup(self, n):
        self.Q, self.K, self.V, _ = inputs.arrays(n, 16)
        self.state = ropecy.DecodeState(16, 16, ropecy.Rotary(16), eps=inputs.EPS, bound=1.001, window=64)
        self.state.extend(self.K, self.V)

    def time_step(self, n):
        self.state.step(self.Q[0], self.K[0], self.V[0])

    def track_bytes(self, n):
        return self.state.nbytes

    track_bytes.unit = "bytes"
