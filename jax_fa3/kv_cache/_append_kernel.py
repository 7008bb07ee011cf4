"""Who writes new rows into a cache: the appending kernel or plain JAX, and what the kernel takes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from .._dispatch import ELSEWHERE
from .._problem import E4M3, Implementation
from . import _append_ffi, _kernel, _write, _xla
from ._rotary import Tables
from ._write import Config, Operands

MOST_ROWS = 2**29  # with their heads, as cpp/ffi_cache.cc has it
MOST_NUMBERS = 2**25  # of a row, as cpp/ffi_append.cc has it


def refusal(key: Array, operands: Operands) -> str | None:
    """Why the kernel cannot take these arguments, and what to do about it; None if it can."""
    cache, tables = operands.caches[0], operands.tables
    computes = key.dtype in (jnp.bfloat16, jnp.float16)
    copied = key.dtype in (jnp.float32, E4M3) and key.dtype == cache.dtype
    if not computes and (not copied or tables is not None):
        found = f"dtype {key.dtype} for a cache of {cache.dtype}"
        found += "" if tables is None else ", to be rotated"
        return f"key: got {found}, wanted bfloat16 or float16, or {ELSEWHERE}"
    for name in ("key_scale", "value_scale"):
        if getattr(operands, name) is not None and cache.dtype != E4M3:
            wanted = f"wanted None, as the cache is not {E4M3.name}, or {ELSEWHERE}"
            return f"{name}: got an array, {wanted}"
    shapes = [key.shape, operands.value.shape]
    shapes += [] if operands.query is None else [operands.query.shape]
    of_row = sum(x[-2] * x[-1] for x in shapes)
    rows = key.size // max(key.shape[-2] * key.shape[-1], 1) * max(x[-2] for x in shapes)
    if rows > MOST_ROWS or of_row > MOST_NUMBERS:
        return f"key: got shape {key.shape}, wanted fewer rows or heads, or {ELSEWHERE}"
    return None


def append(
    implementation: Implementation | None,
    config: Config,
    letters: Any,
    key: Array,
    operands: Operands,
) -> tuple[Array, ...]:
    """Like _write.write. Where automatic mesh axes split the cache, each device writes its own part.

    letters: of key and operands, as for _sharding.
    """

    def local(function: Any, key: Array, operands: Operands) -> tuple[Array, ...]:
        own = dataclasses.replace(config, layout=config.layout.with_heads(key.shape[-2]))
        return function(own, key, operands)

    functions = tuple(functools.partial(local, x) for x in (_append_ffi.append, _write.write))
    of_operands = letters[1]
    results = *of_operands.caches, *(() if of_operands.query is None else (of_operands.query,))
    if operands.query is None:  # the only heads are those of the cache
        rename = str.maketrans("k", "n")
        letters = jax.tree.map(lambda x: x.translate(rename), letters)
        results = tuple(x.translate(rename) for x in results)
    whole = _whole(config, of_operands.caches)
    return _kernel.run(
        implementation, functions, letters, results, (key, operands), whole=whole, sums=False
    )


class NewRows(NamedTuple):
    """Those to be appended, and attended to. A pytree."""

    key: Array
    value: Array
    positions: Array | None
    tables: Tables | None


def append_and_attend(
    implementation: Implementation | None,
    config: Config,
    attention: _xla.Config,
    letters: Any,
    query: Array,
    new: NewRows,
    attended: _xla.Operands,
) -> tuple[Array, ...]:
    """out, lse and the caches; letters: of query, new and attended."""

    def local(
        function: Any, query: Array, new: NewRows, attended: _xla.Operands
    ) -> tuple[Array, ...]:
        own = config.layout.with_heads(new.key.shape[-2])
        rotated = None if new.tables is None else query
        operands = Operands(
            new.value,
            attended.caches,
            attended.where,
            rotated,
            new.positions,
            new.tables,
            attended.key_scale,
            attended.value_scale,
        )
        configs = tuple(dataclasses.replace(x, layout=own) for x in (config, attention))
        return function(configs, query, new.key, operands, attended)

    plain = _append_ffi.in_turn(_write.write, _xla.attention)
    functions = tuple(functools.partial(local, x) for x in (_append_ffi.append_and_attend, plain))
    of_query, _, of_attended = letters
    results = of_query, of_query[:-1], *of_attended.caches
    whole = _whole(config, of_attended.caches)
    return _kernel.run(
        implementation,
        functions,
        letters,
        results,
        (query, new, attended),
        whole=whole,
        sums=False,
    )


def _whole(config: Config, caches: tuple[str, ...]) -> str:
    """Letters of what is not split over automatic mesh axes: where each device has all pages, it
    writes all rows."""
    batch = "" if caches[0].startswith("b") else "b"
    return batch + ("nk" if config.layout.kind == "interleaved" else "")
