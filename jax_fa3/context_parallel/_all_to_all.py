"""DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509): all-to-all exchanges turn a part of the
sequence with all heads into the whole sequence with a part of the heads, and back."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from .. import _mask
from .._autodiff import Attention, Method, differentiable
from .._checks import wrong
from .._operands import Operands
from .._problem import Masks, SegmentIds
from ._layout import Layout


@dataclasses.dataclass(frozen=True)
class AllToAll(Method):
    """Of one device's operands, by the masks of the whole sequence, whose arrays [B, T] are of this
    device's rows; `more` is the segment ids, or None. It has JAX's derivative."""

    layout: Layout

    def __call__(
        self, operands: Operands, masks: Masks, more: SegmentIds | None = None
    ) -> tuple[Array, ...]:
        layout, (query, key, value) = self.layout, operands.split()
        copies = copies_of_kv_heads(layout, query.shape[2], key.shape[2])
        whole = [
            layout.natural(lax.all_to_all(x, layout.axis_name, 2, 1, tiled=True))
            for x in (query, jnp.repeat(key, copies, axis=2), jnp.repeat(value, copies, axis=2))
        ]
        begin, end = (
            None if x is None else layout.gather(x) for x in (masks.key_begin, masks.key_end)
        )
        masks = masks._replace(key_begin=begin, key_end=end)
        if more is not None:
            ids = jax.tree.map(layout.gather, more)
            masks = _mask.with_segments(masks, ids, self.implementation)
        method = Attention(self.implementation, self.config)
        out, lse = differentiable(method, Operands(*whole), masks)
        out, lse = (
            lax.all_to_all(layout.laid_out(x), layout.axis_name, 1, 2, tiled=True)
            for x in (out, jnp.swapaxes(lse, 1, 2))
        )
        return out, jnp.swapaxes(lse, 1, 2)


def copies_of_kv_heads(layout: Layout, num_heads: int, num_kv_heads: int) -> int:
    """How often each key/value head is sent, so that every device has the heads that its queries
    read: more than once where the axis does not divide them. Raises ValueError if nothing fits."""
    copies = layout.size // math.gcd(num_kv_heads, layout.size)
    if num_kv_heads and num_heads % (num_kv_heads * copies):
        raise wrong(
            "strategy",
            f"'all_to_all' with {num_heads} query and {num_kv_heads} key/value heads over the "
            f"{layout.size} devices of axis {layout.axis_name!r}",
            f"a multiple of {num_kv_heads * copies} query heads, or another strategy",
        )
    return copies
