"""``python -m ropecy.torch_demo serve``: many streams of a bounded model, on states of fixed size and on caches."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .machine.memory import available_memory

# Of the memory that is left, what caches may take.
_SHARE = 0.5
# The most steps that caches have room for behind the prompt.
_STEPS = 1000


@dataclass
class Served:
    """What one way of serving took at one context: streams, seconds of a step, bytes a stream, and the certificate."""

    way: str
    context: int
    streams: int
    seconds: float
    size: float
    certificate: str


class States:
    """One state of every layer for all streams, which have read the same prompt and go on from there."""

    way = "states"

    @torch.no_grad()
    def __init__(self, model: nn.Module, prompt: Tensor, streams: int) -> None:
        layers = [layer for _, layer, _, _ in model.blocks]
        one = [layer.new_state(1) for layer in layers]
        model(prompt[None], lambda i, layer, x: layer.extend(x, one[i]))
        self._model, self.streams = model, streams
        self._states = [state.select([0] * streams) for state in one]

    def step(self, text: Tensor) -> Tensor:
        """Logits (streams, 256) of what follows the last of the bytes text (streams, 3), which every stream takes."""
        return self._model(text, lambda i, layer, x: layer.step(x[:, -1], self._states[i])[:, None], last=True)

    @property
    def size(self) -> float:
        """Bytes of a stream."""
        return sum(state.nbytes for state in self._states) / self.streams

    @property
    def certificate(self) -> str:
        """The largest certified error of a layer."""
        return f"{max(state.certificate.error for state in self._states):.2g}"


class Caches:
    """The keys and values of all tokens, read by PyTorch's own attention, which knows one scale for near and far."""

    way, certificate = "caches", "-"

    def __init__(self, model: nn.Module, prompt: Tensor, streams: int) -> None:
        layers = [layer for _, layer, _, _ in model.blocks]
        heads, width = layers[0].k_proj.out_features // layers[0].head_dim, layers[0].head_dim
        self._token = len(layers) * 2 * heads * width * 4
        fit = int(_SHARE * available_memory() / (self._token * (len(prompt) + _STEPS)))
        self._model, self.streams = model, max(1, min(streams, fit))
        shape = self.streams, heads, len(prompt) + _STEPS, width
        self._caches = [tuple(torch.randn(shape) for _ in range(2)) for _ in layers]
        self._length = len(prompt)

    def step(self, text: Tensor) -> Tensor:
        """Logits (streams, 256) of what follows the last of the bytes text (streams, 3), which every stream takes."""
        logits = self._model(text[: self.streams], self._attend, last=True)
        self._length += 1
        return logits

    @property
    def size(self) -> float:
        """Bytes of a stream's tokens."""
        return float(self._token * self._length)

    def _attend(self, i: int, layer: Any, x: Tensor) -> Tensor:
        keys, values = self._caches[i]
        q, k, v, scale = layer._heads(x[:, -1:])
        at = np.array([self._length])
        q, k = (torch.from_numpy(layer.rotary.rotate(X.numpy(), at)) for X in (q, k))
        keys[:, :, self._length], values[:, :, self._length] = k[:, :, 0], v[:, :, 0]
        past = slice(self._length + 1)
        o = sdpa(q, keys[:, :, past], values[:, :, past], scale=scale)
        return layer.o_proj(o.transpose(1, 2).flatten(2))


def measure(way: Callable[..., States | Caches], model: nn.Module, text: Tensor, sizes: dict[str, int]) -> Served:
    """Serve text to so many streams after so much context, a byte at a time, and take the median time of a step."""
    context, streams, steps = sizes["context"], sizes["streams"], sizes["steps"]
    served, seconds = way(model, text[:context], streams), []
    with torch.no_grad():
        for i in range(context, context + steps):
            start = time.perf_counter()
            logits = served.step(text[i - 2 : i + 1].expand(streams, 3))
            seconds.append(time.perf_counter() - start)
    if not logits.isfinite().all():
        raise ArithmeticError("logits that are no numbers")
    return Served(served.way, context, served.streams, float(np.median(seconds)), served.size, served.certificate)


def table(found: list[Served]) -> str:
    """What was measured, a line for each way and context."""
    lines = [f"{'':8}{'context':>9}{'streams':>9}{'ms a step':>11}{'tokens/s':>10}{'bytes a stream':>16}  certificate"]
    for x in found:
        numbers = f"{x.context:9,}{x.streams:9}{1e3 * x.seconds:11.1f}{x.streams / x.seconds:10,.0f}{x.size:16,.0f}"
        lines.append(f"{x.way:8}{numbers}  {x.certificate}")
    return "\n".join(lines)


def draw(path: Path, found: list[Served]) -> None:
    """Time a token and bytes a stream against the context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for way in ("states", "caches"):
        own = [x for x in found if x.way == way]
        contexts = [x.context for x in own]
        left.loglog(contexts, [1e6 * x.seconds / x.streams for x in own], marker="o", label=way)
        right.loglog(contexts, [x.size for x in own], marker="o", label=way)
    left.set(xlabel="tokens of context", ylabel="microseconds a token")
    right.set(xlabel="tokens of context", ylabel="bytes a stream")
    left.legend()
    figure.savefig(path, dpi=110)


def main(arguments: list[str], trained: Callable[[int, Path | None], tuple[nn.Module, Tensor]]) -> None:
    """Serve a model at every context, print what was measured, and draw it where ``--plot`` says.

    ``trained(steps, weights)`` gives the model, trained for so many steps or loaded from a file, and a text.
    """
    parser = argparse.ArgumentParser(prog="python -m ropecy.torch_demo serve", description=__doc__)
    parser.add_argument("--train-steps", type=int, default=50)
    parser.add_argument("--weights", type=Path, metavar="FILE", help="read from here, or written after training")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    a = parser.parse_args(arguments)
    if not 0 < a.steps <= _STEPS:
        parser.error(f"--steps: got {a.steps}, wants 1 to {_STEPS}")
    model, text = trained(a.train_steps, a.weights)
    print(f"model     {sum(p.numel() for p in model.parameters()):,} parameters, {torch.get_num_threads()} threads")
    found = []
    for context in a.contexts:
        for way in (States, Caches):
            found.append(measure(way, model, text, {"context": context, "streams": a.streams, "steps": a.steps}))
    print(table(found))
    if a.plot is not None:
        draw(a.plot, found)
        print(f"drawn to {a.plot}")
