"""Who runs a call: the decoding kernel or plain JAX, and what the kernel takes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import sequential_vmap

from .. import _dispatch
from .._dispatch import ELSEWHERE
from .._problem import E4M3, Implementation
from .._sharding import partitioned
from . import _ffi, _xla
from ._xla import Config, Operands


def refusal(config: Config, query: Array, operands: Operands) -> str | None:
    """Why the kernel cannot take these arguments, and what to do about it; None if it can."""
    layout, cache = config.layout, operands.caches[0]
    if query.dtype.name not in ("bfloat16", "float16"):
        wanted = f"wanted bfloat16 or float16: cast query and caches, or {ELSEWHERE}"
        return f"query: got dtype {query.dtype}, {wanted}"
    scales = {name: getattr(operands, name) for name in ("key_scale", "value_scale")}
    for name, x in (scales if cache.dtype != E4M3 else {}).items():
        if x is not None:
            wanted = f"wanted None, as the cache is not {E4M3.name}, or {ELSEWHERE}"
            return f"{name}: got an array, {wanted}"
    of_values = scales["value_scale"]
    if of_values is not None and of_values.ndim > 2 and query.dtype == jnp.float16:
        # The kernel takes them into the probabilities, for which float16 has too few exponents.
        wanted = "wanted at most one for each sequence and head with float16"
        return f"value_scale: got one for each token, {wanted}, or {ELSEWHERE}"
    if operands.key_end is not None:
        return f"key_end: got an array, wanted None, or {ELSEWHERE}"
    begin, batch = operands.key_begin, operands.where.lengths.shape
    if begin is not None and begin.shape != batch:
        return f"key_begin: got shape {begin.shape}, wanted {batch}, or {ELSEWHERE}"
    if config.split_size is not None:
        splits, most = _ffi.splits_of(config, operands), _ffi.MOST_SPLITS
        if config.split_size % _ffi.SPLIT_MULTIPLE or splits > most:
            wanted = f"wanted a multiple of {_ffi.SPLIT_MULTIPLE}, for at most {most} splits"
            return f"split_size: got {config.split_size}, {wanted}, or {ELSEWHERE}"
    reason = _dispatch.refusal_of_scales(config.scale, config.logits_soft_cap)
    if reason is not None:
        return reason
    dims = {"query": layout.head_dim, "value_cache": layout.head_dim_v}
    name = max(dims, key=dims.__getitem__)
    reason = _dispatch.refusal_of_build(name, query.dtype, *dims.values(), wide=False)
    if reason is not None:
        return reason
    vector = 16 // cache.dtype.itemsize
    for name, dim in dims.items():
        if dim % vector or cache.shape[-1] % vector:
            wanted = f"wanted multiples of {vector}, or {ELSEWHERE}"
            return f"{name}: got head dim {dim} in a cache {cache.shape}, {wanted}"
    table, page_size = operands.where.table, layout.page_size(operands.caches)
    if table is not None and table.shape[1] > 1 and page_size % 8:
        return f"key_cache: got pages of {page_size}, wanted a multiple of 8, or {ELSEWHERE}"
    if not _ffi.fits(config, query, operands):
        found = f"shape {query.shape} on {_ffi.capacity(config, operands)} positions"
        return f"query: got {found}, wanted fewer of either, or {ELSEWHERE}"
    return None


def attention(
    implementation: Implementation | None, config: Config, letters: Any, query: Array, operands: Any
) -> tuple[Array, ...]:
    """By the kernel on CUDA and by plain JAX on all other platforms; implementation as for
    _dispatch.run. Each device reads its own part of what automatic mesh axes split."""
    group = query.shape[-2] // max(config.layout.num_kv_heads, 1)

    def local(function: Any, query: Array, operands: Operands) -> tuple[Array, ...]:
        heads = max(query.shape[-2] // group, 1) if group else config.layout.num_kv_heads
        own = dataclasses.replace(config, layout=config.layout.with_heads(heads))
        return function(own, query, operands)

    functions = tuple(functools.partial(local, x.attention) for x in (_ffi, _xla))
    results = letters[0], letters[0][:-1]
    whole = "nk" if config.layout.kind == "interleaved" else ""
    return run(implementation, functions, letters, results, (query, operands), whole=whole)


def run(
    implementation: Implementation | None,
    functions: tuple[Any, ...],
    letters: Any,
    results: tuple[str, ...],
    operands: tuple[Any, ...],
    *,
    whole: str = "",
    sums: bool = True,
) -> tuple[Array, ...]:
    """The first function, a kernel's, or the second, in plain JAX, of the operands.

    Args:
        letters: like operands, of all; results: of the results.
        whole: letters of what is not split over automatic mesh axes: the 2K heads of an interleaved
            cache, whose halves are no halves of K.
        sums: as in _sharding.partitioned.
    """
    kernel, plain = functions
    if implementation == "xla":
        return plain(*operands)
    arrays, tree = jax.tree.flatten(operands)

    @jax.jit  # whose constants are its own: a custom_partitioning must have none
    def call(*arrays: Array) -> tuple[Array, ...]:
        given = jax.tree.unflatten(tree, arrays)
        return _dispatch.by_platform(implementation, kernel, plain)(*given)

    dots = str.maketrans(whole, "." * len(whole))
    dims, made = ([x.translate(dots) for x in xs] for xs in (jax.tree.leaves(letters), results))
    return sequential_vmap(partitioned(call, dims, made, sums=sums))(*arrays)
