"""What demonstrations share: models of blocks of a few kinds of attention, how they are optimised, and a text."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .rotary import Rotary
from .torch import RoPEAttention, scaled_dot_product_attention

HEAD, NEAR = 8, 64
ROTARY = Rotary(HEAD, rotary_dim=HEAD // 2)
_HASHED = 8192  # rows of the table of hashed triples of bytes


class ByTorch(RoPEAttention):
    """Ordinary RoPE, 1/sqrt(d) and no bound, rotated and attended by PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        """Attention of the tokens x (batch, n, embed_dim) among themselves."""
        q, k, v, _ = self._heads(x)
        half = self.rotary.rotary_dim // 2
        theta = 10000.0 ** (-torch.arange(half) / half)
        angle = torch.arange(x.shape[1])[:, None] * theta
        cos, sin = angle.cos(), angle.sin()

        def rotate(y: Tensor) -> Tensor:
            a, b, rest = y.split((half, half, y.shape[-1] - 2 * half), dim=-1)
            return torch.cat((a * cos - b * sin, a * sin + b * cos, rest), dim=-1)

        return self.o_proj(sdpa(rotate(q), rotate(k), v, is_causal=True).transpose(1, 2).flatten(2))


class WindowAlone(RoPEAttention):
    """The near field of a bounded layer, and nothing beyond it."""

    def forward(self, x: Tensor) -> Tensor:
        """Attention of the tokens x (batch, n, embed_dim) among themselves."""
        q, k, v, _ = self._heads(x)
        options = {"is_causal": True, "window": self.near, "rotary": self.rotary, "method": "exact"}
        o = scaled_dot_product_attention(q * self.log_scale_near.exp(), k, v, scale=1.0, **options)
        return self.o_proj(o.transpose(1, 2).flatten(2))


def kinds(bound: float) -> dict[str, Callable[..., RoPEAttention]]:
    """What makes the layer of each kind of attention, whose far field has this bound where there is one."""
    return {
        "near and far, ropecy": partial(RoPEAttention, bound=bound, near=NEAR, method="auto"),
        "near and far, exact": partial(RoPEAttention, bound=bound, near=NEAR, method="exact"),
        "ordinary RoPE, SDPA": ByTorch,
        "ordinary RoPE, exact": partial(RoPEAttention, method="exact"),
        "near field alone": partial(WindowAlone, bound=bound, near=NEAR),
    }


class Bytes(nn.Module):
    """Embeddings of bytes: of each, and of what a hash makes of it and the two before it."""

    def __init__(self, width: int, hashed: int = _HASHED) -> None:
        super().__init__()
        self.embed, self.triples = nn.Embedding(256, width), nn.Embedding(hashed, width)
        for table in (self.embed, self.triples):
            nn.init.normal_(table.weight, std=0.5)

    def forward(self, text: Tensor) -> Tensor:
        """Embeddings (batch, n, width) of text (batch, n)."""
        before = [nn.functional.pad(text, (shift, 0))[:, : text.shape[1]] for shift in (1, 2)]
        triple = (text + 256 * before[0] + 65536 * before[1]) * 2654435761 % 2**32 % len(self.triples.weight)
        return self.embed(text) + self.triples(triple)


class Model(nn.Module):
    """What comes next is told from what was before: pre-norm blocks of attention and a two-layer network.

    Parameters
    ----------
    kind : callable
        Makes a layer of attention, one of `kinds`.
    read : Module
        Makes (batch, n, width) of the input.
    out : int
        Numbers that are told of each token.
    width, heads, blocks : int
    eps : float
        Of attention.
    """

    def __init__(
        self,
        kind: Callable[..., RoPEAttention],
        read: nn.Module,
        out: int,
        *,
        width: int,
        heads: int,
        blocks: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.read, self.blocks = read, nn.ModuleList()
        for _ in range(blocks):
            layer = kind(width, heads, head_dim=HEAD, rotary=ROTARY, eps=eps)
            network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            self.blocks.append(nn.ModuleList([nn.LayerNorm(width), layer, nn.LayerNorm(width), network]))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, out)

    def forward(
        self,
        tokens: Tensor,
        attend: Callable[[int, RoPEAttention, Tensor], Tensor] = lambda i, layer, x: layer(x),
        *,
        last: bool = False,
    ) -> Tensor:
        """What is told (batch, n, out) of each of n tokens, or of the last alone, n = 1.

        The i-th block has ``attend(i, layer, x)`` of its layer.
        """
        x = self.read(tokens)
        if last:
            x = x[:, -1:]
        for i, (norm, layer, second, network) in enumerate(self.blocks):
            x = x + attend(i, layer, norm(x))
            x = x + network(second(x))
        return self.head(self.norm(x))


def of_steps(steps: int) -> Iterator[float]:
    """Which share of so many steps is done, before each."""
    return (step / steps for step in range(steps))


def of_seconds(budget: float) -> Iterator[float]:
    """Which share of so many seconds of this process is spent, before each step until all are.

    They are those of its processors, so that other processes do not count; two threads spend two a second.
    """
    start = time.process_time()
    while (spent := time.process_time() - start) < budget:
        yield spent / budget


def optimise(model: nn.Module, loss_of: Callable[[], Tensor], done: Iterable[float], rate: float) -> list[float]:
    """The loss of every step of Adam, the rate rising over a tenth of what is to be done and falling to 0 as a cosine.

    ``done`` has, before each step, the share that is done: `of_steps`, `of_seconds`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    losses = []
    for share in done:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 0.1 + 9 * share) * 0.5 * (1 + math.cos(math.pi * share))
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def read_sources(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Bytes to train with, and those of other files: Python's modules, in an order that the seed draws."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    order = np.random.default_rng(seed).permutation(len(files))
    texts = [files[i].read_bytes() for i in order]
    held = len(files) // 8
    parts = (bytearray(b"".join(part)) for part in (texts[held:], texts[:held]))
    return tuple(torch.frombuffer(part, dtype=torch.uint8).long() for part in parts)
