"""The custom calls of the appending kernel, alone and with attention behind it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .._custom_call import custom_call
from .._targets import APPEND, APPEND_AND_ATTEND
from . import _ffi, _write, _xla
from ._layout import LAYOUTS
from ._write import Config, Operands

Configs = tuple[Config, _xla.Config]  # of the rows that are written, and of attention


def append(config: Config, key: Array, operands: Operands) -> tuple[Array, ...]:
    """Like _write.write, of what _append_kernel.refusal lets pass."""
    query, caches = operands.query, operands.caches
    if not (key.size and operands.value.size and operands.where.lengths.size):
        return _write.write(config, key, operands)
    scales = {"key_scale": operands.key_scale, "value_scale": operands.value_scale}
    if key.dtype == caches[0].dtype:
        scales = {}  # it is written as it is
    found = custom_call(
        APPEND,
        _caches_of(caches) | _rotated(query),
        {"kv_layout": LAYOUTS.index(config.layout.kind)} | _interleaved(config),
        aliases=_aliases(caches),
        **_new_rows(key, operands),
        **_ffi.places_of(caches, operands.where),
        **{name: _ffi.scale_of(x) for name, x in scales.items() if x is not None},
        query=None if query is None else query.reshape(-1, *query.shape[-2:]),
    )
    more = () if query is None else (found["rotated_query"].reshape(query.shape),)
    return *_found(found, caches), *more


def append_and_attend(
    configs: Configs, query: Array, key: Array, operands: Operands, attended: Any
) -> tuple[Array, ...]:
    """out, lse and the caches.

    Args:
        operands: of the rows that are written; query is among them where it is to be rotated.
        attended: the operands of attention, whose caches are those of before.
    """
    config, attention = configs
    shape = (*query.shape[:-1], attention.layout.head_dim_v)
    if not (query.size and key.size and operands.value.size and attended.where.lengths.size):
        return in_turn(append, _ffi.attention)(configs, query, key, operands, attended)
    found = custom_call(
        APPEND_AND_ATTEND,
        {
            **_ffi.results_of(attention, query, attended),
            **_caches_of(operands.caches),
            **_rotated(operands.query),
        },
        _ffi.attributes_of(attention, query.shape[-2]) | _interleaved(config),
        aliases=_aliases(operands.caches),
        **_new_rows(key, operands),
        **_ffi.arrays_of(query, attended),
    )
    out, lse = found["out"].reshape(shape), found["lse"].reshape(shape[:-1])
    return out, lse, *_found(found, operands.caches)


def in_turn(write: Any, attend: Any) -> Any:
    """`append_and_attend` by two functions."""

    def both(
        configs: Configs, query: Array, key: Array, operands: Operands, attended: Any
    ) -> tuple[Array, ...]:
        config, attention = configs
        found = write(config, key, operands)
        caches, rotated = found[: len(operands.caches)], found[len(operands.caches) :]
        query = rotated[0] if rotated else query
        return *attend(attention, query, attended._replace(caches=caches)), *caches

    return both


def _new_rows(key: Array, operands: Operands) -> dict[str, Any]:
    key, value = (x.reshape(-1, *x.shape[-2:]) for x in (key, operands.value))
    positions = None if operands.positions is None else operands.positions.reshape(-1)
    tables = operands.tables
    if tables is not None and not (
        tables.cos.dtype == tables.sin.dtype in (key.dtype, jnp.float32)
    ):
        tables = jax.tree.map(lambda x: x.astype(jnp.float32), tables)
    return {
        "key": key,
        "value": value,
        "positions": positions if tables is not None else None,
        "rotary_cos": None if tables is None else tables.cos,
        "rotary_sin": None if tables is None else tables.sin,
    }


def _interleaved(config: Config) -> dict[str, int]:
    return {"rotary_interleaved": int(config.rotary_interleaved)}


def _caches_of(caches: Any) -> dict[str, jax.ShapeDtypeStruct]:
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in caches]
    structs.append(jax.ShapeDtypeStruct((0,), caches[0].dtype))
    return dict(zip(("new_key_cache", "new_value_cache"), structs, strict=False))


def _rotated(query: Array | None) -> dict[str, Any]:
    if query is None:
        return {}
    flat = query.reshape(-1, *query.shape[-2:])
    return {"rotated_query": jax.ShapeDtypeStruct(flat.shape, flat.dtype)}


def _aliases(caches: Any) -> dict[str, str]:
    return {x: f"new_{x}" for x in ("key_cache", "value_cache")[: len(caches)]}


def _found(found: dict[str, Array], caches: Any) -> tuple[Array, ...]:
    return tuple(found[name] for name in ("new_key_cache", "new_value_cache")[: len(caches)])
