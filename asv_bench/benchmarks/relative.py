"""Biases of j - i: seconds by engine, how they grow with n, and what of the fft engine's time is FFTW's own."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import ropecy

from . import inputs

BIASES = ("alibi", "t5", "table")
ENGINES = ("exact", "polynomial", "fft")


def bias_of(name, n):
    """ALiBi, T5's buckets, or a rough table as long as the sequence, which does not factor."""
    rng = np.random.default_rng(1)
    if name == "alibi":
        return ropecy.RelativeBias.alibi(0.01)
    if name == "t5":
        return ropecy.RelativeBias.t5(rng.standard_normal(32))
    return ropecy.RelativeBias(rng.uniform(-1, 1, 2 * n - 1))


def causal(name, engine, n, d):
    """A function of no arguments that computes attention under a bias; asv skips what an engine does not do."""
    if name == "table" and engine == "polynomial":
        raise NotImplementedError("a rough table does not factor")
    Q, K, V, _ = inputs.arrays(n, d)
    options = {"bias": bias_of(name, n), "causal": True, "eps": inputs.EPS, "method": engine}
    return lambda: ropecy.attention(Q, K, V, ropecy.Rotary(d), **options)


def seconds(run):
    """The least of three."""
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


class Bias:
    """O under a causal bias, d = 4."""

    params = (BIASES, ENGINES, (4096, 16384, 65536))
    param_names = ("bias", "engine", "n")
    timeout = 300

    def setup(self, bias, engine, n):
        self.run = causal(bias, engine, n, 4)

    def time_forward(self, bias, engine, n):
        self.run()


class BiasExponent:
    """The slope of log time over log n, from 2^14 to 2^17 tokens (exact: to 2^15)."""

    params = (BIASES, ENGINES)
    param_names = ("bias", "engine")
    timeout = 300

    def setup(self, bias, engine):
        causal(bias, engine, 4096, 4)()

    def track_exponent(self, bias, engine):
        first, last = 2**14, 2**15 if engine == "exact" else 2**17
        times = [seconds(causal(bias, engine, n, 4)) for n in (first, last)]
        return float(np.log(times[1] / times[0]) / np.log(last / first))


def bare(length, rows, columns):
    """Seconds of all threads for complex transforms, forth and back, of so many columns of so many rows each."""
    from ropecy.kernels._fftw import ComplexFFT

    fft, threads = ComplexFFT(length, flags="measure"), ropecy.info()["threads"]

    def run():
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda share: fft.rounds(rows, share), [-(-columns // threads)] * threads))

    return seconds(run)


class BareFFTW:
    """What FFTW alone takes for the transforms of a call of the fft engine, over the time of that call.

    The same transforms: as many, of the same length, by an equal plan, over as much memory, in as many threads.
    """

    params = (16384, 65536, 131072)
    param_names = ("n",)
    timeout = 300

    def setup(self, n):
        self.call = causal("table", "fft", n, 4)
        Q, K, V, _ = inputs.arrays(n, 4)
        options = {"bias": bias_of("table", n), "causal": True, "eps": inputs.EPS, "method": "fft"}
        self.plan = ropecy.plan(Q, K, V, ropecy.Rotary(4), **options)

    def track_share(self, n):
        # A rough table allows all offsets, in blocks of a quarter of the next power of two.
        block = min(max(1024, (1 << (n - 1).bit_length()) // 4), 32768)
        # Two monomials to a column, and four quarters to the spectrum of a block.
        columns = -(-self.plan.certificate.n_features // 2) * 5
        return bare(block // 2, 4 * -(-n // block), columns) / seconds(self.call)

    def track_direct(self, n):
        """Likewise for the transforms that the algorithm calls for as it is written: a real one of 2 n, as a complex
        one of n, forth and back for each monomial and each column of values.
        """
        return bare(n, 1, 5 * self.plan.certificate.n_features) / seconds(self.call)

    track_share.unit = track_direct.unit = "of a call's time"
