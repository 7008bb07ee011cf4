"""Attention over a sequence that is split over the devices of one mesh axis.

`dot_product_attention` does it inside jax.shard_map, or over a NamedSharding; one file per strategy.
`merge` joins the results for parts of the keys. The zigzag order, in which every device has as much
work under a causal mask as the others: `to_zigzag`, `from_zigzag`, `zigzag_positions`.
"""

from ._attention import dot_product_attention
from ._layout import from_zigzag, to_zigzag, zigzag_positions
from ._merge import merge

__all__ = [
    "dot_product_attention",
    "from_zigzag",
    "merge",
    "to_zigzag",
    "zigzag_positions",
]
