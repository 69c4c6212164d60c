"""The work of a layer a token at a time: the state of its streams, and what `extend` and `step` make of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..certificate import Certificate
from ..decode import DecodeState
from .key_values import KeyValues
from .operators import stored, tensor
from .threads import torch_threads

if TYPE_CHECKING:
    from .layer import RoPEAttention


class LayerState:
    """What a `RoPEAttention` keeps of streams of tokens, from ``layer.new_state(batch)``.

    Attributes
    ----------
    batch : int
        How many streams there are.
    kept : ropecy.DecodeState or KeyValues
        Of fixed size for a layer with a bound, and all keys and values for one without.
    form : dict
        What a layer must have in common with that which made the state.
    """

    def __init__(self, batch: int, kept: DecodeState | KeyValues, form: dict[str, Any]) -> None:
        self.batch, self.kept, self.form = batch, kept, form

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each stream has had, (batch,)."""
        return np.broadcast_to(self.kept.lengths, (self.batch,)).copy()

    @property
    def nbytes(self) -> int:
        """Bytes of the state: constant from the first token on where the layer has a bound."""
        return self.kept.nbytes

    @property
    def certificate(self) -> Certificate | None:
        """What is promised of attention's last results, before the output projection; None without a bound."""
        return self.kept.certificate if isinstance(self.kept, DecodeState) else None

    def reset(self, streams: Any = ...) -> None:
        """Let streams have no tokens, by an index of them, by default all."""
        if self.lengths.any():
            self.kept.reset(streams)

    def select(self, streams: Any) -> LayerState:
        """A second state of these streams, an index of one axis: some of them, in another order, or repeated."""
        kept = self.kept.select(streams)
        return LayerState(len(kept.lengths), kept, self.form)


def new_state(layer: RoPEAttention, batch: int) -> LayerState:
    """`RoPEAttention.new_state`."""
    if not layer.causal:
        raise ValueError("causal: got a layer with causal=False, whose tokens see later ones; wants causal=True")
    if type(batch) is not int or batch < 1:
        raise ValueError(f"batch: got {batch!r}, wants a number of streams")
    _check_mode(layer)
    (_, key_heads), d, form = _heads(layer), layer.head_dim, _form(layer)
    if layer.bound is not None:
        scale, near = layer.bound / layer._gain, form["near"]
        kept = DecodeState(d, d, layer.rotary, eps=layer.eps, bound=layer.bound, scale=scale, near=near)
        return LayerState(batch, kept, form)
    rule = "default" if layer.rotary.scaling is None else layer.rotary.scaling["rope_type"]
    if rule in ("dynamic", "longrope") and layer.rotary.length is None:
        raise ValueError(f"rotary: got rope_type {rule!r}, whose angles depend on length; wants Rotary(..., length=)")
    dtype = np.dtype(np.float64 if form["dtype"] == torch.float64 else np.float32)
    return LayerState(batch, KeyValues((batch, key_heads, d), layer.rotary, 1 / math.sqrt(d), dtype), form)


@torch.no_grad()
def extend(layer: RoPEAttention, x: Tensor, state: LayerState, key_mask: Tensor | None) -> Tensor:
    """`RoPEAttention.extend`."""
    _check_state(layer, state)
    _check_shape(x, (state.batch, None, layer.q_proj.in_features))
    if key_mask is None:
        key_mask = torch.ones(x.shape[:2], dtype=torch.bool)
    x = without_padding(x, key_mask)
    _check_finite(x)
    key_mask = key_mask.expand(x.shape[:2])
    counts, order = _from_the_first_kept(key_mask)
    order = order[..., None].expand_as(x)
    own, lengths = x.gather(1, order), counts.numpy()
    if not lengths.any():
        return torch.zeros_like(x)
    if state.lengths[lengths > 0].any():
        draft = LayerState(state.batch, state.kept.copy(), state.form)
        rows = [step(layer, own[:, i], draft, counts > i) for i in range(x.shape[1])]
        y = torch.stack(rows, dim=1)
        y, state.kept = torch.empty_like(y).scatter_(1, order, y), draft.kept
        return y
    taking = counts > 0
    y = _among(layer(x[taking], key_mask[taking]), taking)
    _, k, v, _ = layer._heads(own[taking])
    rows = [stored(_among(X, taking)) for X in (k, v)]
    with torch_threads:
        state.kept.extend(*rows, lengths=lengths)
    return y


@torch.no_grad()
def step(layer: RoPEAttention, x: Tensor, state: LayerState, active: Tensor | None) -> Tensor:
    """`RoPEAttention.step`."""
    _check_state(layer, state)
    _check_shape(x, (state.batch, layer.q_proj.in_features))
    if active is None:
        active = torch.ones(state.batch, dtype=torch.bool)
    if active.dtype != torch.bool or tuple(active.shape) != (state.batch,):
        wants = f"wants bool of shape ({state.batch},)"
        raise ValueError(f"active: got {active.dtype} of shape {tuple(active.shape)}, {wants}")
    x = torch.where(active[:, None], x, 0)
    _check_finite(x)
    if not active.any():
        return torch.zeros_like(x)
    q, k, v, _ = layer._heads(x[:, None])
    rows = [stored(X)[:, :, 0] for X in (q, k, v)]
    with torch_threads:
        o = state.kept.step(*rows, active=active.numpy())
    return torch.where(active[:, None], layer.o_proj(tensor(o, v).flatten(-2)), 0)


def without_padding(x: Tensor, key_mask: Tensor) -> Tensor:
    """x with 0 for the tokens that key_mask hides, so that nothing reads what they hold."""
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask: got {key_mask.dtype}, wants bool, True for a token that is kept")
    wants = tuple(x.shape[:-1])
    if tuple(key_mask.shape) not in (wants, (1, *wants[1:])):
        raise ValueError(f"key_mask: got shape {tuple(key_mask.shape)}, wants (batch, n) = {wants}")
    return torch.where(key_mask[..., None], x, 0)


def _among(rows: Tensor, taking: Tensor) -> Tensor:
    """The rows of the streams that are `taking` tokens, (batch,), with 0 for the others between them."""
    if taking.all():
        return rows
    found = rows.new_zeros(len(taking), *rows.shape[1:])
    found[taking] = rows
    return found


def _heads(layer: RoPEAttention) -> tuple[int, int]:
    """How many heads queries and keys have."""
    return layer.q_proj.out_features // layer.head_dim, layer.k_proj.out_features // layer.head_dim


def _form(layer: RoPEAttention) -> dict[str, Any]:
    """What says which states are a layer's."""
    return {
        "heads": _heads(layer),
        "head_dim": layer.head_dim,
        "rotary": repr(layer.rotary),
        "bound": layer.bound,
        "near": None if layer.near is None else (layer.near, layer.log_scale_near.exp().squeeze().tolist()),
        "eps": layer.eps,
        "dtype": layer.q_proj.weight.dtype,
    }


def _check_mode(layer: RoPEAttention) -> None:
    """Raise where gradients may be expected."""
    if layer.training:
        raise RuntimeError("layer: got one in training mode, wants layer.eval(): states have no gradients")


def _check_state(layer: RoPEAttention, state: Any) -> None:
    """Raise unless such a layer made the state, and no gradients are expected."""
    _check_mode(layer)
    if not isinstance(state, LayerState):
        raise TypeError(f"state: got {type(state).__name__}, wants what layer.new_state(batch) makes")
    form = _form(layer)
    differ = [f"{name}={state.form[name]}, wants {wants}" for name, wants in form.items() if state.form[name] != wants]
    if differ:
        raise ValueError(f"state: got that of a layer with {'; '.join(differ)}")


def _check_shape(x: Tensor, wants: tuple[int | None, ...]) -> None:
    """Raise unless x has this shape, None being any size."""
    if len(x.shape) != len(wants) or any(b not in (None, a) for a, b in zip(x.shape, wants, strict=True)):
        named = ", ".join("n" if size is None else str(size) for size in wants)
        raise ValueError(f"x: got shape {tuple(x.shape)}, wants ({named})")


def _check_finite(x: Tensor) -> None:
    """Raise where x, with 0 for what is not kept, has NaN or Inf."""
    if not x.isfinite().all():
        raise ValueError("x: got NaN or Inf in a token that is kept, wants finite numbers only")


def _from_the_first_kept(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """How many tokens each stream keeps, (batch,), and in which order its tokens begin with those, (batch, n).

    What `key_mask` (batch, n) keeps must be in one piece.
    """
    n = key_mask.shape[1]
    if n == 0:
        return key_mask.sum(dim=1), torch.zeros(key_mask.shape, dtype=torch.long)
    counts, first = key_mask.sum(dim=1), key_mask.int().argmax(dim=1)
    order = (torch.arange(n) + first[:, None]) % n
    if not (key_mask.gather(1, order) == (torch.arange(n) < counts[:, None])).all():
        raise ValueError("key_mask: got hidden tokens between kept ones, wants padding on either side of a stream only")
    return counts, order
