"""Heads with plans of their own, and packed sequences, against the same work call by call."""

import itertools
import statistics
import time

import numpy as np

import ropecy

from . import inputs

# What the scores of each head are within.
BOUNDS = {"equal": [1.0] * 8, "one sharp": [1.0] * 7 + [30.0], "0.1 to 2": np.geomspace(0.1, 2.0, 8)}


def ratio(one, other, turns=3):
    """The seconds of a function over those of another, the median of turns."""
    found = []
    for _ in range(turns):
        start = time.perf_counter()
        other()
        middle = time.perf_counter()
        one()
        found.append((time.perf_counter() - middle) / (middle - start))
    return statistics.median(found)


class Heads:
    """8 causal heads of 16,384 tokens, d = 8, whose scores are within the bounds of that name, against head by head."""

    params = (list(BOUNDS), ("forward", "gradient"))
    param_names = ("bounds", "work")
    timeout = 300

    def setup(self, bounds, work):
        Q, K, V = np.random.default_rng(0).uniform(-1, 1, (3, 8, 16384, 8)).astype(np.float32)
        size = np.sqrt(np.asarray(BOUNDS[bounds], np.float32))[:, None, None]
        Q, K = (X / np.linalg.norm(X, axis=-1).max(axis=-1)[:, None, None] * size for X in (Q, K))

        def run(*tokens):
            if work == "forward":
                return ropecy.attention(*tokens, scale=1.0, causal=True)
            O, vjp = ropecy.attention_vjp(*tokens, scale=1.0, causal=True)
            return vjp(O)

        self.together = lambda: run(Q, K, V)
        self.apart = lambda: [run(*head) for head in zip(Q, K, V, strict=True)]
        self.together()

    def track_against_head_by_head(self, bounds, work):
        return ratio(self.together, self.apart)

    track_against_head_by_head.unit = "times"


class Packed:
    """Sequences in one call against a call for each: 64 of 1,024 tokens, and of 100 to 2,000 tokens."""

    params = ("polynomial, 64 x 1,024", "exact, 100 to 2,000")
    param_names = ("sequences",)
    timeout = 300

    def setup(self, sequences):
        rng = np.random.default_rng(1)
        if sequences.startswith("polynomial"):
            lengths, d, how = np.full(64, 1024), 8, {"degree": 4}
        else:
            lengths, d, how = rng.integers(100, 2001, 31), 64, {"method": "exact"}
        *tokens, _ = inputs.arrays(int(lengths.sum()), d)
        cuts = np.concatenate([[0], np.cumsum(lengths)])
        spans = [slice(*span) for span in itertools.pairwise(cuts)]

        def run(*rows, **more):
            return ropecy.attention(*rows, causal=True, scale=1 / d, **how, **more)

        self.together = lambda: run(*tokens, lengths=lengths)
        self.apart = lambda: [run(*(X[..., span, :] for X in tokens)) for span in spans]
        self.together()

    def track_against_one_by_one(self, sequences):
        return ratio(self.together, self.apart)

    track_against_one_by_one.unit = "times"
