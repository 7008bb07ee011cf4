"""No copy of a cache: what the guide says to do, in what XLA compiles, and in where the numbers are."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_fa3 import kv_cache

B, T, N, K, H, P, PAGE, LAYERS = 2, 1, 4, 2, 16, 24, 8, 3
SHAPES = {
    "NHD": [(P, PAGE, K, H)] * 2,
    "HND": [(P, K, PAGE, H)] * 2,
    "interleaved": [(P, PAGE, 2 * K, H)],
    "lanes": [(P, PAGE, K, 2 * H)],
}
TABLE = jnp.arange(B * 4, dtype=jnp.int32).reshape(B, 4)
LENGTHS = jnp.array([5, 17], jnp.int32)
QUERY = jnp.ones((B, T, N, H))
NEW = jnp.ones((B, T, K, H))


def step(caches: Any, lengths: Any = LENGTHS, table: Any = TABLE, layout: str = "NHD") -> Any:
    """Appends and attends: (out, caches)."""
    key, value = caches if len(caches) == 2 else (*caches, None)
    options: Any = {"page_table": table, "kv_layout": layout}
    query, new = QUERY.astype(key.dtype), NEW.astype(key.dtype)
    out, *found = kv_cache.append_and_attend(query, new, new, key, value, lengths, **options)
    return out, tuple(found[: len(caches)])


def _zeros(caches: Any) -> jax.Array:
    return jnp.zeros((B, T, N, H), caches[0].dtype)


def donated(caches: Any, layout: str) -> Any:
    return step(caches, layout=layout)


def scan(caches: Any, layout: str) -> Any:
    def body(caches: Any, i: Any) -> Any:
        out, caches = step(caches, LENGTHS + i, layout=layout)
        return caches, out

    caches, out = lax.scan(body, caches, jnp.arange(4, dtype=jnp.int32))
    return out, caches


def fori_loop(caches: Any, layout: str) -> Any:
    def body(i: Any, carry: Any) -> Any:
        out, caches = step(carry[1], LENGTHS + i, layout=layout)
        return carry[0] + out, caches

    return lax.fori_loop(0, 4, body, (_zeros(caches), caches))


def while_loop(caches: Any, layout: str) -> Any:
    """Until something that the results say."""

    def more(carry: Any) -> Any:
        return (carry[2] < 4) & (carry[0].max() < 100)

    def body(carry: Any) -> Any:
        out, caches = step(carry[1], LENGTHS + carry[2], layout=layout)
        return out, caches, carry[2] + 1

    out, caches, _ = lax.while_loop(more, body, (_zeros(caches), caches, jnp.int32(0)))
    return out, caches


def cond(caches: Any, layout: str) -> Any:
    def other(caches: Any) -> Any:
        return _zeros(caches), caches

    return lax.cond(
        caches[0][0, 0, 0, 0] < 5, functools.partial(donated, layout=layout), other, caches
    )


def pool(caches: Any, layout: str) -> Any:
    """A scan over layers: one pool of the pages of all."""

    def body(caches: Any, layer: Any) -> Any:
        out, caches = step(caches, table=TABLE + layer * (P // LAYERS), layout=layout)
        return caches, out

    caches, out = lax.scan(body, caches, jnp.arange(LAYERS, dtype=jnp.int32))
    return out, caches


def decoding(caches: Any, layout: str) -> Any:
    """That, in a loop over tokens."""

    def body(i: Any, carry: Any) -> Any:
        out, caches = pool(carry[1], layout)
        return carry[0] + out, caches

    return lax.fori_loop(0, 4, body, (jnp.stack([_zeros(caches)] * LAYERS), caches))


def copies(text: str, shape: tuple[int, ...]) -> list[str]:
    """Operations of the compiled program that make a second array of a cache's shape."""
    size = ",".join(map(str, shape))
    made = rf"= \w+\[{size}\]\S* (copy|transpose|broadcast|concatenate|pad|select|convert)\("
    return [line for line in text.splitlines() if re.search(made, line)]


def in_place(function: Any, caches: Any) -> None:
    """function(caches) -> (out, caches)"""
    compiled = jax.jit(function, donate_argnums=0).lower(caches).compile()
    text = compiled.as_text()
    leaves = jax.tree.leaves(caches)
    assert text is not None and not copies(text, leaves[0].shape)
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < leaves[0].nbytes
    pointers = [x.unsafe_buffer_pointer() for x in leaves]
    _, found = compiled(caches)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(found)] == pointers
    assert all(x.is_deleted() for x in leaves)


def caches_of(layout: str, dtype: Any = jnp.float32, factor: int = 8) -> Any:
    """As large as needed to be larger than the numbers of one block."""
    return tuple(jnp.zeros((factor * P, *shape[1:]), dtype) for shape in SHAPES[layout])


FORMS = [donated, scan, fori_loop, while_loop, cond, pool, decoding]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_no_copy(form: Any):
    in_place(functools.partial(form, layout="NHD"), caches_of("NHD"))


@pytest.mark.parametrize("layout", ["HND", "interleaved", "lanes"])
def test_no_copy_in_other_layouts(layout: str):
    in_place(functools.partial(scan, layout=layout), caches_of(layout))


def test_no_copy_of_unrolled_layers():
    """Each with caches of its own."""

    def function(layers: Any) -> Any:
        found = [step(caches) for caches in layers]
        return [out for out, _ in found], [caches for _, caches in found]

    in_place(function, [caches_of("NHD") for _ in range(LAYERS)])


def test_no_copy_of_contiguous_caches():
    """All layers in one, and a row for each sequence of a layer."""

    def function(caches: Any) -> Any:
        def body(caches: Any, layer: Any) -> Any:
            rows = jnp.arange(B, dtype=jnp.int32) + layer * B
            new = QUERY, NEW, NEW
            out, *caches = kv_cache.append_and_attend(*new, *caches, LENGTHS, cache_rows=rows)  # pyright: ignore
            return tuple(caches), out

        caches, out = lax.scan(body, caches, jnp.arange(LAYERS, dtype=jnp.int32))
        return out, caches

    in_place(function, tuple(jnp.zeros((LAYERS * B, 256, K, H)) for _ in range(2)))


# On CPUs jax 0.10 widens a whole array of bfloat16 to scatter into it, as all versions do of e4m3.
@pytest.mark.parametrize("dtype", ["float16"] + ["bfloat16"] * (jax.__version_info__ >= (0, 11)))
def test_no_copy_of_16_bits(dtype: str):
    in_place(functools.partial(scan, layout="NHD"), caches_of("NHD", dtype))


def test_what_is_looked_for():
    """The test sees the copies of what the guide warns of."""

    def finished(caches: Any) -> Any:
        out, new = step(caches)
        return out, jax.tree.map(lambda x, y: jnp.where(out[0, 0, 0, 0] > 5, x, y), new, caches)

    with pytest.raises(AssertionError):
        in_place(finished, caches_of("NHD"))


def test_without_donation_the_old_cache_stays():
    caches = caches_of("NHD")
    _, found = jax.jit(step)(caches)
    assert not any(x.is_deleted() for x in caches)
    assert not np.array_equal(found[0], caches[0])
