"""Kinds of attention for the same seconds of training, on work whose answer lies far back: rates, then three seeds.

    python asv_bench/far_field.py FILE.json [FILE.png]

Runs that the file has are not done again. Seconds are those of one thread, so that a busy machine biases little.
"""

import json
import math
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from ropecy import far_demo
from ropecy.demo_model import NEAR, Bytes, of_seconds, read_sources


class Text(far_demo.Series):
    """Python's own modules, byte by byte: 64 bytes in a row of the first fifth are one of four letters.

    Later a byte that no text has stands at every 64th place and asks which letter it was: two bits, if not known. At
    other places the next byte is to be told. No answer is ever read.
    """

    _OUT, _LETTERS, _QUESTION = 256, b"ABCD", 1

    def __init__(self, n):
        super().__init__(n)
        self._texts, self._asked = read_sources(), torch.arange(self._late, n, NEAR)

    def _reader(self):
        return Bytes(self._WIDTH)

    def loss(self, model, generator):
        """Bits of an answer, and of any other byte: in files to train with, or in others when the model is judged."""
        source = self._texts[0 if model.training else 1]
        start = torch.randint(len(source) - self._n - 1, (self._BATCH, 1), generator=generator)
        letter = torch.tensor(list(self._LETTERS))[torch.randint(4, (self._BATCH, 1), generator=generator)]
        told = self._event(generator), letter.repeat(1, self._EVENT)
        text = source[start + torch.arange(self._n + 1)].scatter(1, *told)
        read, wanted = text[:, :-1].clone(), text[:, 1:].clone()
        read[:, self._asked], wanted[:, self._asked] = self._QUESTION, letter
        bits = cross_entropy(model(read).transpose(1, 2), wanted, reduction="none") / math.log(2)
        other = torch.ones(self._n, dtype=torch.bool).index_fill(0, self._asked, False)
        return torch.stack((bits[:, self._asked].mean(), bits[:, other].mean()))


# What is learned: for how many seconds, by which rates, and a loss that no model has without what is far.
WORKS = {
    "8192 steps": (partial(far_demo.Series, 8192), 80.0, (3e-3, 1e-2, 3e-2, 1e-1), 1.0),
    "2048 steps": (partial(far_demo.Series, 2048), 10.0, (3e-3, 1e-2, 3e-2), 1.0),
    "4096 bytes": (partial(Text, 4096), 40.0, (3e-3, 1e-2, 3e-2), 1.9),
}
SEEDS = (0, 1, 2)  # the first of which tunes the rates


class Study:
    """Runs of one work that are kept in a file."""

    def __init__(self, path, name):
        self._path, self._name = path, name
        make, self._seconds, self._rates, self._learned = WORKS[name]
        self._runs, self._work = json.loads(path.read_text()) if path.exists() else {}, make()

    def run(self, kind, rate, seed):
        """That of the file, or done now and added to it."""
        key = f"{self._name}, {self._seconds:g} s; {kind}; rate {rate:g}; seed {seed}"
        if key not in self._runs:
            done = of_seconds(self._seconds)
            self._runs[key] = run = asdict(far_demo.train(self._work, kind, done, rate, seed))
            self._path.write_text(json.dumps(self._runs))
            print(f"{key}: {run['loss']:.3f} {run['beside']}, {len(run['losses'])} steps", flush=True)
        return far_demo.Run(**self._runs[key])

    def tuned(self, kind):
        """The rates by which the first seed has learned anything of what is far, or else the best for all it learns."""
        first = {rate: self.run(kind, rate, SEEDS[0]) for rate in self._rates}
        learned = [rate for rate, run in first.items() if run.loss < self._learned]
        return learned or [min(first, key=lambda rate: first[rate].loss + sum(first[rate].beside))]


def main(path, drawing=None):
    """Trains, prints, draws."""
    torch.set_num_threads(1)
    found = {}
    for name in WORKS:
        study = Study(Path(path), name)
        rates = [(kind, rate) for kind in far_demo.RATES for rate in study.tuned(kind)]
        found[f"{name}, {WORKS[name][1]:g} seconds"] = [study.run(*each, seed) for each in rates for seed in SEEDS]
    for title, runs in found.items():
        print(f"\n{title}\n{far_demo.table(runs)}")
    if drawing is not None:
        far_demo.draw(Path(drawing), {title: runs for title, runs in found.items() if not runs[0].beside})


if __name__ == "__main__":
    main(*sys.argv[1:])
