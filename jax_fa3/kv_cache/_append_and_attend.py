"""New keys and values into a cache, and attention to it: one call of the kernels."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import jax
from jax import Array
from jax.typing import ArrayLike

from .. import _dispatch, _guards
from .. import _sharding as _devices
from .._checks import Integers, static_bool
from .._jitted import jitted
from .._problem import Implementation
from . import _append, _append_kernel, _attention, _xla
from ._append_kernel import NewRows
from ._write import Config

# Of the keyword arguments of append: those of its own, and those that dot_product_attention has too.
_ROTARY = {"positions", "rotary_cos", "rotary_sin", "rotary_interleaved"}
_SHARED = {"page_table", "cache_rows", "query_starts", "num_sequences", "key_scale", "value_scale"}
_SHARED |= {"kv_layout", "sharding"}


def append_and_attend(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    key_cache: ArrayLike,
    value_cache: ArrayLike | None,
    key_value_seq_lengths: Integers,
    *,
    return_residual: bool = False,
    **options: Any,
) -> tuple[Any, ...]:
    """`append`, and `dot_product_attention` of the caches that it returns.

    Args: theirs; options are the keyword arguments of either, but `query` of `append`. What both have
        is for both, and sharding is query's.

    Returns:
        out, key_cache, value_cache (None where one buffer holds both), and with return_residual the
        log-sum-exp. Each of the two looks at the pages that it needs: where an old one is missing,
        the new rows are written and the results are NaN.

    Raises as `dot_product_attention`; TypeError for arguments that neither has.
    """
    implementation = options.pop("implementation", None)
    wanted = _dispatch.checked_implementation(implementation)
    rotary = {name: options.pop(name) for name in _ROTARY & options.keys()}
    shared = {name: options[name] for name in _SHARED & options.keys()}
    tables = rotary.get("rotary_cos"), rotary.get("rotary_sin")
    turned = {} if all(x is None for x in tables) else {"query": query}
    old, lengths = (key_cache, value_cache), key_value_seq_lengths
    rows = *old, key, value, lengths
    new = _append.checked(_by_name(_append.append, *rows, **turned, **rotary, **shared))
    attend = _attention.dot_product_attention
    call = _attention.checked(_by_name(attend, query, *old, lengths, **options))
    with_lse = static_bool("return_residual", return_residual)
    apart = new.key.shape[:-2] != call.query.shape[:-2]
    if apart or (wanted != "xla" and (new.refused or call.refused)):
        # Each for itself, for one of the two may have its kernel.
        shared["implementation"] = options["implementation"] = implementation
        found = _append.append(*rows, **turned, **rotary, **shared)
        caches, rotated = found[:2], found[2] if turned else query
        pair = caches[0], caches[1]
        out, lse = attend(rotated, *pair, lengths, **options, return_residual=True)
        return out, *caches, *((lse,) if with_lse else ())
    chosen = _dispatch.choose(wanted, stacklevel=2)
    written = NewRows(new.key, new.operands.value, new.operands.positions, new.operands.tables)
    of_key, of_new = new.letters
    letters = (
        call.letters[0],
        NewRows(of_key, of_new.value, of_new.positions, of_new.tables),
        call.letters[1],
    )
    static = chosen, new.config, call.config, letters, options.get("sharding")
    out, lse, *found = _both(*static, call.query, written, call.operands)
    return out, *_append.as_two(tuple(found)), *((lse,) if with_lse else ())


_signature = functools.cache(inspect.signature)


def _by_name(function: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
    """All arguments of the function in a call with these."""
    bound = _signature(function).bind(*arguments, **options)
    bound.apply_defaults()
    return bound.arguments


@jitted(static=5)
def _both(
    implementation: Implementation | None,
    config: Config,
    attention: _xla.Config,
    letters: Any,
    sharding: Any,
    query: Array,
    new: NewRows,
    attended: _xla.Operands,
) -> tuple[Array, ...]:
    query, new, attended = jax.tree.map(_guards.cached, (query, new, attended))

    def local(query: Array, new: NewRows, attended: _xla.Operands) -> tuple[Array, ...]:
        own = config.layout.with_heads(new.key.shape[-2])
        of_rows = dataclasses.replace(config, layout=own)
        of_attention = dataclasses.replace(attention, layout=own)
        operands = letters, query, new, attended
        return _append_kernel.append_and_attend(implementation, of_rows, of_attention, *operands)

    results = letters[0], letters[0][:-1], *letters[2].caches
    return _devices.over_named_axes(local, letters, results, sharding)(query, new, attended)
