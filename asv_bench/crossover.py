"""Time a token against the number of tokens: PyTorch's SDPA, exact and polynomial attention, and where they cross.

    OPENBLAS_NUM_THREADS=1 python asv_bench/crossover.py FILE.png
"""

import math
import sys

from benchmarks import growth, inputs

WIDTHS = (8, 16, 64)
COLOURS = {"sdpa": "tab:gray", "exact": "tab:orange", "polynomial": "tab:blue"}
LABELS = {"sdpa": "PyTorch's SDPA", "exact": "exact", "polynomial": "polynomial, eps 1e-3"}
SHORTEST, LONGEST, MOST = 16, 1 << 17, 3.0  # tokens; seconds of a call after which longer ones are left out


def measure(rival, d):
    """{n: nanoseconds a token} of attention without a mask, one head."""
    found, n = {}, SHORTEST
    while n <= LONGEST:
        seconds = growth.seconds(inputs.forward(rival, n, d, False), 9 if n < 8192 else 3)
        found[n] = 1e9 * seconds / n
        if seconds * 4 > MOST:
            break
        n *= 2
    return found


def crossing(fast, slow):
    """The n from which on `fast` is the faster, between two lengths by straight lines of logarithms; or None."""
    ahead = {n: math.log(fast[n] / slow[n]) for n in fast if n in slow}
    behind = [n for n in ahead if ahead[n] >= 0]
    if not behind:
        return min(ahead)
    n = behind[-1]
    return n * 2 ** (ahead[n] / (ahead[n] - ahead[2 * n])) if 2 * n in ahead else None


def main(path):
    """Measures, prints, draws."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(WIDTHS), figsize=(12, 3.6), sharey=True, layout="constrained")
    for axis, d in zip(axes, WIDTHS, strict=True):
        times = {rival: measure(rival, d) for rival in COLOURS}
        for rival, found in times.items():
            axis.loglog(list(found), list(found.values()), "o-", ms=3, color=COLOURS[rival], label=LABELS[rival])
        for slow in ("sdpa", "exact"):
            at = crossing(times["polynomial"], times[slow])
            print(f"d = {d}: polynomial against {slow}:", f"faster from n = {at:,.0f}" if at else "slower")
            if at:
                axis.axvline(at, color=COLOURS[slow], lw=0.8, ls=":")
        for rival, found in times.items():
            print(f"   {rival:<10}", "  ".join(f"{n}: {ns:.0f}" for n, ns in found.items()))
        axis.set_title(f"d = {d}")
        axis.set_xlabel("tokens")
    axes[0].set_ylabel("ns a token")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1])
