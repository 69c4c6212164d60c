"""RoPEAttention: an attention layer whose scores may be bounded by construction."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..certificate import Certificate
from ..plan import Alternative, Plan
from ..plan import plan as make_plan
from ..problem.checks import check_flag, check_integer
from ..rotary import Rotary
from .function import scaled_dot_product_attention
from .steps import LayerState, extend, new_state, step, without_padding

# Where temperatures start: of sigmoid, so that scores are within 0.88 B. From 0, or beside a near field twice as sharp
# as the far one, a layer took far longer to recall what is far.
_TEMPERATURE = 2.0
# bound=True: the width of heads up to which a bound is taken, by which a polynomial certifies this eps at less than the
# cost of exact attention from 20,000 tokens on, heads of 64 among them.
_BOUNDS = (8, 4.0), (16, 2.0), (32, 1.0), (math.inf, 0.5)
_EPS_OF_BOUNDS = 0.1
# Tokens up to which a plan looks for the length from which the polynomial engine serves a layer.
_LONGEST = 2**17
# What a state_dict calls that which is no parameter: here the bound that temperatures are relative to.
_RECORD = "_extra_state"


class RoPEAttention(nn.Module):
    r"""Causal self-attention with rotary positions, whose scores may be bounded by construction.

    ``layer(x)`` is what the tokens x (batch, n, embed_dim) make of each other, ``layer(x, key_mask)`` with padding, and
    ``layer.plan(n)`` says, for a layer with a bound, what n tokens cost and what error is certified.

    Without `bound` it is the usual layer: scores <q, k>/sqrt(d), computed exactly. With ``bound=B``, q and k are
    normalised to length 1 and a temperature t_h = B sigmoid(.), learnt for each head, multiplies their product, so that
    \|score\| <= B whatever the weights and the data are, and `plan` knows the certificate before it sees any. The
    `near` tokens before and after a token are apart from that: there the same products have a temperature that knows no
    bound, learnt from B on, and the exact engine computes them, in one softmax with what the polynomial makes of the
    rest.

    Parameters
    ----------
    embed_dim, num_heads : int
        Width of the tokens, and query heads.
    num_kv_heads : int, optional
        Heads of keys and values, a divisor of `num_heads`, by default as many.
    head_dim : int, optional
        By default embed_dim / num_heads.
    rotary : Rotary, optional
        By default ``Rotary(head_dim)``.
    bound : float or True, optional
        B. True is what fits the width of the heads and `eps`: 4.0 up to 8 (and half of that is rotated by default),
        2.0 up to 16, 1.0 up to 32, 0.5 beyond.
    near : int or None
        w, beside a bound: scores of tokens \|j - i\| < w are scale_near t_h <q, k> / B, scale_near > 0. None or 0 is
        no near field.
    near_by_head : bool
        Whether each head learns a scale_near of its own, instead of one for all.
    causal : bool
        Token i sees the tokens j <= i.
    bias : bool
        Of the projections.
    eps : float, optional
        As in `ropecy.attention`, by default 1e-3, and 0.1 with ``bound=True``, so that the polynomial engine serves
        20,000 tokens. ``layer.plan(n)`` says whether it does, and what would let it.
    method : str, optional
        As in `ropecy.attention`, by default "auto" with a bound and "exact" without one.

    Raises
    ------
    ValueError
        Sizes that are not positive or don't fit each other, a bound that is not positive, a near field of negative
        width.

    Notes
    -----
    A state_dict holds the bound. Weights that were trained under another one do not load; those of older versions,
    which do not say, load with a warning.

    A bounded far field averages and does not retrieve: among n keys, one gets at most the share e^2B / (n - 1 + e^2B)
    of the weight, 1.3% at B = 2 and 42% at B = 4 for n = 4,096, and less where the near field's sharper scores take
    theirs first. Byte-level models of 0.85 million parameters lost 0.8 bits a byte with B = 2 in every head and 0.4
    with B = 4, against unbounded scores, without a near field; one of 64 won that back, by what it sees itself. Exact
    attention is the default for that reason.

    Examples
    --------
    >>> layer = RoPEAttention(32, 4, bound=1.0)
    >>> layer(torch.ones(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    >>> layer.plan(100_000).engine
    'polynomial'
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary: Rotary | None = None,
        bound: float | bool | None = None,
        near: int | None = 64,
        near_by_head: bool = False,
        causal: bool = True,
        bias: bool = False,
        eps: float | None = None,
        method: str | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads, head_dim = _sizes(embed_dim, num_heads, num_kv_heads, head_dim)
        if rotary is not None and rotary.d != head_dim:
            raise ValueError(f"rotary: got a Rotary of width {rotary.d}, wants head_dim = {head_dim}")
        if eps is None:
            eps = _EPS_OF_BOUNDS if bound is True else 1e-3
        if bound is True:
            bound = _bound_for(head_dim)
            if rotary is None and head_dim <= 8:
                rotary = Rotary(head_dim, rotary_dim=max(2, head_dim // 4 * 2))
        if bound is not None and not bound > 0:
            raise ValueError(f"bound: got {bound}, wants a positive number")
        if near is not None:
            near = check_integer("near", near, least=0)
        near_by_head = check_flag("near_by_head", near_by_head)
        self.head_dim = head_dim
        self.rotary = Rotary(head_dim) if rotary is None else rotary
        self.bound = bound
        self.near = None if bound is None else near or None
        self.near_by_head = near_by_head
        self.causal = causal
        self.eps = eps
        self.method = method or ("exact" if bound is None else "auto")
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias)
        if bound is None:
            self.register_parameter("temperature", None)
        else:
            self.temperature = nn.Parameter(torch.empty(num_heads, 1, 1))
        if self.near is None:
            self.register_parameter("log_scale_near", None)
        else:
            # With an axis, by which parameters are sharded.
            self.log_scale_near = nn.Parameter(torch.empty(num_heads if near_by_head else 1))
        self._reset_scales()
        # An attention factor a multiplies rotated coordinates on both sides: R_0 has a^2 there.
        self._gain = max(1.0, float(self.rotary[0].max()))

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as a new layer has them: of use after ``layer.to_empty``."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            projection.reset_parameters()
        self._reset_scales()

    def _reset_scales(self) -> None:
        with torch.no_grad():
            if self.temperature is not None:
                self.temperature.fill_(_TEMPERATURE)
            if self.log_scale_near is not None:
                self.log_scale_near.fill_(math.log(self.bound))

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        return_certificate: bool = False,
    ) -> Tensor | tuple[Tensor, Certificate]:
        """Attention of the tokens x (batch, n, embed_dim) among themselves.

        Parameters
        ----------
        x : (batch, n, embed_dim) tensor
        key_mask : (batch, n) bool tensor, optional
            True for tokens that are kept. Others are padding: whatever they hold, NaN among it, they are read as 0,
            reach no other token, and have gradient 0. What comes out at their places means nothing.
        positions : (n,) or (batch, n) integer tensor, optional
            What the rotations go by, by default 0 to n - 1, or from 0 on in each document of `lengths`.
            Positions do not say which tokens see each other: where they start again, tokens still attend to those
            before.
        lengths : (s,) integers, optional
            Rows are documents packed side by side, of these lengths in every row of the batch, each of which sees
            itself alone. Documents of unlike batches go into one row, ``x.flatten(0, 1)[None]``.
        return_certificate : bool
            Return the certificate too: of attention's result, before the output projection.

        Returns
        -------
        y : (batch, n, embed_dim) tensor
        certificate : ropecy.certificate.Certificate
            If `return_certificate`.

        Raises
        ------
        TypeError, ValueError
            A key_mask that is not bool, or of another shape; NaN or Inf in a token that is kept.
        """
        if key_mask is not None:
            x = without_padding(x, key_mask)
        q, k, v, scale = self._heads(x)
        if positions is not None and positions.dim() == 2:
            positions = positions[:, None]
        try:
            attended = scaled_dot_product_attention(
                q,
                k,
                v,
                None if key_mask is None else key_mask[:, None, None],
                is_causal=self.causal,
                scale=scale,
                near=None if self.near is None else (self.near, self.log_scale_near.exp().squeeze()),
                enable_gqa=True,
                rotary=self.rotary,
                q_positions=positions,
                k_positions=positions,
                lengths=lengths,
                eps=self.eps,
                method=self.method,
                return_certificate=return_certificate,
            )
        except ValueError:
            if not x.isfinite().all():
                # Attention names q, k or v, of which the caller knows nothing.
                raise ValueError("x: got NaN or Inf in a token that is kept, wants finite numbers only") from None
            raise
        o, certificate = attended if return_certificate else (attended, None)
        y = self.o_proj(o.transpose(-3, -2).flatten(-2))
        return (y, certificate) if return_certificate else y

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, float | None]:
        """q, k, v (batch, heads, n, head_dim) before rotation, and the scale of scores, None for PyTorch's."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.bound is None:
            return q, k, v, None
        # Autocast computes norms in float32, and what is attended has one dtype.
        q = (nn.functional.normalize(q, dim=-1) * torch.sigmoid(self.temperature)).to(v.dtype)
        return q, nn.functional.normalize(k, dim=-1).to(v.dtype), v, self.bound / self._gain

    # ---- a token at a time ----

    def new_state(self, batch: int) -> LayerState:
        """A state without tokens for so many streams, which `extend` and `step` fill.

        Parameters
        ----------
        batch : int

        Returns
        -------
        LayerState
            Its `lengths`, `nbytes`, `certificate`, ``reset(streams)`` and ``select(streams)`` are those of
            `ropecy.DecodeState`, which is inside where the layer has a bound: a stream then takes the same number of
            bytes at any length. Without a bound it keeps all keys and values, and steps are exact.

        Raises
        ------
        ValueError
            The layer is not causal, `batch` is not positive, or angles of its rotary depend on the length.
        RuntimeError
            The layer is in training mode: steps have no gradients.
        BoundedEntryError
            No degree certifies `eps` under the bound.

        Notes
        -----
        The temperatures of the near field are those of this moment.

        Examples
        --------
        >>> layer = RoPEAttention(32, 4, bound=1.0).eval()
        >>> x, state = torch.ones(2, 10, 32), layer.new_state(2)
        >>> y = layer.extend(x[:, :9], state)
        >>> torch.allclose(layer.step(x[:, 9], state), layer(x)[:, 9], atol=1e-3)
        True
        """
        return new_state(self, batch)

    def extend(self, x: Tensor, state: LayerState, key_mask: Tensor | None = None) -> Tensor:
        """Attention of the tokens x (batch, n, embed_dim), which come after those of the state, and join them.

        Parameters
        ----------
        x : (batch, n, embed_dim) tensor
        state : LayerState
        key_mask : (batch, n) bool tensor, optional
            True for tokens that are kept. What a stream keeps must be in one piece; a stream that keeps none is left
            as it is.

        Returns
        -------
        (batch, n, embed_dim) tensor
            Where none of the streams that take tokens has any yet, that of ``layer(x, key_mask)``, in its time; else
            tokens go one by one. It is 0 for streams that keep none.

        Raises
        ------
        TypeError, ValueError
            Shapes or dtypes that don't fit, NaN or Inf in a token that is kept, a state of another layer.
        RuntimeError
            The layer is in training mode.
        """
        return extend(self, x, state, key_mask)

    def step(self, x: Tensor, state: LayerState, *, active: Tensor | None = None) -> Tensor:
        """Attention of one token of each stream, x (batch, embed_dim), which joins those of the state.

        Parameters
        ----------
        x : (batch, embed_dim) tensor
        state : LayerState
        active : (batch,) bool tensor, optional
            Which streams have a token. Rows of others are not read, and come out as 0.

        Returns
        -------
        (batch, embed_dim) tensor
            What ``layer`` makes of the last of all tokens, within the certificates of both.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As in `extend`.

        Notes
        -----
        With a bound, time and memory do not depend on how many tokens there have been.
        """
        return step(self, x, state, active)

    def plan(self, n: int) -> Plan:
        """The plan of one head, with certificates of forward and backward that hold for every input of n tokens.

        It is that of scores which attain the bound, in float32, and of values no larger than their range; rounding in
        the near field goes by what its largest temperature is now. Where it is exact, ``plan.advice`` says what would
        let the polynomial engine in: more tokens, a larger eps, a smaller bound, narrower heads.

        Raises
        ------
        ValueError
            The layer has no bound.
        BoundedEntryError
            `method` can't certify eps under this bound.
        """
        if self.bound is None:
            raise ValueError("bound: got None, wants the layer made with a bound, for a plan without data")
        made = self._plan(n)
        if made.engine == "exact" and self.method == "auto":
            made = replace(made, advice=tuple(self._what_would_help(n)))
        return made

    def _plan(
        self, n: int, *, bound: float | None = None, eps: float | None = None, head_dim: int | None = None
    ) -> Plan:
        """That of one head of this layer, or of one that differs from it in what is given."""
        bound = bound or self.bound
        rows = np.zeros((n, head_dim or self.head_dim), np.float32)
        rows[:, 0] = np.where(np.arange(n) % 2, -1, 1)
        options = {"scale": bound, "causal": self.causal, "eps": eps or self.eps, "method": self.method}
        if self.near is not None:
            options["near"] = self.near, self._gain * self.log_scale_near.exp().max().item()
        return make_plan(rows, rows, np.maximum(rows, 0), grad=True, threads=torch.get_num_threads(), **options)

    def _what_would_help(self, n: int) -> Iterator[Alternative]:
        """Of each kind of change the least by which the polynomial engine serves the layer."""
        widths = [(self.head_dim >> i, 2**i) for i in (1, 2, 3) if self.head_dim >> i >= 2]
        pair = {"bound": _bound_for(self.head_dim), "eps": _EPS_OF_BOUNDS}
        kinds = [
            [(f"{n << i:,} tokens", {"n": n << i}, 1) for i in range(1, 18) if n << i <= _LONGEST],
            [(f"bound={pair['bound']:g} and eps={pair['eps']:g}, as bound=True has them", pair, 1)],
            [(f"eps={eps:g}", {"eps": eps}, 1) for eps in (0.003, 0.01, 0.03, 0.1, 0.3) if eps > self.eps],
            [(f"bound={self.bound / 2**i:g}", {"bound": self.bound / 2**i}, 1) for i in range(1, 7)],
            [(f"head_dim={width}, {k} times as many heads", {"head_dim": width}, k) for width, k in widths],
        ]
        for kind in kinds:
            for name, change, heads in kind:
                made = self._plan(**{"n": n, **change})
                if made.engine == "polynomial":
                    seconds, size = (heads * each["polynomial"] for each in (made.seconds, made.bytes))
                    yield Alternative(name, made.certificate, seconds, size)
                    break

    def get_extra_state(self) -> Tensor:
        """What a state_dict holds beside parameters: the bound, inf for none, by which temperatures have a meaning."""
        return torch.tensor(math.inf if self.bound is None else self.bound, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: the layer keeps the bound it was made with, and `load_state_dict` refuses another."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *found: list[str]
    ) -> None:
        *_, errors = found
        own = self.get_extra_state()
        scale_near, here = state_dict.get(prefix + "log_scale_near"), self.log_scale_near
        if None not in (scale_near, here) and scale_near.numel() == 1 and scale_near.shape != here.shape:
            # One for all heads where each has its own, or as it was before it had an axis.
            state_dict[prefix + "log_scale_near"] = scale_near.reshape(1).expand(here.shape)
        if prefix + _RECORD not in state_dict and self.bound is not None:
            warnings.warn(
                f"bound: the weights of {prefix or 'the layer'} do not say which bound they were trained under; this "
                f"layer has bound={self.bound:g}",
                stacklevel=2,
            )
        held = state_dict.setdefault(prefix + _RECORD, own)
        # Whoever casts or averages a state_dict rounds it.
        if not (held.is_meta or torch.isclose(held.double(), own, rtol=4 * torch.finfo(held.dtype).eps, atol=0)):
            bound = None if math.isinf(held) else held.item()
            errors.append(
                f"bound: the weights of {prefix or 'the layer'} were trained with bound={bound}, this layer has "
                f"bound={self.bound}, under which they are another function; wants a layer made with bound={bound}"
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *found)

    def extra_repr(self) -> str:
        """What PyTorch prints of the layer beside its parts."""
        return (
            f"rotary={self.rotary}, bound={self.bound}, near={self.near}, near_by_head={self.near_by_head}, "
            f"causal={self.causal}, eps={self.eps}, method={self.method!r}"
        )


def _sizes(embed_dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """num_kv_heads and head_dim, checked, or what they are where they are None."""
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}: got {size}, wants at least 1")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: got {num_kv_heads}, wants a divisor of num_heads = {num_heads}")
    if head_dim is None:
        if embed_dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, wants a divisor of embed_dim = {embed_dim}, or head_dim")
        head_dim = embed_dim // num_heads
    return num_kv_heads, head_dim


def _bound_for(head_dim: int) -> float:
    """The bound that ``bound=True`` is for heads of this width."""
    return next(bound for width, bound in _BOUNDS if head_dim <= width)
