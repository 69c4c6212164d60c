"""Kinds of attention for the same seconds of training, on series whose answer lies far back: rates, then three seeds.

    python asv_bench/far_field.py FILE.json [FILE.png]

Runs that the file has are not done again. Seconds are those of one thread, so that a busy machine biases little.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from ropecy import far_demo

# Steps of a series: seconds of training, and the rates that are tried.
LENGTHS = {8192: (80.0, (3e-3, 1e-2, 3e-2, 1e-1)), 2048: (10.0, (3e-3, 1e-2, 3e-2))}
SEEDS = (0, 1, 2)  # the first of which tunes the rates
LEARNED = 1.0  # a loss that no model has without the sign: it is 1.09


class Study:
    """Runs that are kept in a file."""

    def __init__(self, path):
        self._path = path
        self._runs = json.loads(path.read_text()) if path.exists() else {}

    def run(self, n, kind, rate, seed):
        """That of the file, or done now and added to it."""
        seconds, _ = LENGTHS[n]
        key = f"{n} steps, {seconds:g} s; {kind}; rate {rate:g}; seed {seed}"
        if key not in self._runs:
            self._runs[key] = asdict(far_demo.train(far_demo.Series(n), kind, seconds, rate, seed))
            self._path.write_text(json.dumps(self._runs))
            print(f"{key}: {self._runs[key]['loss']:.3f}, {len(self._runs[key]['losses'])} steps", flush=True)
        return far_demo.Run(**self._runs[key])

    def tuned(self, n, kind):
        """The rates by which the first seed has learned anything, or else the best of all."""
        if kind == "near field alone":
            return [far_demo.RATES[kind]]  # at no rate does it see the event
        _, rates = LENGTHS[n]
        losses = {rate: self.run(n, kind, rate, SEEDS[0]).loss for rate in rates}
        return [rate for rate in rates if losses[rate] < LEARNED] or [min(rates, key=losses.get)]


def main(path, drawing=None):
    """Trains, prints, draws."""
    torch.set_num_threads(1)
    study, found = Study(Path(path)), {}
    for n, (seconds, _) in LENGTHS.items():
        rates = [(kind, rate) for kind in far_demo.RATES for rate in study.tuned(n, kind)]
        runs = [study.run(n, kind, rate, seed) for kind, rate in rates for seed in SEEDS]
        found[f"{n:,} steps, {seconds:g} seconds"] = runs
    for title, runs in found.items():
        print(f"\n{title}\n{far_demo.table(runs)}")
    if drawing is not None:
        far_demo.draw(Path(drawing), found)


if __name__ == "__main__":
    main(*sys.argv[1:])
