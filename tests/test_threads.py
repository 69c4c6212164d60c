"""Many Python threads at once: whatever is public gives the bits that it gives to one thread alone."""

import threading

import numpy as np
import pytest

import ropecy


def at_once(work, threads, rounds):
    """What `work()` returns, from so many threads that begin together, each so many times."""
    found, failed = [], []
    start = threading.Barrier(threads)

    def one():
        start.wait()
        try:
            found.extend([work() for _ in range(rounds)])
        except BaseException as error:
            failed.append(error)

    team = [threading.Thread(target=one) for _ in range(threads)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    if failed:
        raise failed[0]
    return found


def arrays(gradients):
    """The arrays of `Gradients`, by name."""
    return {name: X for name, X in vars(gradients).items() if isinstance(X, np.ndarray)}


def family(rng, d, n):
    """Matrices W_{i-j} with four entries, as small as the polynomial wants them."""
    support = np.array([[0, 0], [1, 1], [0, 1], [2, 2]])
    return ropecy.RelativeFamily(rng.uniform(-0.3, 0.3, (2 * n - 1, 4)), support=support, n_k=n)


# method, arguments beside Q, K, V and the largest entry of these
PASSES = {
    "polynomial": ("polynomial", {}, 1.0),
    "polynomial, causal": ("polynomial", {"causal": True}, 1.0),
    "polynomial, decayed states": ("polynomial", {"causal": True, "bias": ropecy.RelativeBias.alibi(0.1)}, 1.0),
    "polynomial, near field": ("polynomial", {"causal": True, "near": (20, 1.0)}, 1.0),
    "exact": ("exact", {"causal": True}, 3.0),
    "exact, window and bias": ("exact", {"window": 40, "bias": ropecy.RelativeBias.alibi(0.1)}, 3.0),
    "fft": ("fft", {}, 0.7),
    "fft, bias": ("fft", {"causal": True, "bias": ropecy.RelativeBias.alibi(0.1)}, 0.7),
    "fft, family": ("fft", {"R": "family"}, 0.5),
    "exact, family": ("exact", {"R": "family"}, 0.5),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", PASSES)
def test_one_vjp_from_many_threads(name, dtype, rng):
    method, options, largest = PASSES[name]
    n, d = 700, 3
    options = dict(options)
    if options.get("R") == "family":
        options["R"] = family(rng, d, n)
    Q, K, V = rng.uniform(-largest, largest, (3, 2, n, d)).astype(dtype)
    O, vjp = ropecy.attention_vjp(Q, K, V, method=method, eps=1e-2, threads=2, **options)
    dO = rng.standard_normal((2, *O.shape)).astype(dtype)
    alone = [arrays(vjp(X)) for X in dO]
    turn = iter(range(100))

    def work():
        which = next(turn) % 2
        return which, arrays(vjp(dO[which]))

    for which, found in at_once(work, threads=4, rounds=6):
        for key, X in alone[which].items():
            np.testing.assert_array_equal(found[key], X, err_msg=key)
