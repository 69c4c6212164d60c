"""PyTorch: scaled_dot_product_attention, varlen_attn and an attention layer, on CPU tensors without copies.

Forward and backward are each a custom operator of torch.library, ``ropecy::attention`` and
``ropecy::attention_backward``, so autograd, torch.compile and vmap see them; ``ropecy::varlen_attention`` and its
backward are those of sequences that lie side by side. Derivatives are of first order only.
"""

from .function import scaled_dot_product_attention
from .layer import RoPEAttention
from .varlen import varlen_attn

__all__ = ["RoPEAttention", "scaled_dot_product_attention", "varlen_attn"]
