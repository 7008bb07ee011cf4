"""Query, key and value of the public functions, checked: dtypes, shapes and heads."""

from __future__ import annotations

from jax.typing import ArrayLike

from ._checks import array, check_floating, natural, wrong
from ._operands import Operands
from ._problem import Sizes


def separate(query: ArrayLike, key: ArrayLike, value: ArrayLike) -> tuple[Operands, bool]:
    """Query, key and value with a batch axis, and whether they had that axis."""
    q, k, v = array("query", query), array("key", key), array("value", value)
    if q.ndim not in (3, 4):
        raise wrong("query", f"shape {q.shape}", "(B, T, N, H), or (T, N, H)")
    check_floating("query", q)
    for name, x in (("key", k), ("value", v)):
        if x.ndim != q.ndim:
            raise wrong(name, f"shape {x.shape}", f"rank {q.ndim}, as query {q.shape} has")
        check_floating(name, x)
    *entries, _, _, head_dim = q.shape
    if [*k.shape[:-3], k.shape[-1]] != [*entries, head_dim]:
        shape = ", ".join(map(str, [*entries, "S", "K", head_dim]))
        raise wrong("key", f"shape {k.shape}", f"({shape}) to go with query {q.shape}")
    if v.shape[:-1] != k.shape[:-1]:
        shape = ", ".join(map(str, [*k.shape[:-1], "V"]))
        raise wrong("value", f"shape {v.shape}", f"({shape}) to go with key {k.shape}")
    batched = q.ndim == 4
    if not batched:
        q, k, v = q[None], k[None], v[None]
    found = Operands(q, k, v)
    _check_heads("query", found.sizes)
    return found, batched


def packed(qkv: ArrayLike, num_kv_heads: int | None) -> tuple[Operands, bool]:
    """qkv as [B, T, 3, N, H] or [B, T, N + 2K, H], and whether it had a batch axis."""
    x = array("qkv", qkv)
    check_floating("qkv", x)
    if num_kv_heads is None:
        if x.ndim not in (4, 5) or x.shape[-3] != 3:
            wanted = "(B, T, 3, N, H), or (T, 3, N, H), as num_kv_heads is None"
            raise wrong("qkv", f"shape {x.shape}", wanted)
        batched = x.ndim == 5
        num_heads = num_kv_heads = x.shape[-2]
    elif x.ndim not in (3, 4):
        wanted = "(B, T, N + 2K, H), or (T, N + 2K, H), as num_kv_heads is given"
        raise wrong("qkv", f"shape {x.shape}", wanted)
    else:
        num_kv_heads = natural("num_kv_heads", num_kv_heads)
        batched, heads = x.ndim == 4, x.shape[-2]
        num_heads = heads - 2 * num_kv_heads
        if num_heads < 0:
            raise wrong("qkv", f"{heads} heads", f"at least 2 * num_kv_heads = {2 * num_kv_heads}")
    found = Operands(x if batched else x[None], packed=(num_heads, num_kv_heads))
    _check_heads("qkv", found.sizes)
    return found, batched


def _check_heads(name: str, sizes: Sizes) -> None:
    heads, kv_heads = sizes.num_heads, sizes.num_kv_heads
    if heads % kv_heads if kv_heads else heads:
        raise wrong(name, f"{heads} query heads", f"a multiple of the {kv_heads} key/value heads")
    if not (sizes.head_dim and sizes.head_dim_v):
        raise wrong(name, f"head dims {sizes.head_dim}, {sizes.head_dim_v}", "at least 1")
