"""The tangent kernel on a Hopper GPU, against the tangents of the oracle by the rule of tolerance."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import CAUSAL, TABLE, Case
from helpers import ROWS, Results, assert_rounded, equal, poison
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from long_cases import LONG
from lowering import lower, targets
from meshes import make_mesh

import jax_fa3
from jax_fa3 import _reference

pytestmark = pytest.mark.gpu

ALL = [*TABLE, *LONG]
CASES = {case.name: case for case in ALL}
attention = functools.partial(
    jax_fa3.dot_product_attention, implementation="fa3", return_residual=True
)
DTYPES = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])


@functools.partial(jax.jit, static_argnums=(0, 1))
def oracles(case: Case, dtype: Any, inputs: Any, tangents: Any) -> tuple[Results, Results]:
    """Exact in fp32, and rounded to dtype: what the tolerance is taken from."""
    inputs, tangents = ([x.astype(jnp.float32) for x in group] for group in (inputs, tangents))

    def along(round_to: Any) -> Results:
        function = functools.partial(_reference.attention, **case.arguments, round_to=round_to)
        with jax.default_matmul_precision("highest"):
            return Results(*jax.jvp(function, inputs, tangents)[1])

    exact, rounded = along(None), along(dtype)
    narrow = lax.optimization_barrier(rounded.out.astype(dtype)).astype(jnp.float32)
    return exact, rounded._replace(out=narrow)


def check(case: Case, dtype: Any, inputs: Any, tangents: Any, rows: int = ROWS) -> None:
    poison(case, dtype)
    call = functools.partial(attention, **case.arguments)
    results, found = jax.jit(functools.partial(jax.jvp, call))(inputs, tangents)
    assert found[0].dtype == dtype and found[1].dtype == jnp.float32
    assert equal(results, jax.jit(call)(*inputs))
    exact, rounded = oracles(case, dtype, inputs, tangents)
    assert_rounded(Results(*found), exact, rounded, case, jnp.finfo(dtype).eps, rows)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, jnp.bfloat16) for case in ALL[::2]] + [(case, jnp.float16) for case in ALL[1::4]],
    ids=str,
)
def test_table(case: Case, dtype: Any):
    check(case, dtype, case.inputs(dtype), case.inputs(dtype, seed=1))


VALUES = {
    "mean": lambda x: 1 + 0.3 * x,
    "1e-3": lambda x: 1e-3 * x,
    "30": lambda x: 30 * x,
    "one sign": jnp.abs,
}


@DTYPES
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("values", VALUES)
def test_values(values: str, head_dim: int, dtype: Any):
    """Of query and key, and of their tangents."""
    case = Case(f"tangents of values {values}", 300, 333, 4, 2, head_dim, mask=CAUSAL)
    change = VALUES[values]

    def changed(seed: int) -> tuple[Array, ...]:
        query, key, value = (x.astype(jnp.float32) for x in case.inputs(dtype, seed))
        return tuple(x.astype(dtype) for x in (change(query), change(key), value))

    # At scale 30 few rows see more than one key that counts, and so have any error.
    check(case, dtype, changed(0), changed(1), case.T if values == "30" else ROWS)


def test_finite_differences():
    """Of the oracle in fp64."""
    case = Case("finite differences", 200, 260, 4, 2, 128, mask=CAUSAL, logits_soft_cap=3.0)
    inputs, tangents = (case.inputs(jnp.bfloat16, seed=i) for i in (0, 1))
    call = functools.partial(attention, **case.arguments)
    found = jax.jit(functools.partial(jax.jvp, call))(inputs, tangents)[1]
    _, rounded = oracles(case, jnp.bfloat16, inputs, tangents)
    with jax.enable_x64(True):
        step = 1e-5
        wide, along = ([x.astype(jnp.float64) for x in group] for group in (inputs, tangents))
        ahead, behind = (
            _reference.attention(
                *(x + sign * step * t for x, t in zip(wide, along, strict=True)), **case.arguments
            )
            for sign in (1, -1)
        )
        exact = Results(*((x - y) / (2 * step) for x, y in zip(ahead, behind, strict=True)))
    assert_rounded(Results(*found), exact, rounded, case, jnp.finfo(jnp.bfloat16).eps)


@pytest.mark.parametrize("name", ["long, causal", "long, documents"])
def test_bit_equal(name: str):
    case = CASES[name]
    inputs, tangents = case.inputs(jnp.bfloat16), case.inputs(jnp.bfloat16, seed=1)
    call = functools.partial(attention, **case.arguments)
    pushed = jax.jit(functools.partial(jax.jvp, call))
    first = pushed(inputs, tangents)
    for _ in range(50):
        poison(case, jnp.bfloat16)
        assert equal(first, pushed(inputs, tangents))


def test_sinks_move():
    """By the sum of what two tangents give."""
    case = Case("tangents of sinks", 200, 260, 4, 2, 128, mask=CAUSAL)
    inputs = case.inputs(jnp.bfloat16)
    sinks, along = jnp.arange(4.0), jnp.array([1.0, -2.0, 3.0, 0.5])

    def function(implementation: Any, sinks: Array, *qkv: Array) -> Any:
        call = functools.partial(jax_fa3.dot_product_attention, implementation=implementation)
        return call(*qkv, sinks=sinks, return_residual=True, **CAUSAL)

    moved = case.inputs(jnp.bfloat16, seed=1)
    found, exact = (
        jax.jvp(functools.partial(function, x), (sinks, *inputs), (along, *moved))[1]
        for x in ("fa3", "xla")
    )
    for x, y in zip(found, exact, strict=True):
        assert jnp.allclose(x.astype(jnp.float32), y.astype(jnp.float32), rtol=0.02, atol=0.03)


def test_linearize_and_vmap():
    """The same tangents one by one, and all at once as more batch entries."""
    case = CASES["long, causal"]
    inputs = case.inputs(jnp.bfloat16)
    call = functools.partial(attention, **case.arguments)
    tangents = [case.inputs(jnp.bfloat16, seed=i) for i in (1, 2)]
    _, linear = jax.linearize(call, *inputs)
    each = [jax.jit(linear)(*x) for x in tangents]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *tangents)
    at_once = jax.jit(jax.vmap(linear))(*stacked)
    assert equal(at_once, jax.tree.map(lambda *x: jnp.stack(x), *each))
    assert equal(each[0], jax.jit(functools.partial(jax.jvp, call))(inputs, tangents[0])[1])


def on_mesh(kind: AxisType, function: Any, in_shard_map: bool = False) -> Any:
    """The function on one device, as the axes of a mesh split it."""
    spec = P("dp", None, "tp", None)

    def call(*operands: Array) -> Any:
        mesh, split = make_mesh(kind, "gpu", dp=1, tp=1), function
        if in_shard_map:
            results = spec, P("dp", None, "tp")
            specs: Any = {"in_specs": (spec,) * 6, "out_specs": (results, results)}
            split = jax.shard_map(function, mesh=mesh, **specs)
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in operands]
            return jax.jit(split)(*placed)

    return call


def scanned(function: Any) -> Any:
    def call(*operands: Array) -> Any:
        found = lax.scan(lambda c, x: (c, function(*x)), 0, [x[None] for x in operands])[1]
        return jax.tree.map(lambda x: x[0], found)

    return jax.jit(call)


WAYS: dict[str, tuple[Any, Any]] = {
    "eager": (lambda f: f, lambda f: f),
    "of jit": (jax.jit, jax.jit),
    "of remat": (jax.checkpoint, jax.jit),
    "scan": (lambda f: f, scanned),
    "explicit": (lambda f: f, functools.partial(on_mesh, AxisType.Explicit)),
    "automatic": (lambda f: f, functools.partial(on_mesh, AxisType.Auto)),
    "shard_map": (lambda f: f, functools.partial(on_mesh, AxisType.Auto, in_shard_map=True)),
}


@pytest.mark.parametrize("way", WAYS)
def test_transformations(way: str):
    """Bit by bit what jax.jit gives."""
    case = Case("tangents, GQA", 200, 260, 4, 2, 64, mask=CAUSAL)
    operands = *case.inputs(jnp.bfloat16), *case.inputs(jnp.bfloat16, seed=1)

    def pushed(function: Any) -> Any:
        return lambda *x: jax.jvp(function, x[:3], x[3:])

    call = functools.partial(attention, is_causal=True)
    inner, outer = WAYS[way]
    assert equal(outer(pushed(inner(call)))(*operands), jax.jit(pushed(call))(*operands))


@pytest.mark.parametrize("what", ["bias", "mask"])
def test_what_the_kernel_does_not_take(what: str):
    """Goes through XLA, beside the kernel of the forward."""
    case = Case(f"tangents, {what}", 200, 260, 4, 2, 64)
    inputs, tangents = (case.inputs(jnp.bfloat16, seed=i) for i in (0, 1))
    dense = jax.random.normal(jax.random.key(0), (2, 1, 200, 260), jnp.bfloat16)
    options = {"bias": dense} if what == "bias" else {"mask": dense > 0}
    found, exact = (
        jax.jit(lambda f, *x: jax.jvp(f, *x)[1], static_argnums=0)(
            functools.partial(attention, **options | {"implementation": x}), inputs, tangents
        )
        for x in ("fa3", "xla")
    )
    for x, y in zip(found, exact, strict=True):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        assert jnp.allclose(x, y, rtol=0.02, atol=0.03)


def test_one_kernel_each():
    case = CASES["long, causal"]
    inputs = case.inputs(jnp.bfloat16)
    call = functools.partial(attention, **case.arguments)
    text = lower(functools.partial(jax.jvp, call), inputs, inputs)
    assert targets(text) == ["jax_fa3.fwd.v1", "jax_fa3.jvp.v1"]


def test_both_modes_in_one_step():
    """As MeanFlow has it: the tangent kernel beside forward and backward; against XLA."""
    case = Case("both modes", 256, 256, 4, 2, 128)
    inputs, along = case.inputs(jnp.bfloat16), case.inputs(jnp.bfloat16, seed=1)

    def loss(implementation: Any, *qkv: Array) -> Array:
        call = functools.partial(jax_fa3.dot_product_attention, implementation=implementation)
        out, tangent = jax.jvp(call, qkv, along)
        target = lax.stop_gradient(out - 0.1 * tangent + 1)
        return jnp.square((out - target).astype(jnp.float32)).mean()

    step = functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    compiled = jax.jit(step(functools.partial(loss, "fa3"))).lower(*inputs).compile()
    found = compiled(*inputs)
    exact = jax.jit(step(functools.partial(loss, "xla")))(*inputs)
    names = ("jax_fa3.fwd.v1", "jax_fa3.jvp.v1", "jax_fa3.bwd.v1")
    text = compiled.as_text() or ""
    assert all(f'custom_call_target="{x}"' in text for x in names)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        assert jnp.allclose(x, y, rtol=0.05, atol=0.02 * float(jnp.abs(y).max()))
