"""Context parallelism on two Hopper GPUs and more, by the kernels."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import CAUSAL, Case
from helpers import assert_rounded, both_oracles
from masks import documents, ints, key_lengths, packed
from sequences import Split

from jax_fa3 import context_parallel

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _two_gpus(hopper):
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")


TEXT = packed(documents(700, 17, 300, 900, 131, ids=(3, 0, 7, -1, 2)))
PAST = {"query_seq_lengths": ints(1500, 3), **key_lengths(1111, 2048)}
CASES = [
    Case("causal", 2048, 2048, 8, 2, 128, B=1, mask=CAUSAL),
    Case("documents", 2048, 2048, 8, 4, 64, B=1, mask={**TEXT, **CAUSAL}),
    Case("window", 1024, 2048, 4, 4, 128, B=2, mask={"local_window_size": (700, 30)}),
    Case("planted", 2048, 2048, 4, 4, 128, mask={**PAST, **CAUSAL}, planted=True),
    Case("80 columns", 1024, 1024, 4, 2, 80, B=2, mask=CAUSAL),
    Case("full, soft cap", 1536, 1536, 8, 4, 192, 128, B=1, logits_soft_cap=5.0),
]
oracles = jax.jit(both_oracles, static_argnums=(0, 1))


@pytest.mark.parametrize("mesh", ["two", "four"])
@pytest.mark.parametrize("strategy", ["ring", "all_gather", "all_to_all"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(case: Case, strategy: str, mesh: str):
    split = Split(strategy, mesh=mesh, inside=False)
    if jax.device_count() < split.devices:
        pytest.skip(f"needs {split.devices} GPUs")
    found = split.results(case, jnp.bfloat16, implementation="fa3")
    inputs, cotangents = case.inputs("bfloat16"), case.cotangents("bfloat16")
    exact, rounded = oracles(case, jnp.bfloat16, inputs, cotangents)
    found, exact, rounded = jax.device_get((found, exact, rounded))
    assert_rounded(found, exact, rounded, case, jnp.finfo(jnp.bfloat16).eps)


def gradients(mesh: str) -> Any:
    """Compiled, with the same length on each GPU."""
    split = Split(mesh=mesh)
    length = 8192 * split.size
    shapes = [(1, length, n, 128) for n in (8, 8, 8)]
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def loss(*qkv: Any) -> jax.Array:
        out = context_parallel.dot_product_attention(
            *qkv, axis_name="sp", zigzag=True, sharding=split.sharding, is_causal=True
        )
        return out.sum(dtype=jnp.float32)

    spec = split.sharding
    function = jax.jit(jax.grad(loss, (0, 1, 2)), in_shardings=spec, out_shardings=spec)
    return function.lower(*operands).compile()


def test_ring_holds_few_parts_however_many_there_are():
    """Forward and backward: never are two parts under way, and of four GPUs each has temporary memory
    for one more of them than of three at most. XLA gives what is sent and what arrives three places
    in turn, where of three GPUs two will do; of two there is only one hop."""
    if jax.device_count() < 4:
        pytest.skip("needs four GPUs")
    three, four = map(gradients, ("three", "four"))
    events = re.findall(r"%collective-permute-(start|done)[.\d]* = ", four.as_text())
    assert len(events) >= 2 * 6 and events == ["start", "done"] * (len(events) // 2)

    def temporaries(compiled: Any) -> int:
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    travels = 8192 * 8 * (128 + 128) * (2 + 4)  # K and V, and their gradients in fp32
    assert temporaries(four) < temporaries(three) + travels


def test_ring_sums_in_place():
    """XLA copies neither what the forward joins nor the sum of dq: 8192 rows, 8 heads of 128."""
    mesh = "four" if jax.device_count() >= 4 else "two"
    copies = re.findall(r"= (\w+)\[([\d,]+)\]\S* copy\(", gradients(mesh).as_text())
    sizes = [math.prod(map(int, shape.split(","))) for _, shape in copies]
    assert max(sizes, default=0) < 8192 * 8 * 128, copies
