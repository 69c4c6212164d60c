"""Seconds of attention and of its gradient."""

from . import inputs


class Forward:
    """O = D^-1 A V; SDPA gets q and k rotated already, outside the clock."""

    params = (inputs.RIVALS, (4096, 16384), (8, 16), (False, True))
    param_names = ("rival", "n", "d", "causal")

    def setup(self, rival, n, d, causal):
        self.run = inputs.forward(rival, n, d, causal)
        inputs.forward(rival, 64, d, causal)()

    def time_forward(self, rival, n, d, causal):
        self.run()


class Backward:
    """O, and dQ, dK, dV of a given dO; of causal attention."""

    params = (inputs.RIVALS, (4096, 16384), (8, 16))
    param_names = ("rival", "n", "d")

    def setup(self, rival, n, d):
        self.run = inputs.forward_and_backward(rival, n, d, True)
        inputs.forward_and_backward(rival, 64, d, True)()

    def time_forward_and_backward(self, rival, n, d):
        self.run()
