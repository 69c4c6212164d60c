"""RoPEAttention: an attention layer whose scores may be bounded by construction."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from .. import plan as make_plan
from ..plan import Plan
from ..rotary import Rotary
from .function import scaled_dot_product_attention

# Where temperatures start: of sigmoid, so that scores are within 0.88 B. From 0, or beside a near field twice as sharp
# as the far one, a layer took far longer to recall what is far.
_TEMPERATURE = 2.0


class RoPEAttention(nn.Module):
    r"""Causal self-attention with rotary positions, whose scores may be bounded by construction.

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
        B. True is 2.0, and for heads of width 8 or less 4.0 with half of that rotated by default: what was tried.
    near : int or None
        w, beside a bound: scores of tokens \|j - i\| < w are scale_near t_h <q, k> / B, scale_near > 0. None or 0 is
        no near field.
    causal : bool
        Token i sees the tokens j <= i.
    bias : bool
        Of the projections.
    eps : float
        As in `ropecy.attention`.
    method : str, optional
        As in `ropecy.attention`, by default "auto" with a bound and "exact" without one.

    Raises
    ------
    ValueError
        Sizes that don't fit each other, a bound that is not positive, a near field of negative width.

    Notes
    -----
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
        causal: bool = True,
        bias: bool = False,
        eps: float = 1e-3,
        method: str | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: got {num_kv_heads}, wants a divisor of num_heads = {num_heads}")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(f"num_heads: got {num_heads}, wants a divisor of embed_dim = {embed_dim}, or head_dim")
            head_dim = embed_dim // num_heads
        if rotary is not None and rotary.d != head_dim:
            raise ValueError(f"rotary: got a Rotary of width {rotary.d}, wants head_dim = {head_dim}")
        if bound is True:
            bound = 4.0 if head_dim <= 8 else 2.0
            if rotary is None and head_dim <= 8:
                rotary = Rotary(head_dim, rotary_dim=max(2, head_dim // 4 * 2))
        if bound is not None and not bound > 0:
            raise ValueError(f"bound: got {bound}, wants a positive number")
        if near is not None and near < 0:
            raise ValueError(f"near: got {near}, wants a number of tokens, or None")
        self.head_dim = head_dim
        self.rotary = Rotary(head_dim) if rotary is None else rotary
        self.bound = bound
        self.near = None if bound is None else near or None
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
            self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), _TEMPERATURE))
        if self.near is None:
            self.register_parameter("log_scale_near", None)
        else:
            self.log_scale_near = nn.Parameter(torch.tensor(math.log(bound)))
        # An attention factor a multiplies rotated coordinates on both sides: R_0 has a^2 there.
        self._gain = max(1.0, float(self.rotary[0].max()))

    def forward(self, x: Tensor, key_mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Attention of the tokens x (batch, n, embed_dim) among themselves.

        Parameters
        ----------
        x : (batch, n, embed_dim) tensor
        key_mask : (batch, n) bool tensor, optional
            True for tokens that are kept.
        positions : (n,) or (batch, n) integer tensor, optional
            By default 0 to n - 1.

        Returns
        -------
        (batch, n, embed_dim) tensor
        """
        q, k, v, scale = self._heads(x)
        if positions is not None and positions.dim() == 2:
            positions = positions[:, None]
        o = scaled_dot_product_attention(
            q,
            k,
            v,
            None if key_mask is None else key_mask[:, None, None],
            is_causal=self.causal,
            scale=scale,
            near=None if self.near is None else (self.near, self.log_scale_near.exp()),
            enable_gqa=True,
            rotary=self.rotary,
            q_positions=positions,
            k_positions=positions,
            eps=self.eps,
            method=self.method,
        )
        return self.o_proj(o.transpose(-3, -2).flatten(-2))

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

    def plan(self, n: int) -> Plan:
        """The plan of one head, with certificates of forward and backward that hold for every input of n tokens.

        It is that of scores which attain the bound, in float32, and of values no larger than their range; rounding in
        the near field goes by what its temperature is now.

        Raises
        ------
        ValueError
            The layer has no bound.
        BoundedEntryError
            `method` can't certify eps under this bound.
        """
        if self.bound is None:
            raise ValueError("bound: got None, wants the layer made with a bound, for a plan without data")
        rows = np.zeros((n, self.head_dim), np.float32)
        rows[:, 0] = np.where(np.arange(n) % 2, -1, 1)
        options = {"scale": self.bound, "causal": self.causal, "eps": self.eps, "method": self.method}
        if self.near is not None:
            options["near"] = self.near, self._gain * self.log_scale_near.exp().item()
        return make_plan(rows, rows, np.maximum(rows, 0), grad=True, threads=torch.get_num_threads(), **options)

    def extra_repr(self) -> str:
        """What PyTorch prints of the layer beside its parts."""
        return (
            f"rotary={self.rotary}, bound={self.bound}, near={self.near}, causal={self.causal}, eps={self.eps}, "
            f"method={self.method!r}"
        )
