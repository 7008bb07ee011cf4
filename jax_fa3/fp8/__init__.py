"""Attention in FP8 (e4m3), forward: FlashAttention-3's third part (arXiv 2407.08608, section 3.3).

`dot_product_attention` takes 16-bit arrays: it makes query and key incoherent (`hadamard_transform`),
quantizes all three in blocks of `BLOCK` rows (`quantize`) and attends to the result
(`quantized_dot_product_attention`, which also takes e4m3 arrays from elsewhere). On Hopper GPUs each
step is a kernel; everywhere else the same values are computed in plain JAX, in fp32.
"""

from ._attention import dot_product_attention
from ._hadamard import hadamard_transform, random_signs
from ._means import token_mean
from ._quantize import BLOCK, quantize
from ._quantized_attention import quantized_dot_product_attention

__all__ = [
    "BLOCK",
    "dot_product_attention",
    "hadamard_transform",
    "quantize",
    "quantized_dot_product_attention",
    "random_signs",
    "token_mean",
]
