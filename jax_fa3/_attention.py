"""The public functions. The docstring of dot_product_attention defines the semantics."""

from __future__ import annotations

import functools
from typing import Any, Literal, Unpack, overload

from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from . import _batch_axes, _tensors
from ._arguments import Options
from ._checks import Integers
from ._problem import Implementations, Window


# fmt: off
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike,
    bias: ArrayLike | None = None, mask: ArrayLike | None = None, *,
    return_residual: Literal[False] = False, **options: Unpack[Options],
) -> Array: ...
@overload
def dot_product_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike,
    bias: ArrayLike | None = None, mask: ArrayLike | None = None, *,
    return_residual: Literal[True], **options: Unpack[Options],
) -> tuple[Array, Array]: ...
# fmt: on


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: Integers | None = None,
    key_value_seq_lengths: Integers | None = None,
    local_window_size: int | Window | None = None,
    query_offset: Integers = 0,
    query_segment_ids: Integers | None = None,
    key_value_segment_ids: Integers | None = None,
    padding_segment_id: int | None = None,
    key_begin: Integers | None = None,
    key_end: Integers | None = None,
    logits_soft_cap: float | None = None,
    soft_cap_last: bool = False,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    relative_bias: ArrayLike | None = None,
    deterministic_backward: bool = False,
    implementation: Implementations | None = None,
    sharding: NamedSharding | PartitionSpec | None = None,
    checkpoint_name: str | tuple[str, str] | None = None,
    compute_dtype: DTypeLike | None = None,
    return_residual: bool = False,
    dropout_rate: float | None = None,
    dropout_key: ArrayLike | None = None,
) -> Array | tuple[Array, Array]:
    """softmax(scale * query key^T) value, exactly, over the keys that each query row sees.

    FlashAttention-3 (Shah et al., arXiv 2407.08608) on Hopper GPUs, plain JAX elsewhere. The first
    arguments are those of jax.nn.dot_product_attention, with its meanings.

    Letters: B batch, T query length, S key length, N query heads, K key/value heads, H head dim of
    query and key, V head dim of value. Query, key and value may all lack B; then the arguments per
    batch entry lack it too (or have a leading 1). Or they have several axes in its place, and so have
    those: bias and mask, broadcast over some of these axes and not over others, have a copy. "int32"
    takes integers of any dtype, and keeps the meaning of any value.

    Args:
        query, key, value: [B, T, N, H], [B, S, K, H], [B, S, K, V] of one floating dtype, or with
            compute_dtype; N is a multiple of K, and query head n reads key/value head n // (N // K).
            The kernels take bfloat16 and float16, H and V multiples of 8 up to 512; the
            forward alone H up to 576.
        bias: floating, added to the scaled scores, broadcastable to [B, N, T, S], differentiable. -inf,
            and what is not above -1e37, hides a key. The kernels read float32 and query's dtype where
            they are, without expanding what is broadcast, and sum its gradient over that in float32;
            other dtypes, rows that are no multiple of 16 bytes, and what is broadcast over keys, are
            copied first. They take none beside logits_soft_cap or dropout, for head dims above 128,
            and for more than 262,144 keys.
        mask: bool, False for hidden, broadcastable to [B, N, T, S]. The kernels read it as bits, which are
            made in one pass over it, and leave out the blocks that it hides. Beside terms of the scores, and
            for head dims above 128, they take it if each row of it is one interval of keys, the same for all
            heads, which is found out when the program runs; if not, it is taken as a bias; where they take
            none such rows give NaN with "fa3", and with None it runs on XLA.
        scale: of the scores; default 1 / sqrt(H). The kernels take a static float > 0, or a scalar
            of JAX or NumPy whose value is known when it is traced; XLA any real scalar.
        is_causal: row i sees key j only if j <= i + query_offset. With query_offset 0 the masks are
            aligned top left, as in jax.nn (FlashAttention-2 and -3: bottom right, S - T).
        query_seq_lengths, key_value_seq_lengths: int32 [B]; rows from the length on are padding.
        local_window_size: w or (left, right), ints >= 0: row i sees key j only if
            i + query_offset - left <= j <= i + query_offset + right. -1 or None: no bound there.
        query_offset: the position of query row 0 among the keys; an int of any size, or int32, []
            or [B]. (Arrays with values beyond int32: exact for T and S up to 2^29.)
        query_segment_ids, key_value_segment_ids: int32 [B, T] and [B, S], both or neither: rows see
            keys of their own id. Among the keys each id >= 0 must be one contiguous run: a query
            row whose id is not gets NaN, and so does its query's gradient unless its cotangents are
            all 0. The ids of the query may come in any order. Negative ids are padding: such rows
            see no key, such keys are seen by nobody. Ids beyond int32, in arrays of wider dtypes,
            cost a sort per call, or per `key_intervals`.
        padding_segment_id: a static int, an id that is padding as the negative ones are: 0 where
            padding has segment id 0. None: only they are.
        key_begin, key_end: int32 [B, T]: row i sees keys in [key_begin[i], key_end[i]); either may
            be left out. `key_intervals` turns all of the mask arguments into these two. Or [B, T, M],
            M <= 4, both: row i sees the keys of any of its M intervals; on the kernels for head dims up
            to 128.
        logits_soft_cap: static float c > 0: the scaled scores become c * tanh(scores / c), before
            bias and masks. 0 or None: none.
        soft_cap_last: the soft cap comes after bias, alibi_slopes and relative_bias, before masks: it is of
            their sum.
        sinks: floating [N], differentiable: each row that sees a key sees one more, with this score
            and the value 0. The log-sum-exp has it in.
        alibi_slopes: floating [N], differentiable: slope * (j - i) is added to the scaled score of row i
            and key j, whatever query_offset is: along a row the differences are all that counts. The
            kernels take them where they take a bias, but not beside one, and with a dense mask as beside
            one.
        relative_bias: floating [N, 2 * max + 1], differentiable: the entry of the distance
            clip(j - (i + query_offset), -max, max), counted from -max, is added to the scaled score of row i
            and key j, as in T5 (`t5_relative_bias` makes it of buckets). Finite. The kernels take it where
            they take alibi_slopes, and not beside those.
        deterministic_backward: gradients that are equal bit by bit from run to run. A bias is expanded
            over batch and heads for it, as is its gradient in float32; that of relative_bias takes as
            much memory as half a byte for each score of a head.
        implementation: "fa3", the kernels, or "xla", plain JAX with memory linear in T and S; both
            without fallback. A sequence of "fa3", "xla" and None is tried in order: the first that can
            take the arguments on this machine, or the last one's error. None takes the kernels when
            lowered for CUDA if they can take the
            arguments and a local device is a Hopper GPU, with a driver for their CUDA runtime, or no
            local device is CUDA's; else XLA, with a warning on a machine with a Hopper GPU. Beside
            other GPUs, the devices that a program is lowered for must all be Hopper GPUs, too.
        sharding: of query (of a packed qkv), over batch and heads, where its mesh axes are automatic:
            each device then computes its own part by jax.shard_map, with key, value and masks split
            alike. Without it XLA decides, which works as well, but such a program over several
            devices is not exported and misses the persistent compilation cache. A PartitionSpec
            takes the mesh of jax.set_mesh.
        checkpoint_name: a static string, or two: one for out, one for the log-sum-exp and its rest.
            What the kernels' backward needs of the forward then has this name as well as those of
            RESIDUAL_NAMES: under a policy of jax.checkpoint that saves it ("context" in MaxText) the
            forward kernel runs once.
        compute_dtype: what query, key and value, of whatever floating dtypes, are cast to. The result
            has query's own dtype, and each gradient that of its operand.
        return_residual: also return the log-sum-exp.
        dropout_rate: a static float in [0, 1), rounded to a multiple of 2^-18: each of the softmax's
            weights is 0 with this probability, and else divided by 1 - dropout_rate. Sums and the
            log-sum-exp are those without it. 0 or None: none.
        dropout_key: one key of jax.random, typed or raw uint32. Which weights are dropped is a function
            of it and of the batch entry, query head, query row and key, the same on the kernels, on
            XLA, in the gradient and however the call is split over devices. Under jax.vmap entries
            have their own where the key is mapped; inside a jax.shard_map of your own fold the
            device's index into the key.

    Returns:
        [B, T, N, V] in query's dtype. With return_residual a tuple of it and the natural logarithm
        of the sum of exp(scores) over the visible keys, fp32 (fp64 for fp64 inputs) [B, T, N],
        which is differentiable.

    A row sees the keys that all of the masks above let it see. One that sees none gives 0, its
    log-sum-exp is -inf, its gradients are 0. Lengths and intervals are clamped to [0, T] and
    [0, S]; positions, offsets and windows behave as exact integers. Padding past the lengths may
    hold anything, NaN too; elsewhere inputs must be finite. Scores, softmax and sums are fp32
    (fp64 for fp64 inputs); the softmax's weights are rounded to the inputs' dtype for their product
    with value.

    jax_debug_nans raises for the rows of a broken segment, jax_debug_infs for the log-sum-exp of rows
    that see no key where return_residual asks for it. Under jax.disable_jit this function is
    compiled all the same.

    The kernels have first derivatives, in reverse and in forward mode, and both in one step; what is
    computed from a tangent has its gradient through XLA. With "xla" every order and mode works.

    Raises:
        ValueError: shapes, dtypes or combinations that mean nothing, at trace time.
        NotImplementedError: with "fa3", what the kernels do not support, and machines whose CUDA devices
            are no Hopper GPUs, at trace time; lowering for other platforms than CUDA, at lowering.
            `is_supported` asks beforehand.
    """
    return _batch_axes.attention(
        _tensors.separate,
        {"query": query, "key": key, "value": value},
        3,
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        query_offset=query_offset,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        padding_segment_id=padding_segment_id,
        key_begin=key_begin,
        key_end=key_end,
        logits_soft_cap=logits_soft_cap,
        soft_cap_last=soft_cap_last,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        relative_bias=relative_bias,
        deterministic_backward=deterministic_backward,
        implementation=implementation,
        sharding=sharding,
        checkpoint_name=checkpoint_name,
        compute_dtype=compute_dtype,
        return_residual=return_residual,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
    )


# fmt: off
@overload
def qkv_dot_product_attention(
    qkv: ArrayLike, num_kv_heads: int | None = None, *,
    bias: ArrayLike | None = None, mask: ArrayLike | None = None,
    return_residual: Literal[False] = False, **options: Unpack[Options],
) -> Array: ...
@overload
def qkv_dot_product_attention(
    qkv: ArrayLike, num_kv_heads: int | None = None, *,
    bias: ArrayLike | None = None, mask: ArrayLike | None = None,
    return_residual: Literal[True], **options: Unpack[Options],
) -> tuple[Array, Array]: ...
# fmt: on


def qkv_dot_product_attention(
    qkv: ArrayLike, num_kv_heads: int | None = None, **options: Any
) -> Array | tuple[Array, Array]:
    """Self-attention of one packed array; its gradient is one packed array too.

    Args:
        qkv: [B, T, 3, N, H]; or with num_kv_heads = K, [B, T, N + 2K, H]: the heads of the queries,
            then those of the keys, then those of the values. Either may lack B. The kernels read
            it where it is, without copies.
        num_kv_heads: K, a static int; None for the first form.
        options: every other argument of `dot_product_attention`, by name.

    Returns and raises as `dot_product_attention`; V = H.
    """
    make = functools.partial(_tensors.packed, num_kv_heads=num_kv_heads)
    behind = 4 if num_kv_heads is None else 3
    return _batch_axes.attention(make, {"qkv": qkv}, behind, **options)
