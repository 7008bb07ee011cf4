"""Attention over a cache. The docstring of dot_product_attention defines the semantics."""

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
from .._checks import Integers, natural, static_bool, wrong
from .._jitted import jitted
from .._problem import Implementation, Implementations, Window, fold_window
from .._values import per_head, soft_cap, window_size
from . import _kernel
from ._arguments import (
    checked_call,
    checked_heads,
    checked_rows,
    checked_scale,
    checked_score_scale,
    per_row,
)
from ._layout import KvLayout, Layout
from ._sharding import Letters, checked_sharding
from ._xla import Config, Operands


def dot_product_attention(
    query: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike | None,
    key_value_seq_lengths: Integers,
    *,
    page_table: Integers | None = None,
    cache_rows: Integers | None = None,
    query_starts: Integers | None = None,
    num_sequences: Integers | None = None,
    key_begin: Integers | None = None,
    key_end: Integers | None = None,
    sinks: ArrayLike | None = None,
    key_scale: ArrayLike | None = None,
    value_scale: ArrayLike | None = None,
    is_causal: bool = True,
    local_window_size: int | Window | None = None,
    logits_soft_cap: float | None = None,
    scale: float | None = None,
    kv_layout: KvLayout | Layout = "NHD",
    split_size: int | None = None,
    implementation: Implementations | None = None,
    sharding: NamedSharding | PartitionSpec | None = None,
    return_residual: bool = False,
) -> Any:
    """softmax(scale * query key^T) value, exactly, over the keys and values in a cache.

    Letters: B sequences, T query rows of each, N query heads, K key/value heads (query head n reads
    head n // (N // K)), H head dim of query and key, V head dim of value, P pages. "int32" takes
    integers of any dtype. Everything but what is called static may be traced.

    Args:
        query: [B, T, N, H]; or ragged [rows, N, H], the rows of all sequences one after the other,
            with query_starts. Of a floating dtype of 16 bits or more.
        key_cache, value_cache: contiguous, [R, S, K, H] and [R, S, K, V], row b for sequence b or as
            cache_rows says; or, with page_table, pages [P, page, K, H] and [P, page, K, V]. Of
            query's dtype, or float8_e4m3fn. kv_layout has others; value_cache is None where one
            buffer holds both.
        key_value_seq_lengths: int32 [B], with the query's own rows: row i of a sequence with q of
            them has position length - q + i. (FlashAttention-3's cache_seqlens are without them.)
        page_table: int32 [B, n]: page j of a sequence holds its positions from j * page on. A table
            that repeats the pages of a ring makes a ring of the cache; the ring has to hold window
            + T - 1 positions.
        cache_rows: int32 [B].
        query_starts: int32 [B + 1]: sequence b has the rows from query_starts[b] to
            query_starts[b + 1].
        num_sequences: int32, [] or [1]: only so many sequences count, and what the arguments say of
            the others may be anything. Default B.
        key_begin: int32, positions from which on keys are seen: [B] (padding at the left), or one
            per row, [B, T] or [rows]; in a ragged call of B rows it is [B].
        key_end: int32 [B, T] or [rows]: the row sees positions below it only.
        sinks: floating [N]: one more key for each row that sees a key, with this score and the value
            0. It counts in the log-sum-exp.
        key_scale, value_scale: what the numbers in the cache are multiplied with: a scalar, [K],
            [B, K], or one per token and head, [P, page, K] (HND [P, K, page]), with or without an
            axis of size 1 behind.
        is_causal: static: rows see positions up to their own.
        local_window_size: static w or (left, right): rows see positions from left before their own
            to right behind it.
        logits_soft_cap: static c > 0: scores become c * tanh(score / c).
        scale: static, of the scores; default 1 / sqrt(H).
        kv_layout: static. "NHD" as above; "HND", [P, K, page, H]; "interleaved", one buffer
            [P, page, 2K, H] whose heads are key 0, value 0, key 1, value 1, ...; "lanes", one buffer
            [P, page, K, H + V]. In the last two the heads may be two axes, the slower in front.
        split_size: static: keys are summed in blocks of so many positions, and a sequence's results
            are the same bit by bit whatever else is in the batch. None: only from run to run.
        implementation: None, "fa3", "xla", or a sequence, as in `jax_fa3.dot_product_attention`; what
            the kernel takes is in docs/kv_cache.md.
        sharding: static, of query: over batch and heads, where mesh axes are automatic. Each device
            then reads its own part of the cache: rows or pages are split as the batch, so that page
            ids and cache_rows count from its own first one. With ragged queries over heads only.
        return_residual: static: also return the log-sum-exp.

    Returns:
        [B, T, N, V] or [rows, N, V] in query's dtype; with return_residual a tuple of it and the
        natural logarithm of the sum of exp(scores), fp32 (fp64 for fp64), [B, T, N] or [rows, N].

    Padding gives 0 and -inf: rows outside of all sequences, sequences of length 0 or less or from
    num_sequences on, rows that see no key; rows at negative positions see none if causal, and all
    that the window has if not. Of the page table nothing is used but the pages of positions that some
    row sees; other entries may be anything, and so may the cache's other numbers, NaN too. Mistakes
    give NaN in all rows of their sequence and nowhere else: a length beyond the cache's (or 2**30),
    a page or a cache row that does not exist where it is needed, query_starts beyond the rows; those
    that go back make all sequences NaN.

    It has no derivative, and says so: jax_fa3.dot_product_attention has.

    Raises:
        ValueError: shapes, dtypes or combinations that mean nothing, at trace time.
        NotImplementedError: implementation="fa3" where the kernel cannot take the call; differentiation.
    """
    given = locals()  # the arguments by their names
    wanted = _dispatch.checked_implementation(implementation)
    call = checked(given)
    with_lse = static_bool("return_residual", return_residual)
    chosen = _dispatch.choose(wanted, call.refused, stacklevel=2)
    out, lse = _attend(chosen, call.config, call.letters, sharding, call.query, call.operands)
    return (out, lse) if with_lse else out


class Checked(NamedTuple):
    config: Config
    letters: Any  # of query, and of operands
    query: Array
    operands: Operands
    refused: str | None  # why the kernel cannot take it


def checked(given: Mapping[str, Any]) -> Checked:
    """The arguments of `dot_product_attention`, by their names."""
    x = checked_rows("query", given["query"], "N, H")
    call = checked_call("query", x, given)
    checked_heads(x, call)
    causal = static_bool("is_causal", given["is_causal"])
    size = given["split_size"]
    size = None if size is None else natural("split_size", size)
    if size == 0:
        raise wrong("split_size", 0, "an int > 0, or None")
    config = Config(
        call.layout,
        checked_score_scale(given["scale"], x.shape[-1]),
        fold_window(window_size(given["local_window_size"]), causal, None),
        soft_cap(given["logits_soft_cap"]),
        size,
    )
    operands = Operands(
        call.caches,
        call.where,
        per_row("key_begin", given["key_begin"], call, or_sequence=True),
        per_row("key_end", given["key_end"], call, or_sequence=False),
        per_head("sinks", given["sinks"], x.shape[-2]),
        checked_scale("key_scale", given["key_scale"], call),
        checked_scale("value_scale", given["value_scale"], call),
    )
    letters = Letters(call, checked_sharding(given["sharding"], x, call))
    of_operands = Operands._make(
        [
            letters.caches,
            letters.where,
            letters.per_row(operands.key_begin),
            letters.per_row(operands.key_end),
            None if operands.sinks is None else "n",
            letters.scale(operands.key_scale),
            letters.scale(operands.value_scale),
        ]
    )
    refused = _kernel.refusal(config, x, operands) or _dispatch.refusal_of_devices(
        (x, *operands.caches)
    )
    return Checked(config, (letters.rows("n"), of_operands), x, operands, refused)


@jitted(static=4)
def _attend(
    implementation: Implementation | None,
    config: Config,
    letters: Any,
    sharding: Any,
    query: Array,
    operands: Operands,
) -> tuple[Array, ...]:
    query, operands = jax.tree.map(_guards.cached, (query, operands))
    group = query.shape[-2] // max(config.layout.num_kv_heads, 1)

    def local(query: Array, operands: Operands) -> tuple[Array, ...]:
        own = config.layout.with_heads(query.shape[-2] // max(group, 1))
        replaced = dataclasses.replace(config, layout=own)
        return _kernel.attention(implementation, replaced, letters, query, operands)

    results = letters[0], letters[0][:-1]
    return _devices.over_named_axes(local, letters, results, sharding)(query, operands)
