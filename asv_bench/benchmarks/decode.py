"""A step of decoding: from a state of fixed size, and from a cache of keys and values."""

import statistics
import time

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
        turns = [(_seconds(self.run), _seconds(self.memory.sum)) for _ in range(9)]
        attending, reading = (statistics.median(times) for times in zip(*turns, strict=True))
        return self.bytes / attending / (self.memory.numel() * self.memory.element_size() / reading)

    track_share_of_bandwidth.unit = "share of a sum's read bandwidth"


def _seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
