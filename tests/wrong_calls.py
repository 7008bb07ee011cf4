"""The many ways in which a custom call may be wrong."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from call_operands import B, K, N, S, Struct, T, V, fp8_operands, operands_of, rows_of
from kernel_calls import FORWARD, backward_of_three, fp8_forward, quantized
from recorded_calls import Call, recorded

from jax_fa3 import _targets
from jax_fa3._problem import Config, Masks

# What a wrong call gives. XLA itself refuses a dtype that a handler never takes at that place.
REFUSED = r"INVALID_ARGUMENT: (jax_fa3: |.*Wrong buffer dtype)"


def outcome(call: Call, device: Any) -> str:
    """The message of its error."""
    try:
        call.run(device)
    except jax.errors.JaxRuntimeError as error:
        return " ".join(str(error).split())
    return "runs"


def wrong_calls(call: Call) -> Iterator[tuple[str, Call]]:
    """One thing of a right call changed, and what it was."""
    for kind in ("operands", "results"):
        arrays = getattr(call, kind)
        for i, x in enumerate(arrays):
            aliased = i in (call.aliases if kind == "operands" else call.aliases.values())
            changed = call if not aliased else dataclasses.replace(call, aliases={})
            for y in _wrong_arrays(call.target, kind, i, x):
                new = {kind: (*arrays[:i], y, *arrays[i + 1 :])}
                yield f"{kind} {i}: {x} -> {y}", dataclasses.replace(changed, **new)
    for name, value in call.attributes.items():
        for other in _wrong_values(name, value):
            new = {"attributes": {**call.attributes, name: other}}
            yield f"{name}: {value} -> {other}", dataclasses.replace(call, **new)
    if call.aliases:
        yield "no aliases", dataclasses.replace(call, aliases={})
    for i, x in enumerate(call.operands):
        for j, y in enumerate(call.results):
            taken = i in call.aliases or j in call.aliases.values()
            if not taken and math.prod(x.shape) and (x.shape, x.dtype) == (y.shape, y.dtype):
                aliases = {**call.aliases, i: j}
                yield f"operand {i} is result {j}", dataclasses.replace(call, aliases=aliases)


def wrong_throughout() -> Iterator[tuple[str, Call]]:
    """Calls whose parts fit together, but no kernel."""
    config = Config(0.5, (None, None), None, False)
    for h, v in [(12, 64), (64, 12), (584, 64), (64, 520), (0, 64), (64, 0)]:
        q, k, x = operands_of(h, v)
        rows = rows_of(T, N, v)
        yield f"fwd {h} {v}", recorded(lambda *x: FORWARD(config, *x, Masks()), q, k, x)
        backward = recorded(
            lambda *x: backward_of_three(config, *x[:3], Masks(), *x[3:]), q, k, x, *rows
        )
        yield f"bwd {h} {v}", backward
    q, k, x = operands_of(heads=3)
    yield "fwd 3 heads", recorded(lambda *x: FORWARD(config, *x, Masks()), q, k, x)
    q, k, x = operands_of(dtype=jnp.float32)
    yield "fwd in fp32", recorded(lambda *x: FORWARD(config, *x, Masks()), q, k, x)
    for h in (8, 48, 72, 96 + 8, 272):
        yield f"fp8 {h}", recorded(fp8_forward(config), *fp8_operands(T, S, h), Masks())
    for h in (8, 24, 272):
        yield f"quantize {h}", recorded(quantized, operands_of(h)[0])

    # The two of issue 16, in which a kernel was reached.
    right = recorded(fp8_forward(config), *fp8_operands(T, S, 64), Masks())
    for columns, first in [(72, 0), (72, 8), (80, 8)]:
        value = Struct((B, S, K, columns), right.operands[2].dtype)
        operands = (*right.operands[:2], value, *right.operands[3:])
        attributes = {**right.attributes, "first_column_v": first}
        new = dataclasses.replace(right, operands=operands, attributes=attributes)
        yield f"fp8 value of {columns} columns from {first} on", new

    # What is joined has no rest of a log-sum-exp.
    before = Struct((B, T, N, V), jnp.float32), Struct((B, N, T), jnp.float32)
    partial = dataclasses.replace(config, partial=True)

    def joined(*x: Any) -> Any:
        return FORWARD(partial, *x[:3], Masks(), before=x[3:], with_lse_low=True)

    yield "fwd joined with lse_low", recorded(joined, *operands_of(), *before)

    def with_sinks(sinks: Any, *x: Any) -> Any:
        return FORWARD(partial, *x[:3], Masks(), before=x[3:], sinks=sinks)

    sinks = Struct((1, N), jnp.float32)
    yield "fwd joined with sinks", recorded(with_sinks, sinks, *operands_of(), *before)

    def with_bias(config: Config, **options: Any) -> Any:
        return lambda bias, *x: FORWARD(config, *x[:3], Masks(), bias=bias, **options)

    bias = Struct((1, N, T, S), jnp.bfloat16)
    capped = dataclasses.replace(config, logits_soft_cap=30.0)
    yield "fwd with bias and soft cap", recorded(with_bias(capped), bias, *operands_of())
    right = recorded(with_bias(config), bias, *operands_of())
    for shape in [(1, N, T, S - 8), (1, N, T, 0), (2, 2, T, S)]:
        yield f"fwd with bias {shape}", _with_operand(right, "bias", Struct(shape, bias.dtype))

    # No kernel has both.
    mask, words = Struct((B, 1, T, S), jnp.bool_), Struct((B, N, 2), jnp.uint32)
    masked = {
        "fwd": recorded(lambda x, *y: FORWARD(config, *y, Masks(), mask=x), mask, *operands_of()),
        "bwd": recorded(
            lambda x, *y: backward_of_three(config, *y[:3], Masks(), *y[3:], mask=x),
            *(mask, *operands_of(), *rows_of(T, N, V)),
        ),
    }
    for name, right in masked.items():
        attributes = {**right.attributes, "dropout": np.int64(1000)}
        new = _with_operand(right, "dropout", words)
        yield f"{name} with a mask and dropout", dataclasses.replace(new, attributes=attributes)

    # Sizes beyond 32 bits, in arrays without elements.
    long = 2**31
    q, k, x = operands_of(batch=0, length=long)
    yield "fwd of 2^31 rows", recorded(lambda *x: FORWARD(config, *x, Masks()), q, k, x)
    q, k, x = operands_of(batch=0, key_length=long)
    yield "fwd of 2^31 keys", recorded(lambda *x: FORWARD(config, *x, Masks()), q, k, x)
    q, k, x = operands_of(batch=0, heads=long)
    yield "fwd of 2^31 heads", recorded(lambda *x: FORWARD(config, *x, Masks()), q, k, x)


def _with_operand(call: Call, name: str, x: Struct) -> Call:
    _, _, place = _operand(call.target, name)
    operands = *call.operands[:place], x, *call.operands[place + 1 :]
    return dataclasses.replace(call, operands=operands)


def _operand(target: str, name: str) -> tuple[str, str, int]:
    """Its kind and place."""
    names = [row.name for row in _targets.TARGETS[target].operands]
    return target, "operands", names.index(name)


# Dtypes that an array, by its kind and place, may have as well.
_MAY_BE = {
    (_targets.FWD, "results", 0): ("float32",),
    _operand(_targets.FWD, "bias"): ("float32",),
    _operand(_targets.BWD, "bias"): ("float32",),
    _operand(_targets.BWD_PACKED, "bias"): ("float32",),
    (_targets.FWD_FP8, "results", 0): ("float32", "float16", "bfloat16"),
    (_targets.QUANTIZE, "operands", 0): ("float16", "bfloat16"),
}

_BIAS = {_operand(_targets.FWD, "bias"), _operand(_targets.BWD, "bias")}
_BIAS.add((_targets.MASK_BITS, "operands", 1))  # intervals

# Dimensions of any size, or of several: S, which this operand says; how many parts there are, or none;
# sinks and bias of one or of each batch entry; rows in whole blocks.
_FREE = {
    (*_operand(_targets.FWD, "sinks"), 0),
    (*_operand(_targets.FWD, "bias"), 0),
    (*_operand(_targets.BWD, "relative_bias"), 0),  # a table of one or of each batch entry
    (_targets.SEGMENT_INTERVALS, "operands", 1, 1),
    (_targets.MASK_BITS, "operands", 0, 2),  # rows, of which there are bits in whole blocks
    (_targets.MASK_BITS, "operands", 1, 2),
    (_targets.FWD, "results", 4, 0),
    (_targets.BWD, "results", 9, 0),
    (_targets.BWD_PACKED, "results", 7, 0),
    (_targets.DECODE, "operands", 1, 1),  # positions of a contiguous cache
    (_targets.DECODE, "operands", 4, 1),  # pages of a sequence
    (_targets.APPEND, "operands", 2, 1),
    (_targets.APPEND, "operands", 5, 1),
    (_targets.APPEND_AND_ATTEND, "operands", 6, 1),
}
_MAY_BE_NONE = {(_targets.BWD, "results", 8), (_targets.BWD_PACKED, "results", 6)}  # ranges
_MAY_BE_NONE |= {(_targets.BWD, "results", 12), (_targets.BWD_PACKED, "results", 10)}  # dalibi
_MAY_BE_NONE |= {(_targets.BWD, "results", 13), (_targets.BWD_PACKED, "results", 11)}  # drelative

# Results before the workspace, which may be larger and of any rank.
_RESULTS = {_targets.FWD: 4, _targets.BWD: 3, _targets.BWD_PACKED: 1, _targets.FWD_FP8: 2}
_RESULTS |= {_targets.DECODE: 2, _targets.JVP: 2, _targets.APPEND_AND_ATTEND: 5}


def _wrong_arrays(target: str, kind: str, place: int, x: Struct) -> Iterator[Struct]:
    workspace = kind == "results" and place >= _RESULTS.get(target, math.inf)
    if x.shape == (0,):  # absent
        shapes = [(3,)]
    elif len(x.shape) == 1:  # smaller ones may be none, which may be left out
        n = x.shape[0]
        shapes = [(n + 3,) if kind == "operands" else (n - 1,)]
    else:
        sizes = [
            (i, n) for i, n in enumerate(x.shape) if n and (target, kind, place, i) not in _FREE
        ]
        # Of the heads of a packed array less than the last may be meant.
        packed = kind == "operands" and len(x.shape) == 4
        shapes = [_with(x.shape, i, n // 4 if packed and i == 2 else n - 1) for i, n in sizes]
        if (target, kind, place) in _MAY_BE_NONE:
            shapes = [shape for shape in shapes if 0 not in shape]
        else:
            shapes += [_with(x.shape, i, 0) for i, n in sizes if n > 1]
    if x.shape != (0,) and not workspace:
        shapes += [(*x.shape, 1), (1, *x.shape)]
        if len(x.shape) > 1:
            shapes += [(math.prod(x.shape),)]
    if len(x.shape) == 4 and not workspace:  # columns that are no whole vectors
        wider = (1, 4, 8) if x.dtype == jnp.float8_e4m3fn else (1, 4)
        wider = (1, 2) if x.dtype == jnp.uint32 else wider
        wider = (1,) if (target, kind, place) in _BIAS else wider  # of which more are right
        shapes += [_with(x.shape, 3, x.shape[3] + n) for n in wider]
    yield from (Struct(shape, x.dtype) for shape in shapes)
    # Where XLA's binding knows the dtype, one other is enough.
    other = {"int32": ("float32",), "float32": ("float16",)}
    for name in other.get(x.dtype.name, ("int32", "uint8", "float8_e4m3fn", "float32", "float16")):
        if name != x.dtype.name and name not in _MAY_BE.get((target, kind, place), ()):
            yield Struct(x.shape, jnp.dtype(name))


def _wrong_values(name: str, value: Any) -> list[Any]:
    beyond = [-(2**63), -1, 1000, 2**31, 2**62, 2**63 - 1]
    if name in ("scale", "soft_cap"):
        numbers = [-1, math.nan, math.inf, -math.inf, 1e-40] + [0] * (name == "scale")
        return [np.float32(x) for x in numbers]
    if name.startswith("num_heads"):
        return [*beyond, 0, 3]
    if name == "head_dim_v":
        return [*beyond, 0, 12, value - 8, value + 8, value + 16, 584]
    if name == "first_column_v":
        return [*beyond, value + 1, value + 4, value + 8, value + 16]
    if name == "dropout":
        return [*(x for x in beyond if x != 1000), 2**18, 0 if value else 1000]
    if name == "split_size":
        return [-128, 64, 2**31, 2**62]
    return beyond if name.startswith(("first_head", "kv_layout")) else []  # not of a window


def _with(shape: tuple[int, ...], place: int, size: int) -> tuple[int, ...]:
    return (*shape[:place], size, *shape[place + 1 :])
