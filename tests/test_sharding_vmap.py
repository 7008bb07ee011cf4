"""vmap over the query alone: more heads of each group, or one entry after the other, nothing copied; and
per-sample gradients where the mapped axis is split over devices."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from entries import M, apart, assert_each_right, attend, inputs
from helpers import equal, temporary_bytes, with_gradients
from jax.sharding import PartitionSpec as P
from lowering import lower, targets
from meshes import AUTO, DTYPE, EXPLICIT, GATHERS_NESTED, make_mesh, put, run

import jax_fa3
from jax_fa3 import _sharding, _xla
from jax_fa3._operands import Operands
from jax_fa3._problem import Config, Masks
from jax_fa3._sharding import _groups

pytestmark = pytest.mark.usefixtures("on_cpu")

LENGTHS = np.array([31, 48], np.int32)
MASK = {"key_value_seq_lengths": LENGTHS, "is_causal": True, "query_offset": 40}
SMALL: dict[str, Any] = {"T": 6, "S": 48, "H": 16}
HEADS = [(4, 4), (6, 3), (4, 2), (4, 1)]
CASES = {h: Case(f"{h} heads", **SMALL, N=h[0], K=h[1], mask=MASK, planted=True) for h in HEADS}


@pytest.fixture(params=[False, True], ids=["at once", "in turn"])
def in_turn(request, monkeypatch):
    """Whether gradients are computed one entry after the other."""
    monkeypatch.setattr(_groups, "MANY", 0 if request.param else 2**62)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


@pytest.mark.parametrize("heads", HEADS)
def test_numbers(heads, in_turn):
    """Forward, the gradients of each entry, and those of all of them."""
    case = CASES[heads]
    tensors, cotangents = inputs(case)
    found = jax.jit(apart(case))(*tensors, cotangents)
    assert_each_right(found, case)
    together = jax.vmap(attend(case), (0, None, None))
    total = jax.jit(functools.partial(with_gradients, together))(cotangents, *tensors)
    assert equal(total[:3], found[:3])
    exact = (np.asarray(x, np.float32).sum(0) for x in found[3:])
    for x, y in zip(total[3:], exact, strict=True):  # M numbers of 16 bits and their sum
        np.testing.assert_allclose(x, y, atol=4e-3 * np.abs(y).max())


def seen(**axes: Any) -> list[tuple[int, ...]]:
    """Shapes of query and key in the one call, under vmaps over the axes of the arguments."""
    shapes = []
    config = Config(0.25, (None, 0), None, False)

    def call(query: Any, key: Any, masks: Masks) -> Any:
        shapes.extend([query.shape, key.shape])
        return _xla.attention(config, Operands(query, key, key), masks)

    def function(query: Any, key: Any, lengths: Any) -> Any:
        masks, letters = Masks(key_value_seq_lengths=lengths), Masks(key_value_seq_lengths="b")  # pyright: ignore[reportArgumentType]
        split = _sharding.per_device(call, ("btnh", "b.k.", letters), ("btnh", "bnt"))
        return split(query, key, masks)

    arrays = {"query": (2, 6, 4, 16), "key": (2, 48, 2, 16), "lengths": (2,)}
    mapped = {name: tuple(axes.get(name, ())) for name in arrays}
    operands = []
    for name, shape in arrays.items():
        for count in mapped[name]:
            shape = (count, *shape) if count else shape
        operands.append(jnp.ones(shape, jnp.int32 if name == "lengths" else jnp.float32))
    nested = function
    for level in range(max(map(len, mapped.values()))):
        of = [mapped[name][level : level + 1] for name in arrays]
        nested = jax.vmap(nested, [0 if count and count[0] else None for count in of])
    jax.eval_shape(nested, *operands)
    return shapes[-2:]


def test_what_becomes_heads_and_what_batch_entries():
    assert seen(query=[5]) == [(2, 6, 5 * 4, 16), (2, 48, 2, 16)]
    assert seen(query=[5, 3]) == [(2, 6, 3 * 5 * 4, 16), (2, 48, 2, 16)]
    assert seen(query=[5], lengths=[5])[0] == (10, 6, 4, 16)  # a mask that is mapped along
    assert seen(query=[5], key=[5]) == [(10, 6, 4, 16), (10, 48, 2, 16)]
    assert seen(query=[5, 3], key=[5, 0]) == [(10, 6, 3 * 4, 16), (10, 48, 2, 16)]
    assert seen(key=[5]) == [(10, 6, 4, 16), (10, 48, 2, 16)]


def test_program_for_cuda_copies_no_keys():
    """The issue's: 64 entries. Where the query is longer than the keys it stays as it is."""
    key = jax.ShapeDtypeStruct((1, 8192, 2, 64), jnp.bfloat16)
    call = functools.partial(jax_fa3.dot_product_attention, implementation="fa3")
    forward = jax.vmap(call, (0, None, None))
    query = jax.ShapeDtypeStruct((64, 1, 128, 4, 64), jnp.bfloat16)
    text = lower(forward, query, key, key)
    assert targets(text) == ["jax_fa3.fwd.v1"]
    assert f"(tensor<1x128x{64 * 4}x64xbf16>, tensor<1x8192x2x64xbf16>" in text
    assert "tensor<64x8192x" not in text and "tensor<64x1x8192x" not in text
    long = jax.ShapeDtypeStruct((64, 1, 8192, 4, 64), jnp.bfloat16)
    assert "(tensor<64x8192x4x64xbf16>, tensor<64x8192x2x64xbf16>" in lower(forward, long, key, key)


def gradients(query: Any, key: Any, value: Any) -> Any:
    """Of key and value for each entry of query."""

    def loss(query: Any, key: Any, value: Any) -> Any:
        out = jax_fa3.dot_product_attention(query, key, value, implementation="fa3")
        return jnp.sin(out.astype(jnp.float32)).sum()

    return jax.vmap(jax.grad(loss, (1, 2)), (0, None, None))(query, key, value)


def test_gradients_for_cuda_copy_no_keys():
    """Few and small ones they do; of more than one vmap's axes the entries of all wait."""
    query = jax.ShapeDtypeStruct((64, 1, 128, 4, 64), jnp.bfloat16)
    large, small = (jax.ShapeDtypeStruct((1, keys, 4, 64), jnp.bfloat16) for keys in (16384, 512))
    text = lower(gradients, query, large, large)
    assert targets(text) == ["jax_fa3.fwd.v1", "jax_fa3.bwd.v1"]
    assert "(tensor<1x128x4x64xbf16>, tensor<1x16384x4x64xbf16>" in text
    assert "(tensor<64x128x4x64xbf16>, tensor<64x512x4x64xbf16>" in lower(
        gradients, query, small, small
    )
    nested = jax.vmap(gradients, (0, None, None))
    queries = jax.ShapeDtypeStruct((3, *query.shape), jnp.bfloat16)
    assert "(tensor<1x128x4x64xbf16>, tensor<1x16384x4x64xbf16>" in lower(
        nested, queries, large, large
    )


@pytest.mark.parametrize("order", [(0, None), (None, 0)])
def test_entries_of_two_vmaps_in_turn(order, in_turn):
    """The other axis is of key and value, too, or of the query alone."""
    case = dataclasses.replace(CASES[4, 2], mask={}, planted=False)
    (queries, key, value), _ = inputs(case)
    queries = jnp.stack([queries, queries[::-1]])
    if order[0] == 0:
        key, value = (jnp.stack([x, x / 2]) for x in (key, value))
    axes = (0, order[0], order[0])

    def one(query: Any, key: Any, value: Any) -> Any:
        out = jax_fa3.dot_product_attention(query, key, value, is_causal=True)
        return jnp.sin(out.astype(jnp.float32)).sum()

    grads = jax.grad(one, (0, 1, 2))
    found = jax.jit(jax.vmap(jax.vmap(grads, (0, None, None)), axes))(queries, key, value)
    for i in range(2):
        own = [x if axis is None else x[i] for x, axis in zip((key, value), axes[1:], strict=True)]
        for j in range(M):
            entry = jax.tree.map(lambda x, i=i, j=j: x[i, j], found)
            exact = jax.jit(grads)(queries[i, j], *own)
            for x, y in zip(entry, exact, strict=True):
                x, y = (np.asarray(z, np.float32) for z in (x, y))
                np.testing.assert_allclose(x, y, atol=8e-3 * np.abs(y).max())


def test_memory():
    """As much as where JAX itself maps over plain JAX, which copies nothing."""
    query = jax.ShapeDtypeStruct((256, 1, 1, 2, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, 8192, 2, 64), jnp.bfloat16)

    def needed(implementation: Any) -> int:
        call = functools.partial(jax_fa3.dot_product_attention, implementation=implementation)
        return temporary_bytes(jax.vmap(call, (0, None, None)), query, key, key)

    assert needed(None) < 1.1 * needed("xla") + 2**20


def test_symbolic_sizes():
    """Which is fewer is not known: they become batch entries."""
    case = CASES[4, 2]
    (batch, length, keys) = jax.export.symbolic_shape("b, t, s")
    tensors, _ = inputs(dataclasses.replace(case, mask={}, planted=False))
    shapes = (M, batch, length, 4, 16), (batch, keys, 2, 16), (batch, keys, 2, 16)
    call = jax.jit(jax.vmap(jax_fa3.dot_product_attention, (0, None, None)))
    options: Any = {
        "platforms": ["cpu", "cuda"],
        "disabled_checks": jax_fa3.DISABLE_JAX_EXPORT_CHECKS,
    }
    exported = jax.export.export(call, **options)(*(jax.ShapeDtypeStruct(x, DTYPE) for x in shapes))
    found, exact = jax.jit(exported.call)(*tensors), call(*tensors)
    np.testing.assert_allclose(found, exact, atol=4e-3)


LAYOUTS = {  # axes; what splits entries, batch, query's heads, the others' heads
    "one device": ({"x": 1}, ("x", None, None, None)),
    "entries": ({"x": 4}, ("x", None, None, None)),
    "entries and batch": ({"x": 4, "y": 2}, ("x", "y", None, None)),
    "entries and heads": ({"x": 4, "y": 2}, ("x", None, "y", "y")),
    "heads in pairs": ({"x": 2, "y": 4}, ("x", None, "y", None)),
}


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_per_sample_gradients_on_a_mesh(kind, layout, in_turn):
    """The issue's: key and value are whole on each device, or follow query in batch and heads."""
    axes, (entries, batch, heads, kv_heads) = LAYOUTS[layout]
    case = CASES[4, 2]
    tensors, cotangents = inputs(case)
    query, key = P(batch, None, heads), P(batch, None, kv_heads)
    where = P(entries, *query), key, key, (P(entries, *query), P(entries, *query))
    operands = put(make_mesh(kind, **axes), (*tensors, cotangents), where)
    found, exchanged = run(apart(case), *operands)
    shared = layout == "heads in pairs"
    if kind is AUTO or not GATHERS_NESTED:
        assert exchanged <= ({"all-reduce", "all-gather"} if shared else set())
    if kind is EXPLICIT:
        assert jax.typeof(found.dk).sharding.spec == P(entries, *key, None)
        assert jax.typeof(found.out).sharding.spec == P(entries, *query, None)
    assert_each_right(found, case)


@pytest.mark.parametrize("implementation", [None, "fa3", "xla"])
@pytest.mark.parametrize("devices", [1, 2])
def test_per_sample_gradients_of_key_and_value(implementation, devices):
    """As the issue has it, lowered for CUDA: arrays on a mesh and outside of it."""
    mesh = make_mesh(EXPLICIT, x=devices)
    query, shared = jnp.ones((4, 1, 33, 4, 64), jnp.bfloat16), jnp.ones((1, 33, 2, 64), "bfloat16")
    query = put(mesh, query, P("x"))

    def loss(shared: Any, query: Any) -> Any:
        call = functools.partial(jax_fa3.dot_product_attention, implementation=implementation)
        return jnp.sin(call(query, shared, shared).astype(jnp.float32)).sum()

    function = jax.vmap(jax.grad(loss), (None, 0))
    for operand in (shared, put(mesh, shared, P())):
        text = lower(function, operand, query)
        wanted = [] if implementation == "xla" else ["jax_fa3.fwd.v1", "jax_fa3.bwd.v1"]
        assert targets(text) == wanted
