"""Many Python threads at once: whatever is public gives the bits that it gives to one thread alone."""

import os
import subprocess
import sys
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


def everything(d, n):
    """A function for everything public that computes: name, and a call that returns arrays."""
    rng = np.random.default_rng(7)
    Q, K, V, E = rng.uniform(-1, 1, (4, 2, n, d)).astype(np.float32)
    R, alibi, W = ropecy.Rotary(d), ropecy.RelativeBias.alibi([0.1, 0.2]), family(rng, d, n)
    O, vjp = ropecy.attention_vjp(Q, K, V, R, causal=True, method="polynomial", eps=1e-2, threads=2)
    A = ropecy.AttentionMatrix(Q, K, R, causal=True, threads=2)

    def attention(**options):
        return lambda: ropecy.attention(Q, K, V, R, threads=2, **options)

    def decode():
        state = ropecy.DecodeState(d, d, R, bound=2.0)
        state.extend(K[:, :-2], V[:, :-2])
        return state.step(Q[:, -2], K[:, -2], V[:, -2]), state.copy().attend(Q[:, -1]), state.nbytes

    loss = {"causal": True, "threads": 2}
    return {
        "plain": lambda: ropecy.attention(Q, K, V, threads=2, return_lse=True),
        "few queries": lambda: ropecy.attention(Q[:, :2], K, V, threads=2, return_lse=True),
        "packed": attention(lengths=(30, 0, 3, 37), causal=True),
        "polynomial": attention(method="polynomial", eps=1e-2),
        "causal": attention(causal=True, return_lse=True),
        "exact, window": attention(method="exact", window=9),
        "alibi": attention(bias=alibi, causal=True),
        "fft": attention(method="fft", eps=1e-2),
        "family": lambda: ropecy.attention(Q, K, V, W, method="fft", eps=0.1, threads=2),
        "sample": attention(method="polynomial", certify="sample", seed=3, eps=1e-2),
        "vjp": lambda: list(arrays(vjp(E)).values()),
        "vjp of its own": lambda: list(arrays(ropecy.attention_vjp(Q, K, V, R, threads=2)[1](E)).values()),
        "loss": lambda: ropecy.loss(Q, K, V, E, R, **loss),
        "loss_grad": lambda: list(arrays(ropecy.loss_grad(Q, K, V, E, R, **loss)).values()),
        "plan": lambda: ropecy.plan(Q, K, V, R, causal=True, threads=2).certificate.error,
        "check": lambda: ropecy.check(O, Q, K, V, R, causal=True, rows=5, seed=1).error,
        "A @ X": lambda: A @ V,
        "A.T @ X": lambda: A.T @ V,
        "A.D": lambda: A.D,
        "rotate": lambda: R.rotate(Q, positions=np.arange(n) * 7),
        "inverse": lambda: R.rotate(Q, inverse=True),
        "R[m]": lambda: R[5],
        "decode": decode,
        "info": lambda: ropecy.info()["threads"],
    }


def test_everything_public_from_16_threads():
    calls = everything(d=4, n=70)
    alone = {name: call() for name, call in calls.items()}
    names = list(calls)
    starts = iter(range(16))

    def work():
        # Threads begin at different calls, and each makes all of them.
        start = next(starts)
        for turn in range(200 * len(names) // 16):
            name = names[(start + turn) % len(names)]
            found, expected = calls[name](), alone[name]
            several = isinstance(expected, (list, tuple))
            for X, Y in zip(found if several else [found], expected if several else [expected], strict=True):
                np.testing.assert_array_equal(X, Y, err_msg=name)

    at_once(work, threads=16, rounds=1)


def run(code, timeout=100):
    """What a process of its own prints; it must end by itself, and well."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


FORK = """
import os, signal, threading, numpy as np, ropecy
from ropecy.kernels._fftw import ComplexFFT

X = np.random.default_rng(0).uniform(-1, 1, (3, 2, 3000, 4)).astype("f4")
call = lambda: ropecy.attention(*X, method="{method}", eps=1e-2, threads=3)
O = call()
busy = True

def others():
    size = 0
    while busy:
        size = size % 5 + 1
        ComplexFFT(2**9 * size, flags="measure")
        call()

threading.Thread(target=others, daemon=True).start()
for _ in range(20):
    child = os.fork()
    if not child:
        signal.alarm(60)
        ComplexFFT(100)
        os._exit(0 if np.array_equal(call(), O) else 1)
    assert os.waitpid(child, 0)[1] == 0
busy = False
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("method", ["fft", "polynomial", "exact"])
def test_a_child_computes_whatever_other_threads_did_at_the_fork(method):
    run(FORK.format(method=method))


SCARCE = """
import resource, numpy as np, ropecy
from ropecy.kernels._fftw import ComplexFFT, RealFFT

def limit(room):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(room), resource.RLIM_INFINITY))

def unlimited():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

X = np.random.default_rng(0).uniform(-1, 1, (3, 2, 2000, 4)).astype("f4")
"""
FEWER_THREADS = """
call = lambda threads: ropecy.attention(*X, method="{method}", eps=1e-2, threads=threads)
O = call(1)
limit(1e8)  # no room for the stacks of 63 threads
assert np.array_equal(call(64), O)
"""
NO_ROOM_TO_PLAN = """
found = []
for make in (ComplexFFT, lambda n: RealFFT(n // 7, 7, "f4")):
    for n in (2**13, 2**17 + 1, 3**10, 2**17):
        for room in (0, 0.5, 1, 2, 3, 4, 5, 6, 8, 12, 20):
            limit(room * 16 * n)
            try:
                make(n)
                found.append("made")
            except MemoryError:
                found.append("refused")
            unlimited()
print(*sorted(set(found)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("method", ["exact", "polynomial", "fft"])
def test_where_no_thread_can_be_started_fewer_compute(method):
    run(SCARCE + FEWER_THREADS.format(method=method))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_that_fftw_would_miss_is_an_error_before_it_plans():
    assert run(SCARCE + NO_ROOM_TO_PLAN) == "made refused\n"


INTERRUPTED = """
import os, signal, threading
from ropecy.engines.fft import shared

# Where the suite runs in the background, signals may have been ignored from the start.
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    shared._measured(2**21)  # takes most of a minute
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_while_fftw_measures():
    assert run(INTERRUPTED, timeout=60) == "interrupted\n"
