"""What every custom call takes: arrays by their names (_targets.py), and attributes (cpp/ffi_call.h)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._problem import Config
from ._target_rows import Row
from ._targets import TARGETS
from ._varying import vary_as, vary_together

_UNBOUNDED = 2**62
_FARTHEST = 2**61  # far beyond every int32 position, and sums with one still fit int64
_T = TypeVar("_T")


def custom_call(
    target: str,
    results: Mapping[str, jax.ShapeDtypeStruct | None],
    attributes: Mapping[str, Any],
    *,
    aliases: Mapping[str, str] | None = None,
    **operands: Array | None,
) -> dict[str, Array]:
    """The results by their names; None or nothing, here and of operands, is absent.

    Args:
        aliases: operands that become results, where they are.
    """
    table = TARGETS[target]
    # Of an absent array that may have several dtypes, that of the call is the right one.
    usual = next(x.dtype for x in operands.values() if x is not None)

    def dtype(row: Row) -> np.dtype:
        return usual if usual.name in row.dtypes else jnp.dtype(row.dtypes[0])

    nothing = functools.cache(lambda dtype: jnp.zeros(0, dtype))  # one for all that are absent

    def no_elements(row: Row) -> Array:
        return nothing(dtype(row))

    def no_result(row: Row) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((0,), dtype(row))

    given = _in_order(f"{target}: operands", table.operands, operands, no_elements)
    wanted = _in_order(f"{target}: results", table.results, results, no_result)
    given_names, wanted_names = ([row.name for row in rows] for rows in table)
    places = {
        given_names.index(operand): wanted_names.index(result)
        for operand, result in (aliases or {}).items()
    }
    varying = vary_together(given)
    call = jax.ffi.ffi_call(target, wanted, input_output_aliases=places or None)
    found = call(*varying, **attributes)
    return {name: vary_as(x, varying[0]) for name, x in zip(wanted_names, found, strict=True)}


def _in_order(
    what: str, rows: Sequence[Row], arrays: Mapping[str, _T | None], absent: Callable[[Row], _T]
) -> tuple[_T, ...]:
    names = {row.name for row in rows}
    present = {name for name, x in arrays.items() if x is not None}
    required = {row.name for row in rows if not row.optional}
    if not required <= present or not set(arrays) <= names:
        wanted = f"wanted {sorted(required)} and any of {sorted(names - required)}"
        raise TypeError(f"{what}: got {sorted(arrays)}, {wanted}")
    return tuple(absent(row) if (x := arrays.get(row.name)) is None else x for row in rows)


def attributes_of(
    config: Config,
    num_heads: tuple[int, int],
    first_head: tuple[int, int, int],
    head_dim_v: int,
    first_column_v: int = 0,
) -> dict[str, Any]:
    return {
        **score_attributes(config),
        "num_heads_q": num_heads[0],
        "num_heads_k": num_heads[1],
        "first_head_q": first_head[0],
        "first_head_k": first_head[1],
        "first_head_v": first_head[2],
        "head_dim_v": head_dim_v,
        "first_column_v": first_column_v,
        "dropout": config.dropout,
    }


def score_attributes(config: Any) -> dict[str, Any]:
    """What becomes of a score, and the window; config: of any kind of call that has these."""
    left, right = map(window_attribute, config.window)
    return {
        "scale": np.float32(config.scale),
        "soft_cap": np.float32(config.logits_soft_cap or 0),
        "window_left": left,
        "window_right": right,
    }


def window_attribute(distance: int | None) -> int:
    return _UNBOUNDED if distance is None else min(max(distance, -_FARTHEST), _FARTHEST)
