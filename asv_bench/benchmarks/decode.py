"""A step of decoding: from a state of fixed size, and from a cache of keys and values."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import ropecy

from . import inputs


class Decode:
    """One step of d = d_v = 16 with a window of 64, after n tokens: the same after any number of them."""

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


class Streams:
    """One step of 256 streams of different lengths, d = d_v = 8 and degree 4, beside its limit and a call for each."""

    params = (1, 4)
    param_names = ("heads",)
    STREAMS, PROMPT, STEPS = 256, 200, 64  # in so many steps each stream's ring is taken into its sums once

    def setup(self, heads):
        rng, d = np.random.default_rng(0), 8
        K, V = rng.standard_normal((2, self.STREAMS, heads, self.PROMPT, d), np.float32)
        K /= np.linalg.norm(K, axis=-1, keepdims=True)
        lengths = rng.integers(self.PROMPT // 2, self.PROMPT, self.STREAMS)
        self.token = [np.ascontiguousarray(X[:, :, 0]) for X in (K, K, V)]
        self.states = [ropecy.DecodeState(d, d, ropecy.Rotary(d), eps=inputs.EPS, scale=1.0) for _ in range(2)]
        self.states[0].extend(K, V, lengths=lengths)
        self.states[1].extend(K[0], V[0])
        self.memory = np.ones(2**25)
        self.time_steps()

    def time_steps(self, heads=None):
        for _ in range(self.STEPS):
            self.states[0].step(*self.token)

    def track_times_the_limit(self, heads):
        """Seconds of a step, beside those of reading as many bytes: all of the states but the errors of their sums."""
        errors = 8 * self.STREAMS * heads * 9 * self.states[0].certificate.n_features
        stepping, reading = _in_turns(self.time_steps, self._read)
        return stepping / self.STEPS / reading * self.memory.nbytes / (self.states[0].nbytes - errors)

    def track_times_faster_than_calls(self, heads):
        """Seconds of a call for each stream, on a state of one, beside those of a step."""
        own = [X[0] for X in self.token]
        alone, together = _in_turns(lambda: [self.states[1].step(*own) for _ in range(self.STREAMS)], self.time_steps)
        return alone / together * self.STEPS

    def _read(self):
        with ThreadPoolExecutor() as pool:
            list(pool.map(np.max, np.array_split(self.memory, ropecy.info()["threads"])))


class Cache:
    """One query a head against a cache of n keys of width 128, a layer of a model whose heads are as named."""

    params = (("exact", "sdpa"), ("float32", "bfloat16", "float16"), ("32/8", "32/32"), (512, 8192))
    param_names = ("rival", "dtype", "heads/key heads", "n")

    def setup(self, rival, dtype, heads, n):
        try:
            import torch
        except ImportError:
            raise NotImplementedError("torch is not installed") from None
        from ropecy.torch import scaled_dot_product_attention

        torch.set_num_threads(ropecy.info()["threads"])
        torch.manual_seed(0)
        h, h_k = map(int, heads.split("/"))
        shapes = (1, h, 1, 128), (1, h_k, n, 128), (1, h_k, n, 128)
        q, k, v = (torch.randn(shape).to(getattr(torch, dtype)) for shape in shapes)
        self.bytes = 2 * k.numel() * k.element_size()
        if rival == "sdpa":
            sdpa = torch.nn.functional.scaled_dot_product_attention
            self.run = lambda: sdpa(q, k, v, enable_gqa=h != h_k)
        else:
            self.run = lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True, method="exact")
        self.memory = torch.ones(2**26)
        self.run()

    def time_attend(self, rival, dtype, heads, n):
        self.run()

    def track_share_of_bandwidth(self, rival, dtype, heads, n):
        """Bytes of the cache a second, beside those of a sum over 256 MiB; both take turns."""
        attending, reading = _in_turns(self.run, self.memory.sum)
        return self.bytes / attending / (self.memory.numel() * self.memory.element_size() / reading)

    track_share_of_bandwidth.unit = "share of a sum's read bandwidth"


def _in_turns(*runs):
    """Medians of seconds, the runs taking turns."""
    turns = [[_seconds(run) for run in runs] for _ in range(9)]
    return (statistics.median(times) for times in zip(*turns, strict=True))


def _seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
