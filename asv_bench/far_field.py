"""Kinds of attention for the same seconds of training, on series whose answer lies far back and on text.

    python asv_bench/far_field.py FILE.json [FILE.png]

For each kind the best of a few rates by one seed, then two other seeds. Runs that the file has are not done again. Seconds
are those of one thread, so that a busy machine biases nothing.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from ropecy import far_demo

# What is trained, for how many seconds, and the rates that are tried.
WORKS = {
    "series of 8,192 steps, 80 s": (far_demo.Series(8192), 80.0, (3e-3, 1e-2, 3e-2, 1e-1)),
    "series of 2,048 steps, 10 s": (far_demo.Series(2048), 10.0, (1e-2, 3e-2)),
    "sources, 4,096 bytes, 15 s": (far_demo.Sources(4096), 15.0, (3e-3, 1e-2)),
}
SEEDS = (0, 1, 2)  # the first of which tunes the rates


class Study:
    """Runs that are kept in a file."""

    def __init__(self, path):
        self._path = path
        self._runs = json.loads(path.read_text()) if path.exists() else {}

    def run(self, name, kind, rate, seed):
        """That of the file, or done now and added to it."""
        key = f"{name}; {kind}; rate {rate:g}; seed {seed}"
        if key not in self._runs:
            work, budget, _ = WORKS[name]
            self._runs[key] = asdict(far_demo.train(work, kind, budget, rate, seed))
            self._path.write_text(json.dumps(self._runs))
            print(f"{key}: {self._runs[key]['loss']:.3f}, {len(self._runs[key]['losses'])} steps", flush=True)
        return far_demo.Run(**self._runs[key])

    def tuned(self, name, kind):
        """The rate whose loss is the lowest; the near field alone never sees the event of a series, at any rate."""
        work, _, rates = WORKS[name]
        if isinstance(work, far_demo.Series) and kind == "near field alone":
            return far_demo.RATES[kind]
        return min(rates, key=lambda rate: self.run(name, kind, rate, SEEDS[0]).loss)


def main(path, drawing=None):
    """Trains, prints, draws."""
    torch.set_num_threads(1)
    study, found = Study(Path(path)), {}
    for name, (work, *_) in WORKS.items():
        rates = {kind: study.tuned(name, kind) for kind in far_demo.RATES}
        runs = [study.run(name, kind, rate, seed) for seed in SEEDS for kind, rate in rates.items()]
        found[name] = work.unit, runs
    for name, (unit, runs) in found.items():
        print(f"\n{name}, {unit}\n{far_demo.table(runs)}")
    if drawing is not None:
        far_demo.draw(Path(drawing), found)


if __name__ == "__main__":
    main(*sys.argv[1:])
