"""Steps of DecodeState by the million, a token each, in float32: does the error grow?

    python asv_bench/steps.py [steps]          by default 2^20, a million

After more and more steps the last results are compared with attention in float64 to all tokens, by NumPy.
"""

import sys
import time

import numpy as np

import ropecy

WIDTH, COMPARED = 4, 64
OPTIONS = {"eps": 1e-6, "bound": 1.0, "scale": 1.0}


def exact(q, K, V, at):
    """Attention of the query at position `at` to the tokens before it and its own, all in float64."""
    half = WIDTH // 2
    turns = np.exp(1j * np.outer(np.arange(at + 1) - at, 10000.0 ** (-np.arange(half) / half)))
    scores = (((q[:half] - 1j * q[half:]) * turns) * (K[: at + 1, :half] + 1j * K[: at + 1, half:])).real.sum(1)
    weights = np.exp(scores)
    return weights @ V[: at + 1].astype(np.float64) / weights.sum()


def main(steps):
    """Measures and prints."""
    rng = np.random.default_rng(0)
    Q, K = rng.standard_normal((2, steps, WIDTH))
    Q, K = ((X / np.linalg.norm(X, axis=1, keepdims=True)).astype(np.float32) for X in (Q, K))
    V = 1 + rng.random((steps, WIDTH), np.float32)  # of one sign, so that sums grow
    state, seconds, made = ropecy.DecodeState(WIDTH, WIDTH, ropecy.Rotary(WIDTH), **OPTIONS), 0.0, 0
    print("{machine}, {cpus} CPUs, {instruction set}, {threads} threads, {fftw}".format(**ropecy.info()))
    for stop in [*(2**i for i in range(10, 40, 2) if 2**i < steps), steps]:
        start = time.perf_counter()
        last = [state.step(Q[t], K[t], V[t]) for t in range(made, stop)][-COMPARED:]
        seconds, made = seconds + time.perf_counter() - start, stop
        first = stop - len(last)
        errors = [np.abs(o - exact(Q[first + i].astype(np.float64), K, V, first + i)).max() for i, o in enumerate(last)]
        error, worst = max(errors) / np.ptp(V, axis=0).max(), state.certificate
        print(f"{stop:9,} steps: error {error:.1e} of the range, certified {worst.error:.1e}, {seconds:.0f} s in all")
    print(worst)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2**20)
