"""The handlers refuse wrong calls before they launch anything: checked here on a CPU, where a right
call gets as far as the launch. On a GPU: test_gpu_boundary."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from recorded_calls import Call, all_recorded
from right_calls import right_calls, without_heads
from wrong_calls import REFUSED, outcome, wrong_calls, wrong_throughout

import jax_fa3
from jax_fa3 import _ffi, _targets, context_parallel, fp8

pytestmark = pytest.mark.skipif(not _ffi.is_built(), reason="no kernels in this install")
CALLS = right_calls()
LAUNCHES = "UNIMPLEMENTED: jax_fa3: device: got one that is no CUDA device, wanted an NVIDIA Hopper"


@pytest.fixture(scope="module")
def cpu():
    """A CPU, on which the handlers are registered, too."""
    assert _ffi._C is not None
    for name, handler in _ffi._C.ffi_targets().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu", api_version=1)
    return jax.local_devices(backend="cpu")[0]


def test_every_target_is_called():
    assert {call.target for call in CALLS.values()} == set(_targets.TARGETS)


@functools.cache
def wrong_calls_of_each() -> dict[str, dict[str, Call]]:
    """Without those that an earlier call of the same target has as well."""
    seen: set[tuple[str, str]] = set()
    found = {}
    for name, call in CALLS.items():
        wrong = {x: y for x, y in wrong_calls(call) if (call.target, x) not in seen}
        seen |= {(call.target, x) for x in wrong}
        found[name] = wrong
    return found


@pytest.mark.parametrize("name", CALLS)
def test_one_thing_wrong(cpu, name):
    assert outcome(CALLS[name], cpu).startswith(LAUNCHES)
    found = {what: outcome(call, cpu) for what, call in wrong_calls_of_each()[name].items()}
    assert {x: y for x, y in found.items() if not re.match(REFUSED, y)} == {}
    is_first = name == next(x for x, y in CALLS.items() if y.target == CALLS[name].target)
    assert sum("jax_fa3: " in message for message in found.values()) >= (20 if is_first else 0)


def test_wrong_throughout(cpu):
    found = {what: outcome(call, cpu) for what, call in wrong_throughout()}
    assert {x: y for x, y in found.items() if "INVALID_ARGUMENT: jax_fa3: " not in y} == {}
    assert len(found) >= 25


@pytest.mark.parametrize("side", ["window_left", "window_right"])
@pytest.mark.parametrize("distance", [-(2**63), 2**63 - 1, 0])
def test_windows_of_every_size_are_right(cpu, side, distance):
    call = CALLS["fwd"]
    call = dataclasses.replace(call, attributes={**call.attributes, side: distance})
    assert outcome(call, cpu).startswith(LAUNCHES)


@pytest.mark.parametrize("name", ["fwd", "bwd", "bwd packed", "fp8", "quantize"])
def test_messages_name_what_is_wrong(cpu, name):
    """Of the operands that are not judged by one another alone."""
    call = CALLS[name]
    for i, x in enumerate(call.operands):
        if x.dtype == "int32" and i > 0:
            wrong = jax.ShapeDtypeStruct((*x.shape, 1), x.dtype)
            operands = (*call.operands[:i], wrong, *call.operands[i + 1 :])
            message = outcome(dataclasses.replace(call, operands=operands), cpu)
            shapes = re.escape(f"got shape {list(wrong.shape)}, wanted {list(x.shape)}")
            assert re.search(rf"jax_fa3: (query|key|lengths)\w*: {shapes}", message)


@pytest.mark.parametrize(
    "name", ["fwd", "bwd", "bwd packed", "fp8", "quantize", "segment_intervals", "decode"]
)
def test_messages_name_the_array(cpu, name):
    """Whichever operand or result is wrong."""
    call = CALLS[name]
    table = _targets.TARGETS[call.target]
    for kind, rows in zip(("operands", "results"), table, strict=True):
        arrays = getattr(call, kind)
        for i, (row, x) in enumerate(zip(rows, arrays, strict=True)):
            other = "int32" if "uint8" in row.dtypes else "uint8"
            wrong = jax.ShapeDtypeStruct(x.shape, jnp.dtype(other))
            changed = {kind: (*arrays[:i], wrong, *arrays[i + 1 :])}
            message = outcome(dataclasses.replace(call, **changed), cpu)
            assert f"jax_fa3: {row.name}: got {other}, wanted " in message


@pytest.mark.parametrize("name", ["bwd in parts", "bwd packed in parts"])
def test_parts(cpu, name):
    """Any number up to the greatest, in exactly their shape; or no parts."""
    call = CALLS[name]
    *others, parts, dsinks, dbias, dalibi, drelative = call.results
    splits, *shape = parts.shape
    assert splits == 3

    def given(*shape: int) -> str:
        results = (
            *others,
            jax.ShapeDtypeStruct(shape, jnp.float32),
            dsinks,
            dbias,
            dalibi,
            drelative,
        )
        return outcome(dataclasses.replace(call, results=results), cpu)

    assert all(given(n, *shape).startswith(LAUNCHES) for n in (0, 1, 2, 5))
    assert given(0).startswith(LAUNCHES)
    for wrong in ([3, *shape, 1], [3 * shape[0], *shape[1:]], [3]):
        assert f"dkv_parts: got shape {wrong}, wanted [{wrong[0]}, " in given(*wrong)
    assert "dkv_parts: got [1025, 1, 1, 1, 1], wanted at most 1024 splits" in given(
        1025, 1, 1, 1, 1
    )


@pytest.mark.parametrize("name", ["fwd", "bwd", "bwd packed", "fp8"])
def test_no_query_heads(cpu, name):
    """Nothing to compute, but gradients of keys and values that are to be 0."""
    assert outcome(without_heads()[name], cpu).startswith(LAUNCHES if "bwd" in name else "runs")


SIZES = [
    (2, 16, 24, 4, 2, 64, 64),
    (3, 200, 333, 6, 3, 72, 40),
    (1, 130, 64, 4, 4, 192, 128),
    (2, 65, 65, 2, 1, 256, 256),
    (2, 0, 24, 4, 2, 128, 128),
    (2, 16, 0, 4, 2, 128, 128),
    (0, 16, 24, 4, 2, 64, 64),
    (2, 16, 24, 0, 0, 64, 64),
]


def masks(batch: int, length: int, key_length: int) -> dict[str, dict[str, Any]]:
    def zeros(*shape: int) -> Any:
        return jnp.zeros(shape, jnp.int32)

    ids = {"query_segment_ids": zeros(batch, length)}
    ids["key_value_segment_ids"] = zeros(batch, key_length)
    lengths = {"query_seq_lengths": zeros(batch), "key_value_seq_lengths": zeros(batch)}
    return {
        "none": {},
        "causal": {"is_causal": True, "deterministic_backward": True, "query_offset": zeros()},
        "lengths": {**lengths, "is_causal": True, "query_offset": zeros(batch)},
        "segments": {**ids, "logits_soft_cap": 3.0},
        "intervals": {"key_end": zeros(batch, length), "local_window_size": 3},
    }


def grad(attention: Any, **options: Any) -> Any:
    def loss(*operands: Any) -> Any:
        out, lse = attention(*operands, return_residual=True, **options)
        return out.astype(jnp.float32).sum() + lse.sum()

    return lambda *operands: jax.grad(loss, tuple(range(len(operands))))(*operands)


def check_all(device: Any, function: Any, *operands: Any) -> int:
    calls = all_recorded(function, *operands)
    found = {str(call): outcome(call, device) for call in calls}  # XLA drops those without results
    wrong = {x: y for x, y in found.items() if y != "runs" and not y.startswith(LAUNCHES)}
    assert wrong == {}
    return len(calls)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_calls_that_the_library_makes(cpu, sizes):
    """Refused is none of them."""
    b, t, s, n, k, h, v = sizes
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    operands = [struct(shape) for shape in ((b, t, n, h), (b, s, k, h), (b, s, k, v))]
    mapped = [struct((3, *operands[0].shape)), *operands[1:]]
    count = 0
    for options in masks(b, t, s).values():
        attention = grad(jax_fa3.dot_product_attention, **options)
        count += check_all(cpu, attention, *operands)
        count += check_all(cpu, jax.vmap(attention, (0, None, None)), *mapped)
        if h == v:
            count += check_all(cpu, grad(fp8.dot_product_attention, **options), *operands)
    packed = functools.partial(jax_fa3.qkv_dot_product_attention, num_kv_heads=k, is_causal=True)
    count += check_all(cpu, grad(packed), struct((b, t, n + 2 * k, h)))
    assert count >= 22 or not n


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "all_to_all"])
@pytest.mark.parametrize("dims", [(64, 64), (192, 128), (72, 40)])
def test_the_calls_that_context_parallelism_makes(cpu, strategy, dims):
    shapes = (2, 64, 8, dims[0]), (2, 64, 4, dims[0]), (2, 64, 4, dims[1])
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    mesh = Mesh(np.array(jax.local_devices(backend="cpu")[:4]), ("s",))
    options: Any = {"axis_name": "s", "strategy": strategy, "zigzag": True}
    options["sharding"] = NamedSharding(mesh, P(None, "s"))
    for mask in ("causal", "segments"):
        given = {**options, **masks(2, 64, 64)[mask]}
        assert check_all(cpu, grad(context_parallel.dot_product_attention, **given), *operands) >= 2
