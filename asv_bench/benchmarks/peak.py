"""Multiply-adds a second that one core does: a loop of inline assembly on registers, built by the compiler at hand."""

import ctypes
import functools
import os
import subprocess
import tempfile
import time

_SOURCE = r"""
/* Twelve chains of dependent multiply-adds hide a latency of 4 to 6 at two a cycle. */
#if defined(__AVX512F__)
#define FMA(r) "vfmadd231ps %%zmm0, %%zmm1, %%zmm" #r "\n\t"
enum { LANES = 16 };
#elif defined(__FMA__)
#define FMA(r) "vfmadd231ps %%ymm0, %%ymm1, %%ymm" #r "\n\t"
enum { LANES = 8 };
#elif defined(__aarch64__)
#define FMA(r) "fmla v" #r ".4s, v0.4s, v1.4s\n\t"
enum { LANES = 4 };
#endif
#ifdef FMA
#define TWELVE FMA(2) FMA(3) FMA(4) FMA(5) FMA(6) FMA(7) FMA(8) FMA(9) FMA(10) FMA(11) FMA(12) FMA(13)
double run(long rounds) {
    for (long i = 0; i < rounds; i++)
#ifdef __aarch64__
        __asm__ volatile(TWELVE TWELVE ::: "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13");
#else
        __asm__ volatile(TWELVE TWELVE ::: "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
                         "xmm11", "xmm12", "xmm13");
#endif
    return 2.0 * 24 * LANES * rounds;
}
#else
double run(long rounds) { return 0; }
#endif
"""


@functools.cache
def _loop():
    folder = tempfile.mkdtemp()
    source, library = os.path.join(folder, "peak.c"), os.path.join(folder, "peak.so")
    with open(source, "w") as file:
        file.write(_SOURCE)
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-march=native", "-shared", "-fPIC", "-o", library, source], check=True)
    run = ctypes.CDLL(library).run
    run.restype, run.argtypes = ctypes.c_double, [ctypes.c_long]
    return run


def rate(seconds=0.05):
    """float32 operations a second of one core, a multiply-add being two: the best of some tries."""
    run, best = _loop(), 0.0
    if not run(1):
        raise NotImplementedError("no loop of multiply-adds for this CPU")
    for _ in range(5):
        start = time.perf_counter()
        done = run(int(seconds / 5 * 1e8))
        best = max(best, done / (time.perf_counter() - start))
    return best
