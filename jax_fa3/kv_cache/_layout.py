"""Where in a cache the numbers of one position stand, for each kv_layout.

All caches are pages here: a contiguous one, [R, S, ...], is R pages of S positions, of which each
sequence has one. Numbers are addressed where they are, at the rank that the cache has: anything that
moved or reshaped it could make XLA copy it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import numpy as np
from jax import Array

KvLayout = Literal["NHD", "HND", "interleaved", "lanes"]
LAYOUTS: tuple[str, ...] = get_args(KvLayout)
KEY, VALUE = 0, 1

Caches = tuple[Array, ...]  # (key_cache, value_cache), or the one buffer of both


@dataclasses.dataclass(frozen=True)
class Layout:
    """
    NHD           [P, page, K, H] and [P, page, K, V]
    HND           [P, K, page, H] and [P, K, page, V]
    interleaved   [P, page, 2K, H]: of head i the key is 2i and the value 2i + 1
    lanes         [P, page, K, H + V]: the value stands behind the key

    In the last two the heads may be two axes, of which the one in front counts slower, and there may
    be more heads and a longer last axis than it takes: padding.
    """

    kind: KvLayout
    num_kv_heads: int
    head_dim: int
    head_dim_v: int

    @property
    def buffers(self) -> int:
        return 2 if self.kind in ("NHD", "HND") else 1

    def with_heads(self, num_kv_heads: int) -> Layout:
        """On a device that has so many of them."""
        return dataclasses.replace(self, num_kv_heads=num_kv_heads)

    def page_size(self, caches: Caches) -> int:
        return caches[0].shape[2 if self.kind == "HND" else 1]

    def read(self, caches: Caches, which: int, pages: Array, slots: Array) -> Array:
        """Keys (KEY) or values (VALUE) [..., K, D] of the positions at pages and slots [...]."""
        return self._at(caches, which, pages, slots).get(mode="clip")

    def write(self, caches: Caches, which: int, pages: Array, slots: Array, rows: Array) -> Caches:
        """The caches with rows [..., K, D] there; those whose page does not exist are left out."""
        written = self._at(caches, which, pages, slots).set(rows, mode="drop")
        return tuple(written if i == which % len(caches) else x for i, x in enumerate(caches))

    def read_per_token(self, scale: Array, pages: Array, slots: Array) -> Array:
        """Of scales in pages, [P, page, K] or HND's [P, K, page], with or without an axis of size 1
        behind: [..., K]."""
        scale = scale[..., 0] if scale.ndim == 4 else scale
        return scale.at[self._index(pages, slots, (np.arange(self.num_kv_heads),))].get(mode="clip")

    def _at(self, caches: Caches, which: int, pages: Array, slots: Array) -> Any:
        cache = caches[which % len(caches)]
        heads = np.arange(self.num_kv_heads)
        axes = (heads,)
        if self.kind == "interleaved":
            heads = 2 * heads + which
        if self.buffers == 1:
            axes = np.unravel_index(heads, cache.shape[2:-1])
        first = self.head_dim if self.kind == "lanes" and which == VALUE else 0
        columns = slice(first, first + (self.head_dim, self.head_dim_v)[which])
        return cache.at[(*self._index(pages, slots, axes), columns)]

    def _index(self, pages: Array, slots: Array, heads: tuple[np.ndarray, ...]) -> tuple[Any, ...]:
        """Indices of a cache's axes but the last, that broadcast to [..., K]."""
        heads = tuple(x.astype(np.int32).reshape(*[1] * pages.ndim, -1) for x in heads)
        pages, slots = pages[..., None], slots[..., None]
        return (pages, *heads, slots) if self.kind == "HND" else (pages, slots, *heads)
