"""New keys and values into a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from .. import _dispatch, _guards
from .. import _sharding as _devices
from .._checks import Integers, array, check_floating, static_bool, wrong
from .._jitted import jitted
from .._problem import E4M3, Implementation, Implementations
from . import _append_kernel
from ._arguments import (
    checked_call,
    checked_heads,
    checked_rows,
    checked_scale,
    per_row,
)
from ._layout import KvLayout, Layout
from ._rotary import Tables
from ._sharding import Letters, checked_sharding
from ._write import Config, Operands


def append(
    key_cache: ArrayLike,
    value_cache: ArrayLike | None,
    key: ArrayLike,
    value: ArrayLike,
    key_value_seq_lengths: Integers,
    *,
    query: ArrayLike | None = None,
    positions: Integers | None = None,
    rotary_cos: ArrayLike | None = None,
    rotary_sin: ArrayLike | None = None,
    rotary_interleaved: bool = False,
    page_table: Integers | None = None,
    cache_rows: Integers | None = None,
    query_starts: Integers | None = None,
    num_sequences: Integers | None = None,
    key_scale: ArrayLike | None = None,
    value_scale: ArrayLike | None = None,
    kv_layout: KvLayout | Layout = "NHD",
    implementation: Implementations | None = None,
    sharding: NamedSharding | PartitionSpec | None = None,
) -> tuple[Any, ...]:
    """The caches with the rows of key and value as the last ones of their sequences.

    It writes in place where the caller gives the caches away: jax.jit's donate_argnums, and the carry
    of a loop. What makes XLA copy them all the same is in docs/kv_cache.md.

    Args:
        key, value: [B, T, K, H] and [B, T, K, V], or ragged [rows, K, H] and [rows, K, V]. Of the
            caches' dtype; of any floating dtype of 16 bits or more where that is float8_e4m3fn. What
            is float8_e4m3fn already is written as it is, whatever the scales.
        key_value_seq_lengths: int32 [B], with the new rows: row i of a sequence with q new ones goes
            to position length - q + i. Rows at negative positions are not written.
        query: to be rotated as key is: [B, T, N, H] or [rows, N, H].
        positions: int32 [B, T] or [rows], of the rotation; default the rows' positions in the cache.
            For what is below 0 the tables' first row stands.
        rotary_cos, rotary_sin: floating [L, r / 2]: for each position the cosines and sines of the
            angles by which the first r dims of query and key are turned (Su et al., arXiv
            2104.09864), in fp32, rounded once.
        rotary_interleaved: static: a pair is dims 2i and 2i + 1. False: i and i + r / 2.
        key_scale, value_scale: what is written is divided by them, and saturates at e4m3's +-448.
            Those per token and head must be there already; `append` writes them as it does keys, for
            they are a cache with H = V = 1.
        The others: as in `dot_product_attention`; what the kernel takes is in docs/kv_cache.md.

    Returns:
        key_cache and value_cache (None where one buffer holds both), and with query a third one:
        query rotated, NaN in sequences of a mistake.

    Whatever the masks of the attention, all rows are written. Padding is not, and neither is any row
    of a sequence with a mistake: those of `dot_product_attention`, and positions beyond rotary_cos.

    Raises as `dot_product_attention`.
    """
    given = locals()  # the arguments by their names
    wanted = _dispatch.checked_implementation(implementation)
    call = checked(given)
    chosen = _dispatch.choose(wanted, call.refused, stacklevel=2)
    found = _append(chosen, call.config, call.letters, sharding, call.key, call.operands)
    count = len(call.operands.caches)
    return *as_two(found[:count]), *found[count:]


class Checked(NamedTuple):
    config: Config
    letters: Any  # of key, and of operands
    key: Array
    operands: Operands
    refused: str | None  # why the kernel cannot take it


def checked(given: Mapping[str, Any]) -> Checked:
    """The arguments of `append`, by their names."""
    x = checked_rows("key", given["key"], "K, H", e4m3=True)
    call = checked_call("key", x, given)
    layout = call.layout
    if x.shape[-2] != layout.num_kv_heads:
        raise wrong("key", f"{x.shape[-2]} heads", f"the {layout.num_kv_heads} that the cache has")
    v = array("value", given["value"])
    if v.shape != (*x.shape[:-1], layout.head_dim_v):
        wanted = f"{(*x.shape[:-1], layout.head_dim_v)}, to go with key and the cache"
        raise wrong("value", f"shape {v.shape}", wanted)
    if v.dtype != x.dtype:
        raise wrong("value", f"dtype {v.dtype}", f"{x.dtype}, as key has")
    query, positions = given["query"], given["positions"]
    q = None if query is None else checked_rows("query", query, "N, H")
    if q is not None:
        if q.shape[:-2] != x.shape[:-2] or q.shape[-1] != x.shape[-1]:
            wanted = f"the rows and the head dim of key, {x.shape}"
            raise wrong("query", f"shape {q.shape}", wanted)
        checked_heads(q, call)
    at = per_row("positions", positions, call, or_sequence=False)
    tables = _tables(given["rotary_cos"], given["rotary_sin"], x.shape[-1])
    if tables is not None and x.dtype == E4M3:
        wanted = "16 bits or more, to be rotated, or no rotary_cos and rotary_sin"
        raise wrong("key", f"dtype {x.dtype}", wanted)
    if tables is None:
        for name in ("positions", "query"):
            if given[name] is not None:
                raise wrong(name, "an array", "None, as there are no rotary_cos and rotary_sin")
    scales = [checked_scale(name, given[name], call) for name in ("key_scale", "value_scale")]
    letters = Letters(call, checked_sharding(given["sharding"], x, call))
    of_operands = Operands._make(
        [
            letters.rows("k"),
            letters.caches,
            letters.where,
            None if q is None else letters.rows("n"),
            letters.per_row(at),
            None if tables is None else Tables._make(["..", ".."]),
            *map(letters.scale, scales),
        ]
    )
    config = Config(layout, static_bool("rotary_interleaved", given["rotary_interleaved"]))
    operands = Operands(v, call.caches, call.where, q, at, tables, *scales)
    arrays = (x, *operands.caches)
    refused = _append_kernel.refusal(x, operands) or _dispatch.refusal_of_devices(arrays)
    return Checked(config, (letters.rows("k"), of_operands), x, operands, refused)


def _tables(cos: Any, sin: Any, head_dim: int) -> Tables | None:
    if cos is None and sin is None:
        return None
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if x is None:
            raise wrong(name, None, "both rotary_cos and rotary_sin, or neither")
    cos, sin = array("rotary_cos", cos), array("rotary_sin", sin)
    check_floating("rotary_cos", cos)
    check_floating("rotary_sin", sin)
    if cos.ndim != 2 or not cos.shape[0] or 2 * cos.shape[1] > head_dim:
        wanted = f"(positions, at most {head_dim // 2}): half of the dims that are rotated"
        raise wrong("rotary_cos", f"shape {cos.shape}", wanted)
    if sin.shape != cos.shape:
        raise wrong("rotary_sin", f"shape {sin.shape}", f"{cos.shape}, as rotary_cos has")
    return Tables(cos, sin)


def as_two(caches: tuple[Array, ...]) -> tuple[Array, Array | None]:
    """key_cache and value_cache."""
    return caches[0], caches[1] if len(caches) == 2 else None


@jitted(static=4)
def _append(
    implementation: Implementation | None,
    config: Config,
    letters: Any,
    sharding: Any,
    key: Array,
    operands: Operands,
) -> tuple[Array, ...]:
    key, operands = jax.tree.map(_guards.cached, (key, operands))

    def local(key: Array, operands: Operands) -> tuple[Array, ...]:
        own = config.layout.with_heads(key.shape[-2])
        replaced = dataclasses.replace(config, layout=own)
        return _append_kernel.append(implementation, replaced, letters, key, operands)

    of_operands = letters[1]
    results = *of_operands.caches, *(() if of_operands.query is None else (of_operands.query,))
    return _devices.over_named_axes(local, letters, results, sharding)(key, operands)
