"""Attention over a KV cache, for inference: contiguous or paged, rectangular or ragged.

`append` writes new keys and values, `dot_product_attention` reads them, `append_and_attend` does both,
and `merge` joins results for parts of the keys. The names that begin with ragged_paged_attention are
those that engines for TPUs call.
"""

from ..context_parallel import merge
from ._append import append
from ._append_and_attend import append_and_attend
from ._attention import dot_product_attention
from ._ragged_paged import (
    ragged_paged_attention,
    ragged_paged_attention_hd64,
    ragged_paged_attention_v2,
)
from ._ragged_paged_call import get_kv_cache_shape, get_kv_cache_shape_hd64

__all__ = [
    "append",
    "append_and_attend",
    "dot_product_attention",
    "get_kv_cache_shape",
    "get_kv_cache_shape_hd64",
    "merge",
    "ragged_paged_attention",
    "ragged_paged_attention_hd64",
    "ragged_paged_attention_v2",
]
