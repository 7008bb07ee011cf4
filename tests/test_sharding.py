"""vmap becomes batch entries of one call; under manual axes the call is local. Other axes have
files of their own."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from lowering import hide_gpus, lower, operations, targets

import jax_fa3
from jax_fa3 import _sharding, _xla
from jax_fa3._operands import Operands
from jax_fa3._problem import Config, Masks

B, T, S, N, K, H = 2, 8, 12, 4, 2, 16
CONFIG = Config(0.25, (5, 0), None, False)


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    hide_gpus(monkeypatch)


@pytest.fixture
def batches():
    """Those that `attend` computed at once."""
    return []


def attend_with(batches: list[int]) -> Any:
    """The seam around plain JAX."""

    def call(query, key, value, masks):
        batches.append(query.shape[0])
        assert all(x.shape[0] in (1, query.shape[0]) for x in jax.tree.leaves((key, value, masks)))
        return expected(query, key, value, masks)

    def attend(query, key, value, masks):
        def of_mask(x):
            return ("b" if x.shape[0] == query.shape[0] else ".") + "." * (x.ndim - 1)

        letters = "b.n.", "b.k.", "b.k.", jax.tree.map(of_mask, masks)
        return _sharding.per_device(call, letters, ("b.n.", "bn."))(query, key, value, masks)

    return attend


def expected(query: jax.Array, key: jax.Array, value: jax.Array, masks: Masks):
    return _xla.attention(CONFIG, Operands(query, key, value), masks)


def inputs(*lead: int, offsets: int = B) -> tuple[jax.Array, jax.Array, jax.Array, Masks]:
    ends = np.random.default_rng(0).integers(0, S, (*lead, B, T))
    offset = jnp.arange(np.prod(lead, dtype=int) * offsets).reshape(*lead, offsets) % 5
    masks = Masks(query_offset=offset, key_end=jnp.asarray(ends, jnp.int32))
    q, k, v = (
        normal(*lead, B, T, N, H),
        normal(*lead, B, S, K, H, seed=1),
        normal(*lead, B, S, K, H),
    )
    return q, k, v, masks


@pytest.mark.parametrize("axes", [*itertools.product([0, None], repeat=4)][:-1:3])
def test_vmap_of_any_operands_is_one_call(batches, axes):
    offsets = B if axes[0] is None else 1  # of the batch, or one for all
    batched, single = inputs(3, offsets=offsets), inputs(offsets=offsets)
    operands: list[Any] = [single[i] if axes[i] is None else batched[i] for i in range(4)]
    found = jax.jit(jax.vmap(attend_with(batches), in_axes=axes))(*operands)
    assert batches[-1] == 3 * B
    exact = jax.jit(jax.vmap(expected, in_axes=axes))(*operands)
    for x, y in zip(found, exact, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_nested_vmap_is_one_call(batches):
    _, key, value, masks = inputs(3)
    query = normal(3, B, T, 5, N, H)

    def nested(function):
        return jax.jit(jax.vmap(jax.vmap(function, (2, None, None, None))))

    found = nested(attend_with(batches))(query, key, value, masks)
    assert batches[-1] == 3 * 5 * B
    for x, y in zip(found, nested(expected)(query, key, value, masks), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_vmap_of_segments():
    """Lowered for CUDA: one call to each of the two kernels, and no loop."""
    query = jax.ShapeDtypeStruct((3, B, T, N, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((3, B, T), jnp.int32), jax.ShapeDtypeStruct((B, T), jnp.int32)

    def function(query, query_ids, key_ids):
        return jax_fa3.dot_product_attention(
            query, query, query, query_segment_ids=query_ids, key_value_segment_ids=key_ids
        )

    text = lower(jax.vmap(function, (0, 0, None)), query, *ids)
    assert targets(text) == ["jax_fa3.segment_intervals.v1", "jax_fa3.fwd.v1"]
    assert "while" not in operations(text)


def test_vmap_of_the_first_axis_copies_nothing():
    query = jax.ShapeDtypeStruct((3, B, T, N, 64), jnp.bfloat16)
    text = lower(jax.vmap(lambda x: jax_fa3.dot_product_attention(x, x, x)), query)
    assert targets(text) == ["jax_fa3.fwd.v1"]
    assert operations(text) <= {"reshape", "broadcast_in_dim", "custom_call"}
    assert f"tensor<3x{B}x{T}x{N}x64xbf16>) -> tensor<{3 * B}x{T}x{N}x64xbf16>" in text


def mesh(*shape: int) -> Mesh:
    cpus = jax.local_devices(backend="cpu")[: int(np.prod(shape))]
    return Mesh(np.reshape(cpus, shape), ("data", "model")[: len(shape)])


# Batch and heads; or batch and query rows, with keys replicated over one axis or all.
SPECS = [
    (P("data", None, "model"), P("data", None, "model")),
    (P("data", "model"), P("data")),
    (P(None, ("data", "model")), P(None)),
]


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize(("query_spec", "key_spec"), SPECS)
def test_shard_map_gradients(implementation, query_spec, key_spec):
    """With check_vma, as by default. Operands that are replicated, or whose values a device shares
    with others, get the sum of all devices' gradients."""
    shapes = (B, T, N, H), (B, S, N, H), (B, T, N, H)
    query, key, weights = (normal(*x, seed=i, dtype=jnp.float16) for i, x in enumerate(shapes))
    lengths = jnp.array([7, 12])  # varies over fewer axes than the query does

    def loss(query, key, weights, lengths, axes=()):
        out, lse = jax_fa3.dot_product_attention(
            query,
            key,
            key,
            key_value_seq_lengths=lengths,
            implementation=implementation if axes else "xla",
            return_residual=True,
        )
        return jax.lax.psum((out * weights).astype(jnp.float32).sum() + lse.sum(), axes)

    def sharded(query, key):
        local = functools.partial(loss, axes=("data", "model"))
        specs = query_spec, key_spec, query_spec, P(key_spec[0])
        call = jax.shard_map(local, mesh=mesh(2, 2), in_specs=specs, out_specs=P())
        return call(query, key, weights, lengths)

    found = jax.jit(jax.grad(sharded, (0, 1)))(query, key)
    for x, y in zip(found, jax.grad(loss, (0, 1))(query, key, weights, lengths), strict=True):
        np.testing.assert_allclose(x, y, atol=0.02)


@pytest.mark.parametrize(("query_spec", "key_spec"), SPECS)
def test_shard_map_lowers_to_local_calls(query_spec, key_spec):
    """Segments too, which vary over fewer axes than the query does."""
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    query, key = (jax.ShapeDtypeStruct((B, T, N, 64), jnp.bfloat16) for _ in range(2))

    def local(query, key, query_ids, key_ids):
        return jax_fa3.dot_product_attention(
            query, key, key, query_segment_ids=query_ids, key_value_segment_ids=key_ids
        )

    rows = P(*query_spec[:2])
    specs = query_spec, key_spec, rows, P(*key_spec[:2])
    function = jax.shard_map(local, mesh=mesh(2, 2), in_specs=specs, out_specs=query_spec)
    text = lower(function, query, key, ids, ids)
    assert targets(text) == ["jax_fa3.segment_intervals.v1", "jax_fa3.fwd.v1"]
    assert not [x for x in operations(text) if x.startswith("all_")]
