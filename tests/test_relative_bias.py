"""relative_bias: its term and its gradient through every transformation, here in plain JAX; what the
kernels are given. On a GPU: test_gpu_relative_bias."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CAUSAL, Case
from distances import assert_table, table_of
from helpers import assert_close
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import lower, targets
from test_ffi import needs_kernels

import jax_fa3
from jax_fa3 import _reference, _targets, context_parallel, fp8

B, T, S, N, K, H = 2, 10, 12, 4, 2, 8
CASE = Case("distance", T, S, N, K, H, B=B, mask=CAUSAL)
attention = functools.partial(jax_fa3.dot_product_attention, return_residual=True)


def inputs(farthest: int = 3) -> tuple[Array, ...]:
    return *CASE.inputs(jnp.float32), table_of(CASE, farthest)


def grads(function: Any, cotangents: Any, *arrays: Array, **options: Any) -> Any:
    options = {**CAUSAL, "sinks": jnp.ones(N), **options}

    def loss(q: Array, k: Array, v: Array, table: Array) -> Array:
        found = function(q, k, v, relative_bias=table, **options)
        pairs = zip(found, cotangents, strict=True)
        return jnp.asarray(sum((jnp.nan_to_num(x, neginf=0) * y).sum() for x, y in pairs))

    return jax.value_and_grad(loss, (0, 1, 2, 3))(*arrays)


@pytest.mark.parametrize("farthest", [0, 3, 9, 40])
@pytest.mark.parametrize(
    "offset", [0, 3, -20, 2**40, jnp.int32(2), np.array([1, -3]), np.array([2**40, -(2**40)])]
)
def test_results_and_gradients(farthest: int, offset: Any):
    """Distances are from the row's position, as masks have it."""
    arrays, cotangents = inputs(farthest), CASE.cotangents(jnp.float32)
    options: Any = {"is_causal": False, "query_offset": offset}
    found = grads(attention, cotangents, *arrays, **options)
    options["query_offset"] = np.clip(offset, -(10**6), 10**6)
    assert_close(found, grads(_reference.attention, cotangents, *arrays, **options), 1e-4)


def test_a_table_that_says_the_same_as_slopes():
    *tensors, slopes = *CASE.inputs(jnp.float32), jnp.asarray((0.5, 0.25, -0.1, 0.02))
    table = slopes[:, None] * jnp.arange(-S, S + 1)
    wanted = attention(*tensors, alibi_slopes=slopes, is_causal=True)
    assert_close(attention(*tensors, relative_bias=table, is_causal=True), wanted, 1e-5)


@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit, "argument"], ids=str)
def test_over_devices(kind: Any):
    arrays, cotangents = inputs(), CASE.cotangents(jnp.float32)
    exact = grads(_reference.attention, cotangents, *arrays)
    call = jax.jit(functools.partial(grads, attention))
    if kind is None:
        return assert_close(call(cotangents, *arrays), exact, 1e-4)
    kinds = (AxisType.Auto if kind == "argument" else kind,) * 2
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"), axis_types=kinds)
    where = NamedSharding(mesh, P("x", None, "y"))
    if kind == "argument":
        call = jax.jit(functools.partial(grads, attention, sharding=where))
        return assert_close(call(cotangents, *arrays), exact, 1e-4)
    with jax.set_mesh(mesh):
        put = [jax.device_put(x, where) for x in (*arrays[:3], *cotangents)]
        assert_close(call(tuple(put[3:]), *put[:3], arrays[3]), exact, 1e-4)


@pytest.mark.parametrize("last", [False, True])
def test_beside_all_that_masks_a_bias_and_a_soft_cap(last: bool):
    *tensors, table = inputs()
    rng = np.random.default_rng(0)
    others: Any = {"mask": rng.random((B, 1, T, S)) < 0.7, "bias": rng.normal(size=(1, N, T, S))}
    others = {
        name: jnp.asarray(x, x.dtype if x.dtype == bool else "f4") for name, x in others.items()
    }
    others |= {"logits_soft_cap": 2.0, "soft_cap_last": last, **CAUSAL}
    found = attention(*tensors, relative_bias=table, **others)
    assert_close(found, _reference.attention(*tensors, relative_bias=table, **others), 1e-5)


@pytest.mark.parametrize("mapped", [3, 0])
def test_under_vmap(mapped: int):
    arrays, cotangents = list(inputs()), CASE.cotangents(jnp.float32)
    axes: list[int | None] = [None] * 4
    axes[mapped] = 0
    stacked = arrays.copy()
    stacked[mapped] = jnp.stack((arrays[mapped], -arrays[mapped]))
    found = jax.jit(jax.vmap(functools.partial(grads, attention, cotangents), axes))(*stacked)
    for i in range(2):
        one = arrays.copy()
        one[mapped] = stacked[mapped][i]
        exact = grads(_reference.attention, cotangents, *one)
        assert_close(jax.tree.map(lambda x, i=i: x[i], found), exact, 1e-4)


def test_tangents():
    arrays = inputs()
    moved = tuple(jnp.ones_like(x) for x in arrays)

    def of(function: Any) -> Any:
        return lambda *x: function(*x[:3], relative_bias=x[3])

    found = jax.jvp(of(attention), arrays, moved)
    assert_close(found, jax.jvp(of(_reference.attention), arrays, moved), 1e-4)


def test_what_the_gpu_tests_allow():
    """An exact gradient passes, one with a wrong entry does not."""
    arrays, cotangents = inputs(), CASE.cotangents(jnp.float32)
    _, (*_, found) = grads(_reference.attention, cotangents, *arrays, sinks=None)
    assert_table(found, CASE, arrays, cotangents)
    with pytest.raises(AssertionError):
        assert_table(found.at[1, 2].multiply(1.01), CASE, arrays, cotangents)


def test_export_of_symbolic_lengths():
    length, keys = jax.export.symbolic_shape("t, s")
    q, k = (jax.ShapeDtypeStruct((B, n, N, H), jnp.float32) for n in (length, keys))
    *tensors, table = inputs()

    def call(q: Array, k: Array, v: Array, table: Array) -> Array:
        return jax_fa3.dot_product_attention(
            q, k, v, relative_bias=table, query_offset=2, implementation="xla"
        )

    shapes = q, k, k, jax.ShapeDtypeStruct(table.shape, table.dtype)
    exported = jax.export.export(jax.jit(call))(*shapes)
    q, k, v = (x.repeat(N // x.shape[2], 2) for x in tensors)
    assert_close(exported.call(q, k, v, table), call(q, k, v, table), 1e-6)


def bucket_of(distance: int, count: int, farthest: int, bidirectional: bool) -> int:
    """Of T5, in integers: the greatest i with (farthest / exact)^i <= (away / exact)^steps."""
    each = count // 2 if bidirectional else count
    first = each if bidirectional and distance > 0 else 0
    away, exact = abs(distance) if bidirectional else max(-distance, 0), each // 2
    if away < exact:
        return first + away
    steps = each - exact
    left = away**steps
    found = max(i for i in range(steps + 1) if farthest**i * exact ** (steps - i) <= left)
    return first + min(exact + found, each - 1)


@pytest.mark.parametrize("count, farthest", [(32, 128), (32, 20), (12, 100), (64, 800)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_of_t5(count: int, farthest: int, bidirectional: bool):
    x = jnp.arange(2.0 * count).reshape(2, count)

    def make(x: Array) -> Array:
        return jax_fa3.t5_relative_bias(x, max_distance=farthest, bidirectional=bidirectional)

    buckets = [bucket_of(d, count, farthest, bidirectional) for d in range(-farthest, farthest + 1)]
    assert np.array_equal(make(x), x[:, np.array(buckets)])
    (gradient,) = jax.vjp(make, x)[1](jnp.ones((2, len(buckets))))
    assert np.array_equal(gradient, [np.bincount(buckets, minlength=count)] * 2)


@pytest.mark.parametrize(
    "change, found",
    [
        ({"logits_soft_cap": 3.0}, "relative_bias: got some beside logits_soft_cap"),
        ({"head_dim": 136}, "relative_bias: got some beside head dim 136"),
        ({"keys": 2**18 + 8}, "relative_bias: got some beside 262152 keys"),
        ({"bias": jnp.ones((1, 1, T, 1))}, "relative_bias: got some beside a bias"),
        ({"alibi_slopes": jnp.ones(N)}, "relative_bias: got some beside alibi_slopes"),
        ({"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}, "got some beside dropout"),
        ({"key_begin": (B, T, 2), "key_end": (B, T, 2)}, "key_begin: got several intervals a row"),
    ],
)
def test_refusals_name_the_argument(change: dict[str, Any], found: str):
    head_dim, keys = change.get("head_dim", 64), change.get("keys", S)
    options = {k: v for k, v in change.items() if k not in ("head_dim", "keys")}
    for name in ("key_begin", "key_end"):
        if name in options:
            options[name] = jax.ShapeDtypeStruct(options[name], jnp.int32)
    q, k = (jax.ShapeDtypeStruct((B, n, N, head_dim), jnp.bfloat16) for n in (T, keys))
    table = jax.ShapeDtypeStruct((N, 7), jnp.float32)
    reason = jax_fa3.is_supported(q, k, k, relative_bias=table, device="sm_90", **options)
    assert found in (reason or "") and "implementation='xla'" in (reason or "")


@pytest.mark.parametrize("who", [context_parallel, fp8])
def test_of_others_is_refused_by_name(who: Any):
    q = jnp.zeros((1, 16, 2, 8), jnp.bfloat16)
    more: Any = {"axis_name": "x"} if who is context_parallel else {}
    with pytest.raises(NotImplementedError, match="relative_bias: got some, wanted none"):
        who.dot_product_attention(q, q, q, relative_bias=jnp.ones((2, 3)), **more)


@pytest.mark.parametrize("shape", [(3, 5), (2, 4), (2, 0), (2,), (1, 2, 5)])
def test_wrong_tables(shape: tuple[int, ...]):
    q = jnp.zeros((1, 16, 2, 8))
    with pytest.raises(ValueError, match=r"relative_bias: got shape .*, wanted \(2, 2 \* max \+ 1"):
        jax_fa3.dot_product_attention(q, q, q, relative_bias=jnp.ones(shape))
    with pytest.raises(ValueError, match="relative_bias: got dtype int32"):
        jax_fa3.dot_product_attention(q, q, q, relative_bias=jnp.ones((2, 3), jnp.int32))


def test_wrong_buckets():
    for shape, options in [((2, 3), {}), ((2, 32), {"max_distance": 8}), ((32,), {})]:
        with pytest.raises(ValueError, match="buckets: got "):
            jax_fa3.t5_relative_bias(jnp.ones(shape), **options)


@needs_kernels
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_kernels_take_it(learned: bool, deterministic: bool):
    """Nothing has T x S elements. A gradient that nobody wants is not computed."""
    q, k = (jax.ShapeDtypeStruct((B, n, N, 64), jnp.bfloat16) for n in (300, 301))
    table = jax.ShapeDtypeStruct((N, 65), jnp.float32)
    options: Any = {"implementation": "fa3", "deterministic_backward": deterministic}

    def one(q: Array, k: Array, v: Array, table: Array) -> Array:
        out = jax_fa3.dot_product_attention(q, k, v, relative_bias=table, **options)
        return out.astype(jnp.float32).sum()

    text = lower(jax.grad(one, (0, 1, 2, 3) if learned else (0, 1, 2)), q, k, k, table)
    assert targets(text) == [_targets.FWD, _targets.BWD]
    assert "300x301" not in text and f"tensor<1x{N}x2x1116xf32>" in text
    parts = 3 * 8 if deterministic else 1
    assert (f"tensor<{B}x{N}x{parts}x1116xf32>" in text) == learned
    assert jax_fa3.is_supported(q, k, k, relative_bias=table, device="sm_90") is None


@needs_kernels
def test_a_dense_mask_beside_it_becomes_intervals():
    q = jax.ShapeDtypeStruct((B, T, N, 64), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((B, 1, T, T), jnp.bool_)

    def call(q: Array, mask: Array) -> Array:
        options: Any = {"relative_bias": jnp.ones((N, 3)), "implementation": "fa3"}
        return jax_fa3.dot_product_attention(q, q, q, mask=mask, **options)

    assert targets(lower(call, q, mask)) == [_targets.FWD]
