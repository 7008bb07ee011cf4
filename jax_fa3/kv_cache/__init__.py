"""Attention over a KV cache, for inference: contiguous or paged, rectangular or ragged.

`append` writes new keys and values, `dot_product_attention` reads them, `append_and_attend` does both,
and `merge` joins results for parts of the keys. It runs on XLA: there is no decoding kernel yet.
"""

from ..context_parallel import merge
from ._append import append, append_and_attend
from ._attention import dot_product_attention

__all__ = [
    "append",
    "append_and_attend",
    "dot_product_attention",
    "merge",
]
