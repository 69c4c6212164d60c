"""Draws the seconds of attention and of its gradient from the last results that asv has stored in `.asv/results`.

    cd asv_bench
    asv run --python=same --set-commit-hash $(git rev-parse HEAD) --bench '^speed'
    python draw.py FILE.png
"""

import sys
from itertools import product
from pathlib import Path

from asv.results import iter_results

COLOURS = {"sdpa": "tab:gray", "exact": "tab:orange", "polynomial": "tab:blue"}
LABELS = {"sdpa": "PyTorch's SDPA", "exact": "exact", "polynomial": "polynomial, eps 1e-3"}
# Title of a panel, and the benchmark and the parameters that it shows.
PANELS = {
    "forward, d = 8": ("speed.Forward.time_forward", {"d": 8, "causal": False}),
    "forward, d = 16": ("speed.Forward.time_forward", {"d": 16, "causal": False}),
    "with gradient, d = 8, causal": ("speed.Backward.time_forward_and_backward", {"d": 8}),
    "with gradient, d = 16, causal": ("speed.Backward.time_forward_and_backward", {"d": 16}),
}
NAMES = {
    "speed.Forward.time_forward": ("rival", "n", "d", "causal"),
    "speed.Backward.time_forward_and_backward": ("rival", "n", "d"),
}


def seconds(results, name):
    """{values of the parameters: seconds} of a benchmark."""
    params = results.get_result_params(name)
    values = results.get_result_value(name, params)
    return dict(zip(product(*params), values, strict=True))


def main(path):
    """Draws the results of the commit that was measured last."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(__file__).parent / ".asv" / "results"
    stored = [results for results in iter_results(str(folder)) if set(NAMES) <= set(results.get_all_result_keys())]
    if not stored:
        raise SystemExit(f"{folder} has no results of {' and '.join(NAMES)}: run asv first")
    last = max(stored, key=lambda results: results.date)
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 3.4), sharey=True, layout="constrained")
    for axis, (title, (name, shown)) in zip(axes, PANELS.items(), strict=True):
        found = seconds(last, name)
        for rival, colour in COLOURS.items():
            points = {}
            for values, time in found.items():
                named = dict(zip(NAMES[name], values, strict=True))
                if named["rival"] == repr(rival) and all(named[key] == repr(value) for key, value in shown.items()):
                    points[int(named["n"])] = time
            axis.loglog(list(points), list(points.values()), "o-", ms=4, color=colour, label=LABELS[rival])
        axis.set(title=title, xlabel="tokens")
        axis.set_xticks(list(points), [f"{n:,}" for n in points])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    print(f"drawn to {path}: {last.commit_hash[:8]}, {last.params.get('machine')}")


if __name__ == "__main__":
    main(sys.argv[1])
