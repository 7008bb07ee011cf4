"""Attention over a split sequence equals that of one device, forward and gradients, by every
strategy. On virtual CPU devices, where plain JAX stands in for the kernels."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CAUSAL, Case
from helpers import Results, assert_rounded, assert_same, both_oracles, oracle
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import hide_gpus, lower, targets
from masks import documents, ints, key_lengths, packed, scattered
from sequences import PER_ROW, Split

import jax_fa3
from jax_fa3 import _row_blocks, context_parallel
from jax_fa3.context_parallel import to_zigzag


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    hide_gpus(monkeypatch)


def case(name: str, mask: Any, **fields: Any) -> Case:
    fields = {"T": 32, "S": 32, "H": 8, "V": 16} | fields
    return Case(name, mask=mask, **fields)


def both(mask: dict[str, Any]) -> dict[str, Any]:
    """For two batch entries."""
    return {k: np.concatenate([x, x[:, ::-1]]) for k, x in mask.items()}


# Some segments lie within one device's chunk, some span several.
DOCUMENTS = both(packed(documents(1, 13, 2, 9, 7, ids=(3, 0, 7, -1, 2))))
BROKEN = both(packed(documents(10, 2, 12, 8, ids=(0, 1, 0, 2))))
PAST = {"query_seq_lengths": ints(21, 3), **key_lengths(18, 40)}
FULL = case("full", {}, N=2)
CAUSAL_CASE = case("causal", CAUSAL, B=1)
MQA = case("K = 1", CAUSAL, N=8, K=1)
LONGER_KEYS = case("S > T", {**CAUSAL, "query_offset": 11}, S=48)
WINDOW = case("window", {"local_window_size": (9, 3), "query_offset": ints(-4, 2)})
TEXT = case("documents", {**DOCUMENTS, **CAUSAL})
BROKEN_TEXT = case("broken run, window", {**BROKEN, "local_window_size": 10, **key_lengths(29, 32)})
NO_BATCH = case("batch 0", CAUSAL, B=0)
PLANTED = case("planted", {**PAST, **CAUSAL}, S=48, planted=True)
INTERVALS = case("intervals", scattered(2, 32, 32, 9), logits_soft_cap=2.0, scale=0.4)


@pytest.mark.parametrize(
    ("problem", "split"),
    [
        (FULL, Split("ring", False, "heads")),
        (CAUSAL_CASE, Split("ring", True, "sequence")),
        (LONGER_KEYS, Split("ring", True, "heads", inside=False)),
        (WINDOW, Split("ring", True, "heads", check_vma=False)),
        (TEXT, Split("ring", True, "batch")),
        (TEXT, Split("ring", False, "heads", inside=False)),
        (BROKEN_TEXT, Split("ring", True, "heads")),
        (PLANTED, Split("ring", True, "heads", check_vma=False)),
        (INTERVALS, Split("ring", True, "heads", inside=False)),
        (CAUSAL_CASE, Split("all_gather", False, "sequence")),
        (WINDOW, Split("all_gather", True, "heads", inside=False)),
        (TEXT, Split("all_gather", True, "batch")),
        (PLANTED, Split("all_gather", True, "batch", check_vma=False)),
        (MQA, Split("all_to_all", True, "batch")),
        (WINDOW, Split("all_to_all", False, "batch", check_vma=False)),
        (BROKEN_TEXT, Split("all_to_all", True, "batch", inside=False)),
        (PLANTED, Split("all_to_all", False, "batch")),
        (INTERVALS, Split("all_to_all", True, "two")),
        (NO_BATCH, Split("ring", True, "two")),
        (NO_BATCH, Split("all_to_all", False, "two")),
    ],
    ids=str,
)
def test_equals_one_device(problem: Case, split: Split):
    found = split.results(problem, jnp.float32, implementation="xla")
    assert_same(found, on_one_device(problem), rtol=1e-5)


@functools.cache
def on_one_device(problem: Case) -> Results:
    inputs, cotangents = problem.inputs("float32"), problem.cotangents("float32")
    call = jax.jit(functools.partial(oracle, problem, jnp.float32))
    return call(inputs, cotangents)


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "all_to_all"])
def test_bfloat16(strategy: str):
    """By the path that the kernels take, implementation=None."""
    found = Split(strategy, mesh="two").results(LONGER, jnp.bfloat16)
    assert found.dq.dtype == found.out.dtype == jnp.bfloat16
    assert_rounded(found, *on_one_device_in_bfloat16(), LONGER, jnp.finfo(jnp.bfloat16).eps)


LONGER = case("bf16", CAUSAL, T=128, S=128)


@functools.cache
def on_one_device_in_bfloat16() -> tuple[Results, Results]:
    call = jax.jit(functools.partial(both_oracles, LONGER, jnp.bfloat16))
    return call(LONGER.inputs("bfloat16"), LONGER.cotangents("bfloat16"))


@pytest.mark.parametrize("strategy", ["all_gather", "all_to_all"])
def test_segments_in_another_order_give_nan(strategy: str):
    """In natural order where zigzag is said, or the other way round, a run is torn apart."""
    ids = np.arange(32)[None] // 16
    q, k, v = CAUSAL_CASE.inputs("float32")
    call = functools.partial(context_parallel.dot_product_attention, q, k, v, axis_name="sp")
    split = Split(strategy, mesh="two")
    for zigzag in (True, False):
        told = ids if zigzag else to_zigzag(ids, 2)
        segments: Any = dict.fromkeys(PER_ROW & set(DOCUMENTS), told)
        options: Any = {"strategy": strategy, "sharding": split.sharding, "zigzag": zigzag}
        out = call(**segments, **options, implementation="xla")
        assert jnp.isnan(out[told == 0]).all()


def loss(split: Split, **arguments: Any) -> Any:
    options: Any = {"strategy": split.strategy, "zigzag": split.zigzag, **arguments}

    def function(*qkv: Array) -> Array:
        attention = context_parallel.dot_product_attention
        out = attention(*qkv, axis_name="sp", sharding=split.sharding, is_causal=True, **options)
        return out.sum(dtype=jnp.float32)

    return function


def operands(length: int, size: int, dtype: Any = jnp.bfloat16) -> list[Any]:
    """Query, key and value of `length` per device."""
    return [jax.ShapeDtypeStruct((1, length * size, n, 64), dtype) for n in (4, 2, 2)]


SEND, STEP = ["collective_permute"], ["jax_fa3.fwd.v1", "optimization_barrier"]


def test_ring_sends_before_it_computes():
    """One kernel call a step, whatever the mask, with results in fp32 but the last; the next K and V
    leave before it, as one array, but not before the step before is done. On GPUs XLA takes the
    barriers out after it has scheduled; on CPUs before."""
    text = lower(loss(Split(mesh="four"), query_segment_ids=IDS, key_value_segment_ids=IDS), *QKV)
    assert targets(text) == ["jax_fa3.segment_intervals.v1"] + ["jax_fa3.fwd.v1"] * 4
    assert re.findall("|".join({*SEND, *STEP}), text) == [*SEND, *STEP] * 3 + STEP[:1]
    calls = re.findall(
        r"@jax_fa3.fwd.v1\(.*-> \((.*), tensor<0xf32>, tensor<1xi32>, tensor<0xf32>\)", text
    )
    partial, lse = "tensor<1x32x4x64xf32>", "tensor<1x4x32xf32>"
    assert calls == [f"{partial}, {lse}"] * 3 + [f"tensor<1x32x4x64xbf16>, {lse}"]


def test_ring_goes_back_after_the_forward():
    """The backward's first part waits behind a barrier for what the forward makes last; or XLA sends it
    beside the forward's own."""
    text = lower(jax.grad(loss(Split(mesh="four")), (0, 1, 2)), *QKV)
    events = re.findall("|".join({*SEND, *STEP, "jax_fa3.bwd.v1"}), text)
    between = events[len(events) - events[::-1].index(STEP[0]) : events.index("jax_fa3.bwd.v1")]
    assert between == [STEP[1], *SEND]


QKV, IDS = operands(32, 4), np.zeros((1, 128), np.int32)


def test_ring_memory_is_linear(monkeypatch):
    monkeypatch.setattr(_row_blocks, "BLOCK_SCORES", 2**12)  # or scores are most of it
    split = Split(mesh="four")

    def temporaries(length: int) -> int:
        gradients = jax.grad(loss(split), (0, 1, 2))
        split_as = split.sharding
        function = jax.jit(gradients, in_shardings=split_as, out_shardings=split_as)
        memory = function.lower(*operands(length, 4, jnp.float32)).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporaries(512) < 2.1 * temporaries(256)


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "all_to_all"])
def test_saved_by_name(strategy: str):
    """With the policy, neither the kernels nor the exchanges of the forward run again."""
    function = loss(Split(strategy, mesh="four"))
    policy = jax.checkpoint_policies.save_only_these_names(*jax_fa3.RESIDUAL_NAMES)

    def forwards(**options: Any) -> int:
        remat = jax.checkpoint(function, **options)
        text = lower(jax.value_and_grad(remat, (0, 1, 2)), *QKV)
        return targets(text).count("jax_fa3.fwd.v1")

    once = 4 if strategy == "ring" else 1
    assert (forwards(), forwards(policy=policy)) == (2 * once, once)
    function = loss(Split(strategy, mesh="four"), checkpoint_name="context")
    assert forwards(policy=jax.checkpoint_policies.save_only_these_names("context")) == once


def test_explicit_mesh():
    """Results and gradients carry the sharding in their types; small arrays may lie anywhere."""
    q, k, v = TEXT.inputs("float32")
    mesh = jax.make_mesh((2, 2), ("data", "sp"), axis_types=(AxisType.Explicit,) * 2)
    sharding = NamedSharding(mesh, P("data", "sp"))

    def attention(*qkv: Array, **options: Any) -> Array:
        options |= {"axis_name": "sp", "sharding": sharding, "strategy": "all_gather"}
        return context_parallel.dot_product_attention(*qkv, **TEXT.arguments, **options)

    out, pullback = jax.vjp(jax.jit(attention), *jax.device_put((q, k, v), sharding))
    for x in (out, *pullback(out)):
        assert jax.typeof(x).sharding.spec == P("data", "sp", None, None)
    one = jax_fa3.dot_product_attention(q, k, v, **TEXT.arguments, implementation="xla")
    np.testing.assert_allclose(out, one, atol=1e-5)


def test_vmap():
    problem = case("vmap", CAUSAL, B=3)
    q, k, v = problem.inputs("float32")
    split = Split(mesh="two")

    def attention(q: Array, k: Array, v: Array) -> Array:
        return context_parallel.dot_product_attention(
            q, k, v, axis_name="sp", is_causal=True, implementation="xla"
        )

    def local(q: Array, k: Array, v: Array) -> Array:
        return jax.vmap(attention, (0, None, 0))(q, k[0], v)

    specs = P(None, "sp")
    call = jax.jit(jax.shard_map(local, mesh=split.sharding.mesh, in_specs=specs, out_specs=specs))
    one = jax_fa3.dot_product_attention(
        q, k[np.zeros(3, int)], v, is_causal=True, implementation="xla"
    )
    np.testing.assert_allclose(call(q, k, v), one, atol=1e-5)
