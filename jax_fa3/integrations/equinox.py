"""Equinox: `equinox.nn.MultiheadAttention` with one call of attention for all heads."""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from .._arguments import Options
from .._attention import dot_product_attention
from .._checks import wrong
from ._project import check_version


def multihead_attention(
    layer: Any,
    query: Array,
    key_: Array,
    value: Array,
    mask: ArrayLike | None = None,
    *,
    key: Any = None,
    inference: bool | None = None,
    process_heads: Any = None,
    **options: Unpack[Options],
) -> Array:
    """What `layer(query, key_, value, mask)` of an equinox.nn.MultiheadAttention gives.

    The layer itself maps over its heads with a matrix of scores for each. Rows that see no key give
    0 here (and the output projection's bias), there the mean of all values.

    Args:
        layer, query, key_, value, mask, inference, process_heads: as for the layer. A mask is an
            array, as `jax_fa3.dot_product_attention` takes it; is_causal=True and the like need none.
            Under jax.vmap over the batch all entries are one call of the kernels.
        key: for the layer's dropout, as often as there, but not of the same weights.
        options: of `jax_fa3.dot_product_attention`, for one sequence: lengths are scalars, segment
            ids, key_begin and key_end [T] or [S]. compute_dtype=jnp.bfloat16 for the kernels: they
            take 16 bits, and the layer is float32 by default.

    Raises ValueError for dropout without a key.
    """
    check_version("equinox", "0.13.8", "0.13.8")
    if layer.dropout.p and not (layer.dropout.inference if inference is None else inference):
        if key is None:
            raise wrong("key", None, f"one for dropout of {layer.dropout.p}, or inference=True")
        options |= {"dropout_rate": layer.dropout.p, "dropout_key": key}
    projections = layer.query_proj, layer.key_proj, layer.value_proj
    heads = [
        jax.vmap(project)(x).reshape(x.shape[0], layer.num_heads, -1)
        for project, x in zip(projections, (query, key_, value), strict=True)
    ]
    if process_heads is not None:
        shapes = [x.shape for x in heads]
        heads = list(process_heads(*heads))
        if [x.shape for x in heads] != shapes:
            raise ValueError("process_heads: got other shapes than it was given, wanted the same")
    dtype = jnp.result_type(*heads)
    out = dot_product_attention(*(x.astype(dtype) for x in heads), mask=mask, **options)
    return jax.vmap(layer.output_proj)(out.reshape(query.shape[0], -1))
