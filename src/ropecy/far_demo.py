"""``python -m ropecy.torch_demo far``: work whose answer lies thousands of steps back, for the same time of training.

Kinds of attention differ in what a step teaches them and in what it costs, so each is trained for the same seconds.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .demo_model import NEAR, Model, kinds, of_seconds, optimise

# The rate of each kind that asv_bench/far_field.py found the best for 8,192 steps.
RATES = {
    "near and far, ropecy": 1e-2,
    "ordinary RoPE, exact": 1e-2,
    "ordinary RoPE, SDPA": 3e-2,
    "near field alone": 1e-2,
}
_LEAST = 400  # steps of a series, whose first fifth is longer than the event
_TRIED = 8  # batches by which a trained model is judged


class Series:
    """Two series of n steps, whose sign was set by an event in their first fifth.

    Two numbers a step are read. The first is noise. The second is 0 but for an event of 64 steps, where it is 1 or -1.
    To be told is the first times the sign of the event, with a deviation of 0.3 that no model can know: the mean
    squared error is 0.09 where the sign is known, and 1.09 where 0 is the answer.
    """

    _BATCH, _BLOCKS, _EVENT, _WIDTH, _OUT, _NOISE = 2, 2, 64, 32, 1, 0.3

    def __init__(self, n: int) -> None:
        self._n, self._late = n, n // 5 + self._BLOCKS * NEAR

    def model(self, kind: str) -> Model:
        """A model of this kind of attention, whose far field has a bound of 2."""
        options = {"width": self._WIDTH, "heads": 4, "blocks": self._BLOCKS, "eps": 0.05}
        return Model(kinds(2.0)[kind], self._reader(), self._OUT, **options)

    def _reader(self) -> nn.Module:
        return nn.Linear(2, self._WIDTH)

    def _event(self, generator: torch.Generator) -> Tensor:
        """The places of the event in each series, (2, 64)."""
        start = torch.randint(self._n // 5 - self._EVENT, (self._BATCH, 1), generator=generator)
        return start + torch.arange(self._EVENT)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What is read (2, n, 2), and what is to be told (2, n)."""
        sign = torch.randint(2, (self._BATCH, 1), generator=generator) * 2.0 - 1
        event = torch.zeros(self._BATCH, self._n).scatter(1, self._event(generator), sign.repeat(1, self._EVENT))
        first, noise = torch.randn(2, self._BATCH, self._n, generator=generator)
        return torch.stack((first, event), -1), sign * first + self._NOISE * noise

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """The mean squared error in new series, (1,), wherever no near field reaches the event."""
        read, wanted = self.draw(generator)
        return (model(read)[:, self._late :, 0] - wanted[:, self._late :]).square().mean()[None]


@dataclass
class Run:
    """A training: the seconds spent before each step, the losses of the steps, and the loss at the end, when judged.

    `beside` are other parts of the loss, where the work has several: the first is what is far.
    """

    kind: str
    rate: float
    seed: int
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    loss: float = math.nan
    beside: list[float] = field(default_factory=list)


def train(work: Series, kind: str, done: Iterable[float], rate: float, seed: int) -> Run:
    """Train a model on draws of the seed, the same for every kind, and judge it by others.

    ``done`` has, before each step, the share that is done: `of_seconds`, `of_steps`.
    """
    torch.manual_seed(seed)
    model, run = work.model(kind), Run(kind, rate, seed)
    generator, judge = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(2**32 + seed)
    start = time.process_time()

    def loss_of() -> Tensor:
        run.seconds.append(time.process_time() - start)
        return work.loss(model, generator).sum()

    run.losses = optimise(model, loss_of, done, rate)
    model.eval()
    with torch.no_grad():
        run.loss, *run.beside = torch.stack([work.loss(model, judge) for _ in range(_TRIED)]).mean(0).tolist()
    return run


def table(runs: list[Run]) -> str:
    """A line for each kind and rate: the steps that it made, and the losses of its seeds, the least first."""
    lines = [f"{'':22}{'rate':>7}{'steps':>7}  loss at the end"]
    for kind, rate in dict.fromkeys((run.kind, run.rate) for run in runs):
        own = [run for run in runs if (run.kind, run.rate) == (kind, rate)]
        steps = np.median([len(run.losses) for run in own])
        losses = " ".join(f"{loss:.3f}" for loss in sorted(run.loss for run in own))
        beside = "".join(f"  {part:.3f}" for part in np.median([run.beside for run in own], axis=0))
        lines.append(f"{kind:22}{rate:7g}{steps:7.0f}  {losses}{beside}")
    return "\n".join(lines)


def best(runs: list[Run], kind: str) -> list[Run]:
    """The runs of a kind by that of its rates whose median of losses is the lowest."""
    by_rate = [[run for run in runs if (run.kind, run.rate) == (kind, rate)] for rate in {run.rate for run in runs}]
    return min(filter(None, by_rate), key=lambda own: np.median([run.loss for run in own]))


def draw(path: Path, found: dict[str, list[Run]]) -> None:
    """Losses of training against seconds, a panel for each title, where each kind has its best rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = 4.5 * len(found), 3.6
    figure, axes = pyplot.subplots(1, len(found), figsize=size, constrained_layout=True, squeeze=False)
    for axis, (title, runs) in zip(axes[0], found.items(), strict=True):
        for colour, kind in enumerate(RATES):
            for i, run in enumerate(best(runs, kind)):
                width = max(1, len(run.losses) // 10)
                smooth = np.convolve(run.losses, np.ones(width) / width, "valid")
                label = None if i else kind
                axis.plot(run.seconds[width - 1 :], smooth, color=f"C{colour}", lw=1, label=label)
        axis.set(title=title, xlabel="seconds of training", ylabel="mean squared error", ylim=(0, 1.6))
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(arguments: list[str]) -> None:
    """Train every kind with one seed, print what was measured, and draw it where ``--plot`` says."""
    parser = argparse.ArgumentParser(prog="python -m ropecy.torch_demo far", description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=8192, help="of a series")
    parser.add_argument("--seconds", type=float, default=80.0, help="of training, those of all processors together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    a = parser.parse_args(arguments)
    if a.steps < _LEAST:
        parser.error(f"--steps: got {a.steps}, wants at least {_LEAST}")
    if not a.seconds > 0:
        parser.error(f"--seconds: got {a.seconds:g}, wants more than 0")
    work, runs = Series(a.steps), []
    for kind, rate in RATES.items():
        runs.append(train(work, kind, of_seconds(a.seconds), rate, a.seed))
        print(f"{kind}: {runs[-1].loss:.3f}", file=sys.stderr)
    title = f"{a.steps:,} steps, {a.seconds:g} seconds"
    print(f"{title}, {torch.get_num_threads()} threads; 0.09 knows the sign, 1.09 does not\n{table(runs)}")
    if a.plot is not None:
        draw(a.plot, {title: runs})
        print(f"drawn to {a.plot}")
