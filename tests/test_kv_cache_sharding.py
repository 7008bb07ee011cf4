"""jax_fa3.kv_cache on 8 devices: each its own sequences, pages and heads, or its own positions."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from kv_cases import as_layout
from meshes import AUTO, EXPLICIT, collectives, make_mesh

from jax_fa3 import kv_cache

append_and_attend: Any = kv_cache.append_and_attend  # whose arguments are given in tuples here
dot_product_attention: Any = kv_cache.dot_product_attention
B, T, N, K, H, PAGE, PAGES, WIDTH = 4, 2, 8, 4, 16, 8, 32, 4
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE = (
    jnp.asarray(RNG.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K)
)
POOL = [jnp.asarray(RNG.normal(size=(PAGES, PAGE, K, H)), jnp.float32) for _ in range(2)]
LENGTHS = np.array([5, 17, 0, 30], np.int32)
# Of each pair of sequences in its own half of the pool, from 0 on there.
LOCAL = np.stack([RNG.permutation(PAGES // 2)[: 2 * WIDTH] for _ in range(2)]).reshape(B, WIDTH)
GLOBAL = LOCAL + np.repeat([0, PAGES // 2], 2)[:, None]
SCALES = {"key_scale": RNG.uniform(1, 2, (B, K)), "value_scale": RNG.uniform(1, 2, K)}
SPEC = P("data", None, "model")


def attend(
    query: Any, key: Any, value: Any, pool: Any, lengths: Any, table: Any, **options: Any
) -> Any:
    return append_and_attend(
        query, key, value, *pool, lengths, page_table=table, return_residual=True, **options
    )


call: Any = attend


def operands(mesh: Any, spec: Any = SPEC) -> Any:
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, spec))
    small = functools.partial(jax.device_put, device=NamedSharding(mesh, P(spec[0])))
    arrays = map(put, (QUERY, KEY, VALUE))
    return *arrays, [put(x) for x in POOL], small(jnp.asarray(LENGTHS)), small(jnp.asarray(LOCAL))


@functools.cache
def wanted(scaled: bool = False) -> Any:
    scales = SCALES if scaled else {}
    return jax.jit(call)(QUERY, KEY, VALUE, POOL, LENGTHS, GLOBAL, **scales)


def assert_equal(found: Any, exact: Any) -> None:
    for x, y in zip(found, exact, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["argument", "explicit"])
def test_batch_and_heads(kind: str):
    """Page ids count from the device's own first page; nothing is exchanged, nothing copied."""
    mesh = make_mesh(AUTO if kind == "argument" else EXPLICIT, data=2, model=4)
    options: Any = {"sharding": NamedSharding(mesh, SPEC)} if kind == "argument" else {}
    function = jax.jit(functools.partial(call, **options), donate_argnums=3)
    with jax.set_mesh(mesh):
        arrays = operands(mesh)
        compiled = function.lower(*arrays).compile()
        assert collectives(compiled) == set()
        text = compiled.as_text()
        assert text is not None and not re.search(r"f32\[16,8,1,16\]\S* copy\(", text)
        out, *caches, lse = compiled(*arrays)
        named = NamedSharding(mesh, SPEC)
        assert all(x.sharding.is_equivalent_to(named, 4) for x in (out, *caches))
        assert all(x.is_deleted() for x in arrays[3])
    assert_equal((out, *caches, lse), wanted())


def test_scales():
    mesh = make_mesh(AUTO, data=2, model=2)
    sharding = NamedSharding(mesh, SPEC)
    found = jax.jit(functools.partial(call, sharding=sharding, **SCALES))(*operands(mesh))
    assert_equal(found, wanted(True))


@pytest.mark.parametrize("layout", ["HND", "interleaved"])
def test_layouts(layout: str):
    mesh = make_mesh(AUTO, data=2, model=2)
    sharding = NamedSharding(mesh, SPEC)
    key, value = map(np.asarray, POOL)
    caches = as_layout(key, value, layout, jnp.float32)
    new = QUERY, KEY, VALUE
    options: Any = {"page_table": LOCAL, "kv_layout": layout, "sharding": sharding}
    out, *_ = append_and_attend(*new, *caches, LENGTHS, **options)
    assert_equal([out], wanted()[:1])


def test_contiguous():
    """Row b is sequence b's, on its device."""
    mesh = make_mesh(AUTO, data=4, model=2)
    arguments = QUERY, *(x.reshape(8, 32, K, H)[:B] for x in POOL), LENGTHS
    exact = dot_product_attention(*arguments)
    sharding = NamedSharding(mesh, SPEC)
    function = jax.jit(functools.partial(dot_product_attention, sharding=sharding))
    arguments = *(jax.device_put(x, sharding) for x in arguments[:3]), jnp.asarray(LENGTHS)
    compiled = function.lower(*arguments).compile()
    # Only the lengths, which nobody split, travel.
    assert collectives(compiled) == set()
    assert_equal([compiled(*arguments)], [exact])


def test_ragged_in_shard_map():
    """Every device has rows, starts, pages and a count of its own."""
    mesh = make_mesh(AUTO, data=2, model=4)
    starts = jnp.tile(jnp.array([0, T, 2 * T]), 2)

    def local(query: Any, key: Any, value: Any, pool: Any, lengths: Any, table: Any) -> Any:
        rows = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
        count = lax.axis_index("data") * 0 + 2
        found = call(*rows, pool, lengths, table, query_starts=starts[:3], num_sequences=count)
        return found[0].reshape(query.shape), *found[1:3], found[3].reshape(query.shape[:-1])

    heads, rows = P("data", None, "model"), P("data")
    function = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads, heads, heads, [heads] * 2, rows, rows),
        out_specs=(heads, heads, heads, heads),
    )
    arrays = operands(mesh)
    compiled = jax.jit(function).lower(*arrays).compile()
    assert collectives(compiled) == set()
    assert_equal(compiled(*arrays), wanted())


def test_ragged_over_heads():
    """By the argument: rows are whole, and page ids those of the whole pool."""
    mesh = make_mesh(AUTO, model=4)
    flat = [x.reshape(-1, *x.shape[2:]) for x in (QUERY, KEY, VALUE)]
    options: Any = {
        "query_starts": np.arange(5) * T,
        "sharding": NamedSharding(mesh, P(None, "model")),
    }
    found = call(*flat, POOL, LENGTHS, GLOBAL, **options)
    shapes = [x.shape for x in wanted()]
    assert_equal([x.reshape(s) for x, s in zip(found, shapes, strict=True)], wanted())
    with pytest.raises(ValueError, match="^sharding: got .*, wanted batch and heads alone"):
        options["sharding"] = NamedSharding(mesh, P("model"))
        call(*flat, POOL, LENGTHS, GLOBAL, **options)


def test_sequence_parallel():
    """Each device has 8 positions of every sequence: results for parts of the keys, merged."""
    mesh = make_mesh(AUTO, x=8)
    lengths = jnp.array([5, 64, 2, 33], jnp.int32)
    caches = [jnp.asarray(RNG.normal(size=(B, 64, K, H)), jnp.float32) for _ in range(2)]

    def local(query: Any, key: Any, value: Any) -> Any:
        first = lax.axis_index("x").astype(jnp.int32) * key.shape[1]
        position = lengths[:, None] - T + jnp.arange(T, dtype=jnp.int32)
        part = dot_product_attention(
            query,
            key,
            value,
            jnp.clip(lengths - first, 0, key.shape[1]),
            is_causal=False,
            key_begin=position - 9 - first,
            key_end=position + 1 - first,
            return_residual=True,
        )
        return kv_cache.merge(*(lax.all_gather(x, "x") for x in part))

    specs = (P(), P(None, "x"), P(None, "x"))
    function = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    found = jax.jit(function)(QUERY, *caches)
    options: Any = {"local_window_size": (9, 0), "return_residual": True}
    assert_equal(found, dot_product_attention(QUERY, *caches, lengths, **options))


def test_refuses_heads_that_do_not_divide():
    mesh = make_mesh(AUTO, model=8)
    options: Any = {"sharding": NamedSharding(mesh, P(None, None, "model"))}
    with pytest.raises(
        ValueError, match=r"^sharding: got 4 key/value heads over axes .* of size 8"
    ):
        call(QUERY, KEY, VALUE, POOL, LENGTHS, GLOBAL, **options)
