"""One gradient of a very long sequence: seconds, the largest memory of the process, and the certificate.

    python asv_bench/long.py [tokens]          by default 2^23, 8.4 million
"""

import resource
import sys
import time

import numpy as np

import ropecy

WIDTH = 8


def normalised(rng, n):
    """Rows of root mean square 1, made in pieces, so that the peak of memory is not that of making them."""
    X = np.empty((n, WIDTH), np.float32)
    for start in range(0, n, 2**20):
        part = rng.standard_normal((min(2**20, n - start), WIDTH), np.float32)
        X[start : start + len(part)] = part / np.sqrt((part * part).mean(axis=-1, keepdims=True))
    return X


def main(n):
    """Measures and prints."""
    rng = np.random.default_rng(0)
    Q, K = normalised(rng, n), normalised(rng, n)
    V, dO = (rng.standard_normal((n, WIDTH), np.float32) for _ in range(2))
    start = time.perf_counter()
    _, vjp = ropecy.attention_vjp(Q, K, V, ropecy.Rotary(WIDTH), causal=True)
    g = vjp(dO)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("{machine}, {cpus} CPUs, {instruction set}, {threads} threads, {fftw}".format(**ropecy.info()))
    print(f"{n:,} tokens, d = {WIDTH}, causal, float32: {seconds:.1f} s, {peak / 1e9:.2f} GB in all")
    print(f"O         {vjp.certificate}")
    print(f"gradient  {g.certificate}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2**23)
