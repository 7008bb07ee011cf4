"""The calls that engines for TPUs make, with their names, arguments and meanings.

ragged_paged_attention         tpu-inference, kernels/ragged_paged_attention/v3/kernel.py
ragged_paged_attention_hd64    the same, kernel_hd64.py: head dim 64, keys and values side by side
ragged_paged_attention_v2      jax.experimental.pallas.ops.tpu.ragged_paged_attention

A scale of the scores is 1 by default, a window of W is the row's own position and W - 1 before it,
scales are Python's floats, and kv_lens include the new rows. Rows behind the last sequence are 0, where
theirs are anything. What says how the TPU should go about it is taken and not used: mask_value, block
and chunk sizes, memory limits, debugging, the dtype of accumulators.
"""

from __future__ import annotations

from typing import Any

from jax import Array
from jax.typing import ArrayLike

from .._checks import array
from ._attention import dot_product_attention
from ._ragged_paged_call import Static, check_hints, layout_of, options_of, run, where_of


def ragged_paged_attention(
    queries: ArrayLike, keys: ArrayLike, values: ArrayLike, kv_cache: ArrayLike,
    kv_lens: ArrayLike, page_indices: ArrayLike, cu_q_lens: ArrayLike, distribution: ArrayLike,
    *, use_causal_mask: bool = True, update_kv_cache: bool = True,
    sm_scale: float = 1.0, sliding_window: int | None = None, soft_cap: float | None = None,
    q_scale: float | None = None, k_scale: float | None = None, v_scale: float | None = None,
    **hints: Any,
) -> tuple[Array, Array]:  # fmt: skip
    """tpu-inference's ragged paged attention, version 3, on any platform.

    Args:
        queries: [tokens, N, H].
        keys, values: [tokens, K, H], of the cache's dtype: written as they are.
        kv_cache: as `get_kv_cache_shape` says; head 2i is the key's i, 2i + 1 the value's, and what is
            padding is neither read nor written. Given away, as by donate_argnums.
        kv_lens: int32 [B], with the new rows.
        page_indices: int32 [B * pages of a sequence].
        cu_q_lens: int32 [B + 1].
        distribution: int32 [3]; the last one is how many sequences there are.
        use_causal_mask: False leaves out the window too.
        update_kv_cache: False does not write, and keys and values are not used.
        q_scale: queries are divided by it, rounded to the cache's dtype, and multiplied with it.
        k_scale, v_scale: what the numbers in the cache are multiplied with.
        hints: skip_kv_mask, out_dtype, mask_value and block sizes, which change nothing here.

    Returns [tokens, N, H] in queries' dtype, and the cache.

    Raises ValueError for shapes and dtypes that do not fit; TypeError for unknown arguments.
    """
    check_hints("ragged_paged_attention", hints)
    q, k = array("queries", queries), array("keys", keys)
    static = Static(
        layout_of("interleaved", q, k, kv_cache),
        use_causal_mask,
        sliding_window if use_causal_mask else None,
        soft_cap,
        sm_scale,
        (q_scale, k_scale, v_scale),
    )
    new = (k, array("values", values)) if update_kv_cache else None
    where = where_of(kv_lens, page_indices, cu_q_lens, distribution)
    return run(static, array("kv_cache", kv_cache), q, new, where, None)


def ragged_paged_attention_hd64(
    queries: ArrayLike, keys: ArrayLike, values: ArrayLike, kv_cache: ArrayLike,
    kv_lens: ArrayLike, page_indices: ArrayLike, cu_q_lens: ArrayLike, distribution: ArrayLike,
    attention_sink: ArrayLike | None = None, *,
    sm_scale: float = 1.0, sliding_window: int | None = None, soft_cap: float | None = None,
    q_scale: float | None = None, k_scale: float | None = None, v_scale: float | None = None,
    **hints: Any,
) -> tuple[Array, Array]:  # fmt: skip
    """`ragged_paged_attention` for H = 64 and with sinks.

    Args:
        kv_cache: as `get_kv_cache_shape_hd64` says: of 128 columns the key has the first 64, the
            value the others.
        attention_sink: float [N].
        The others: as in `ragged_paged_attention`.

    Returns and raises as that.
    """
    check_hints("ragged_paged_attention_hd64", hints)
    q, k = array("queries", queries), array("keys", keys)
    layout = layout_of("lanes", q, k, kv_cache)
    scales = q_scale, k_scale, v_scale
    static = Static(layout, True, sliding_window, soft_cap, sm_scale, scales)
    sink = None if attention_sink is None else array("attention_sink", attention_sink)
    where = where_of(kv_lens, page_indices, cu_q_lens, distribution)
    return run(static, array("kv_cache", kv_cache), q, (k, array("values", values)), where, sink)


def ragged_paged_attention_v2(
    q: ArrayLike,
    kv_pages: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
    *,
    sm_scale: float = 1.0,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    **hints: Any,
) -> Array:
    """JAX's ragged paged attention for TPUs, which reads and does not write, on any platform.

    Args:
        q: [tokens, N, H].
        kv_pages: [P, page, 2K, H]; head 2i is the key's i, 2i + 1 the value's.
        kv_lens: int32 [B], with the tokens' own rows, which are in the pages already.
        page_indices: int32 [B, pages of a sequence].
        cu_q_lens: int32 [B + 1].
        num_seqs: int32 [1].
        hints: mask_value, num_kv_pages_per_block and others, which change nothing here.

    Returns [tokens, N, H] in q's dtype.

    Raises as `ragged_paged_attention`.
    """
    check_hints("ragged_paged_attention_v2", hints)
    return dot_product_attention(
        q,
        kv_pages,
        None,
        kv_lens,
        page_table=page_indices,
        query_starts=cu_q_lens,
        num_sequences=num_seqs,
        kv_layout="interleaved",
        **options_of(sm_scale, sliding_window, soft_cap, (None, k_scale, v_scale)),
    )
