"""``python -m ropecy.torch_demo``: one character model with four kinds of attention, trained on Python's own sources.

Near and far in one softmax, by ropecy's engines and computed exactly; ordinary RoPE by PyTorch's own attention; and the
near field alone, so that the far one has to earn its keep. Needs the extra [torch], and [plot] for ``--plot``.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import far_demo, serve_demo
from .attention import attention, attention_vjp
from .certificate import named
from .demo_model import HEAD, NEAR, ROTARY, Bytes, Model, kinds, of_steps, optimise, read_sources
from .torch import RoPEAttention

BOUND = 4.0  # of the far field that still recalls: one key of 4,096 can have 42% of a row
KINDS = {name: kind for name, kind in kinds(BOUND).items() if name != "ordinary RoPE, exact"}
_PLACES = (0, 64, 256, 1024)  # where bits a byte are told apart


def model_of(kind: str, sizes: dict[str, Any]) -> Model:
    """A byte is predicted from those before it."""
    return Model(KINDS[kind], Bytes(sizes["width"]), 256, **sizes)


@dataclass
class Run:
    """What a model's training left: nats of every step, bits a byte by position and in all, recall, certificates."""

    losses: list[float] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)
    total: float = math.nan
    recall: float = math.nan
    certificates: list[str] = field(default_factory=list)


def spans(context: int) -> list[tuple[int, int]]:
    """The positions whose bits a byte are told apart."""
    return list(pairwise([*(p for p in _PLACES if p < context), context]))


def loss(model: nn.Module, piece: Tensor, reduction: str = "mean") -> Tensor:
    """Nats of every byte but the first, from those before it."""
    return cross_entropy(model(piece[None, :-1])[0], piece[1:], reduction=reduction)


def train(
    kind: str,
    seed: int,
    texts: tuple[Tensor, Tensor],
    sizes: dict[str, Any],
    *,
    steps: int,
    context: int,
    rate: float,
) -> Run:
    """Train one model on windows that the seed draws, the same for every kind, and measure it on the held-out files."""
    torch.manual_seed(seed)
    model, run = model_of(kind, sizes), Run()
    generator = torch.Generator().manual_seed(seed)
    source, held = texts

    def loss_of() -> Tensor:
        start = int(torch.randint(len(source) - context - 1, (), generator=generator))
        return loss(model, source[start : start + context + 1])

    run.losses = optimise(model, loss_of, of_steps(steps), rate)
    pieces = held[: len(held) // (context + 1) * (context + 1)].view(-1, context + 1)[:12]
    with torch.no_grad():
        nats = torch.stack([loss(model, piece, "none") for piece in pieces]).mean(0)
    run.bits = [nats[a:b].mean().item() / math.log(2) for a, b in spans(context)]
    run.total = nats.mean().item() / math.log(2)
    run.certificates = certificates(model, pieces[0])
    return run


def certificates(model: Model, piece: Tensor) -> list[str]:
    """What ropecy says of every layer's attention to this piece."""
    found, hooks = [], []

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        q, k, v, scale = (X.numpy() if isinstance(X, Tensor) else X for X in layer._heads(inputs[0]))
        near = layer.near, layer.log_scale_near.exp().item()
        options = {"scale": scale, "near": near, "causal": True, "eps": layer.eps, "method": layer.method}
        said = attention(q, k, v, layer.rotary, **options, return_certificate=True)[1]
        found.append(f"{said}\n{saved((q, k, v, layer.rotary), options)}")

    for _, layer, _, _ in model.blocks:
        if type(layer) is RoPEAttention:
            hooks.append(layer.register_forward_hook(hook))
    with torch.no_grad():
        model(piece[None, :-1])
    for handle in hooks:
        handle.remove()
    return found


def saved(inputs: tuple[Any, ...], options: dict[str, Any], rounds: int = 3) -> str:
    """What a plan for each head saves of a step of attention, in words: medians of rounds taken in turns."""
    planned = attention_vjp(*inputs, **options)[1].certificate
    if not planned.parts:
        return "  one plan for all heads"
    # One plan for all is that of the largest bound, which is exact where some head has no polynomial.
    one = {"method": "exact"} if planned.engine == "mixed" else {"method": "polynomial", "degree": planned.degree}
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for found, more in zip(times, ({}, one), strict=True):
            start = time.perf_counter()
            O, vjp = attention_vjp(*inputs, **options | more)
            vjp(O)
            found.append(time.perf_counter() - start)
    own, shared = (float(np.median(found)) for found in times)
    degrees = ("exact" if part.degree is None else f"degree {part.degree}" for _, part in planned.parts)
    heads = "; ".join(f"{named(slots)} {how}" for (slots, _), how in zip(planned.parts, degrees, strict=True))
    return f"  a step of attention takes {own:.3g} s ({heads}), and {shared:.3g} s with one plan for all heads"


def time_steps(source: Tensor, sizes: dict[str, Any], contexts: list[int], rounds: int = 3) -> dict[str, list[float]]:
    """Seconds of a step of every kind at every context: medians of rounds in which the kinds take turns."""
    times: dict[str, list[list[float]]] = {kind: [[] for _ in contexts] for kind in KINDS}
    models = {kind: model_of(kind, sizes) for kind in KINDS}
    for place, context in enumerate(contexts):
        for _ in range(rounds):
            for kind, model in models.items():
                start = time.perf_counter()
                optimise(model, partial(loss, model, source[: context + 1]), of_steps(1), 0.0)
                times[kind][place].append(time.perf_counter() - start)
    return {kind: [float(np.median(each)) for each in found] for kind, found in times.items()}


def recall(kind: str, seed: int, eps: float, *, steps: int, rate: float = 1e-2, n: int = 512, batch: int = 8) -> float:
    """How often one layer names the value of a key that was told once, 64 tokens or more before it is asked for.

    Sixteen keys are told in the first half of a sequence, at places drawn at random among tokens without one; every
    token of the second half asks for one of them. All tokens of the first half have values, of sixteen: chance is 1/16.
    """
    torch.manual_seed(seed)
    keys, values, width, half = 16, 16, 64, n // 2
    layer = KINDS[kind](width, 4, head_dim=HEAD, rotary=ROTARY, eps=eps)
    parts = {"key": nn.Embedding(keys + 1, width), "value": nn.Embedding(values + 1, width), "layer": layer}
    model = nn.ModuleDict(parts | {"norm": nn.LayerNorm(width), "head": nn.Linear(width, values)})
    generator = torch.Generator().manual_seed(seed)

    def answers() -> tuple[Tensor, Tensor]:
        where = torch.stack([torch.randperm(half - NEAR, generator=generator)[:keys] for _ in range(batch)])
        value = torch.randint(values, (batch, half), generator=generator)
        told = torch.full((batch, half), keys).scatter(1, where, torch.arange(keys).expand(batch, keys))
        asked = torch.randint(keys, (batch, half), generator=generator)
        wanted = value.gather(1, where.gather(1, asked))
        shown = nn.functional.pad(value, (0, half), value=values)
        x = model["key"](torch.cat((told, asked), 1)) + model["value"](shown)
        return model["head"](model["norm"](x + layer(x)))[:, half:].flatten(0, 1), wanted.flatten()

    optimise(model, lambda: cross_entropy(*answers()), of_steps(steps), rate)
    with torch.no_grad():
        tried = [answers() for _ in range(4)]
    return float(np.mean([(logits.argmax(-1) == wanted).float().mean().item() for logits, wanted in tried]))


def table(runs: dict[str, list[Run]], times: dict[str, list[float]], context: int) -> str:
    """The measurements, one line for each kind, seeds side by side; positions are the seeds' mean."""
    places = [f"{a}-{b - 1}" for a, b in spans(context)]
    heads = f"{'bits a byte':>15}{''.join(f'{p:>11}' for p in places)}{'far recall':>14}"
    lines = [f"{'':21}{heads}{'s a step':>10}{f'at {4 * context:,}':>11}"]
    for kind, found in runs.items():
        both = " ".join(f"{run.total:.3f}" for run in found)
        bits = "".join(f"{np.mean([run.bits[i] for run in found]):11.3f}" for i in range(len(places)))
        share = " ".join(f"{run.recall:.3f}" for run in found if not math.isnan(run.recall))
        seconds = "{:10.2f}{:11.2f}".format(*times[kind])
        lines.append(f"{kind:21}{both:>15}{bits}{share or '-':>14}{seconds}")
    return "\n".join(lines)


def draw(path: Path, runs: dict[str, list[Run]], context: int) -> None:
    """Loss curves of every seed, and bits a byte by position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    places = [f"{a:,}-{b - 1:,}" for a, b in spans(context)]
    for (kind, found), colour, style in zip(runs.items(), ("C0", "C1", "C2", "C3"), ("-", "--", "-", "-"), strict=True):
        for label, run in zip((kind, *[None] * len(found)), found, strict=False):
            width = max(1, len(run.losses) // 20)
            smooth = np.convolve(run.losses, np.ones(width) / width, "valid") / math.log(2)
            left.plot(np.arange(len(smooth)) + width, smooth, style, color=colour, lw=1, label=label)
        right.plot(places, np.mean([run.bits for run in found], axis=0), style, color=colour, marker="o")
    left.set(xlabel="steps", ylabel="bits a byte, training", ylim=(None, 6))
    left.legend(fontsize=8)
    right.set(xlabel="position", ylabel="bits a byte, held-out files")
    figure.savefig(path, dpi=110)


def to_serve(steps: int, weights: Path | None) -> tuple[Model, Tensor]:
    """The bounded model, read from a file of weights or trained (and written there), and the text to train with."""
    torch.manual_seed(0)
    sizes = {"width": 96, "heads": 4, "blocks": 2, "eps": 0.1}
    model, text = model_of("near and far, ropecy", sizes), read_sources()[0]
    if weights is not None and weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model.eval(), text
    starts = torch.randint(len(text) - 1025, (steps,)).tolist()
    optimise(model, lambda: loss(model, text[(at := starts.pop()) : at + 1025]), of_steps(steps), 1e-2)
    if weights is not None:
        torch.save(model.state_dict(), weights)
    return model.eval(), text


def main(arguments: list[str] | None = None) -> None:
    """Train every kind with every seed, print what was measured, and draw it where ``--plot`` says."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["serve"]:
        return serve_demo.main(arguments[1:], to_serve)
    if arguments[:1] == ["far"]:
        return far_demo.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m ropecy.torch_demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--recall-steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    a = parser.parse_args(arguments)
    sizes = {"width": a.width, "heads": a.heads, "blocks": a.blocks, "eps": a.eps}
    texts = read_sources()
    count = sum(p.numel() for p in model_of(next(iter(KINDS)), sizes).parameters())
    print(f"text      {len(texts[0]):,} bytes of Python's library to train with, {len(texts[1]):,} of other files")
    print(f"model     {count:,} parameters, context {a.context:,}, {a.steps} steps, {torch.get_num_threads()} threads")
    print(f"near      {NEAR} tokens at a learnt temperature; far: d = {HEAD}, B = {BOUND:g}, eps = {a.eps:g}\n")
    runs: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    for seed in range(a.seeds):
        for kind in KINDS:
            run = train(kind, seed, texts, sizes, steps=a.steps, context=a.context, rate=a.rate)
            if kind != "near and far, exact":
                run.recall = recall(kind, seed, a.eps, steps=a.recall_steps)
            runs[kind].append(run)
            print(f"seed {seed}    {kind}: {run.total:.3f} bits a byte", file=sys.stderr)
    times = time_steps(texts[0], sizes, [a.context, 4 * a.context])
    print(table(runs, times, a.context))
    ours, exact = (np.array([run.losses for run in found]) for found in list(runs.values())[:2])
    apart = np.abs(ours - exact) / math.log(2)
    print(f"\nropecy against exact, losses of a step: {apart.max():.4f} bits at most, {apart.mean():.4f} on average")
    for i, certificate in enumerate(runs["near and far, ropecy"][0].certificates):
        print(f"layer {i}   {certificate}")
    if a.plot is not None:
        draw(a.plot, runs, a.context)
        print(f"drawn to {a.plot}")


if __name__ == "__main__":
    main()
