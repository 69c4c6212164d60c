"""Errors against the exact engine in float64, and what is certified of them."""

import numpy as np

import ropecy

from . import inputs


class Error:
    """Causal attention of 4,096 tokens in float32."""

    params = (("polynomial", "exact"), (8, 16))
    param_names = ("rival", "d")

    def setup(self, rival, d):
        self.options = {"R": ropecy.Rotary(d), "causal": True, "eps": inputs.EPS, "method": rival}
        self.single = inputs.arrays(4096, d)
        # The very numbers that float32 holds, so that no error is one of the inputs.
        self.double = [X.astype(np.float64) for X in self.single]
        self.exact = self.options | {"method": "exact"}

    def track_forward(self, rival, d):
        truth = ropecy.attention(*self.double[:3], **self.exact)
        return np.abs(ropecy.attention(*self.single[:3], **self.options) - truth).max() / self._range()

    def track_certified(self, rival, d):
        return ropecy.plan(*self.single[:3], **self.options).certificate.error

    def track_dQ(self, rival, d):
        return self._gradient_error("dQ")

    def track_dK(self, rival, d):
        return self._gradient_error("dK")

    def track_dV(self, rival, d):
        return self._gradient_error("dV")

    track_forward.unit = track_certified.unit = "range(V)"
    track_dQ.unit = track_dK.unit = track_dV.unit = "of the largest entry"

    def _range(self):
        return np.ptp(self.double[2], axis=0).max()

    def _gradient_error(self, name):
        *tokens, dO = self.single
        found = getattr(ropecy.attention_vjp(*tokens, **self.options)[1](dO), name)
        *tokens, dO = self.double
        truth = getattr(ropecy.attention_vjp(*tokens, **self.exact)[1](dO), name)
        return np.abs(found - truth).max() / np.abs(truth).max()
