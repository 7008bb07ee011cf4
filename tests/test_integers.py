"""Integers of every dtype keep their meaning, however far they are from int32."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from masks import documents

import jax_fa3
from jax_fa3 import _integers, _mask, fp8
from jax_fa3._reference import visible_keys

B, T, S = 2, 12, 16
WIDE = ["int64", "uint32", "uint64"]
FAR = [0, 1, 5, 20, 2**30, 2**31 - 20, 2**31 - 1, 2**31, 2**31 + 20, 2**32 - 1, 2**40, 2**63 - 1]
FAR += [2**63, 2**64 - 1, -1, -5, -20, -(2**31), -(2**31) - 1, -(2**40), -(2**63)]
EDGES = [-(2**31) - 1, -(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 2, 2**31 - 1, 2**31]


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def values(dtype: str) -> list[int]:
    limits = np.iinfo(dtype)
    return [x for x in FAR if limits.min <= x <= limits.max]


def assert_intervals(found: Any, **arguments: Any) -> None:
    """key_begin and key_end are those of the masks, in Python's integers."""
    visible, broken = visible_keys(B, T, S, **arguments)
    begin, end = map(np.asarray, found)
    assert begin.dtype == end.dtype == np.int32
    keys = np.arange(S)
    np.testing.assert_array_equal((begin[..., None] <= keys) & (keys < end[..., None]), visible)
    np.testing.assert_array_equal(_mask.is_broken(*found), broken)


def intervals(traced: bool, arrays: dict[str, Any], **static: Any) -> Any:
    """key_intervals of arguments that are known, or that are not."""

    def call(arrays: dict[str, Any]) -> Any:
        return jax_fa3.key_intervals(T, S, batch=B, **arrays, **static)

    if not traced:
        return call(arrays)
    return jax.jit(call)({name: jnp.asarray(x) for name, x in arrays.items()})


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", *WIDE])
@pytest.mark.parametrize("c", [0, 1, -1, 2**31, -(2**31), 2**40, -(2**40), 2**63, 2**70, -(2**70)])
def test_saturating_add(dtype: str, c: int, x64: None):
    limits = np.iinfo(dtype)
    near = [x - c for x in EDGES] + FAR + [int(limits.min), int(limits.max)]
    xs = np.array([x for x in near if limits.min <= x <= limits.max], dtype)
    wanted = [min(max(int(x) + c, -(2**31)), 2**31 - 1) for x in xs]
    for found in (
        _integers.saturating_add(xs, c),
        jax.jit(_integers.saturating_add, static_argnums=1)(jnp.asarray(xs), c),
    ):
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("dtype", WIDE)
def test_lengths_and_bounds(dtype: str, traced: bool, x64: None):
    far = values(dtype)
    rng = np.random.default_rng(0)
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        for pair in zip(far, reversed(far), strict=True):
            lengths = {name: np.array(pair, dtype)}
            if name == "query_seq_lengths":
                inside = np.arange(T) < np.array(pair, object)[:, None]
                wanted = {"key_end": np.where(inside, S, 0)}
            else:
                wanted = {name: np.array(pair, object)}
            assert_intervals(intervals(traced, lengths), **wanted)
    bounds = {name: rng.choice(np.array(far, dtype), (B, T)) for name in ("key_begin", "key_end")}
    wanted = {name: x.astype(object) for name, x in bounds.items()}
    wanted = {name: np.clip(x, -1, S + 1).astype(int) for name, x in wanted.items()}
    assert_intervals(intervals(traced, bounds), **wanted)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(
    "window",
    [
        {"is_causal": True},
        {"local_window_size": (3, 2)},
        {"local_window_size": (2**31 + 15, 2)},
        {"local_window_size": (3, 2**31 + 15)},
        {"local_window_size": 2**31 + 15},
        {"local_window_size": (2**40 + 9, 2**40)},
        {"local_window_size": (2**40, 2**70)},
        {"local_window_size": (2**70, 2**40)},
        {"local_window_size": 2**40, "is_causal": True},
        {"local_window_size": (2**30 + 1, 2**30 - 1)},
    ],
    ids=str,
)
def test_offsets(dtype: str, traced: bool, window: Any, x64: None):
    """Those near where an edge of the window meets the keys as well."""
    near = [0, *np.atleast_1d(window.get("local_window_size", 0)).tolist()]
    limits = np.iinfo(dtype)
    offsets = values(dtype)
    for x in near:
        around = (sign * x + d for sign in (1, -1) for d in range(-S - 1, S + 1, 5))
        offsets += [y for y in around if limits.min <= y <= limits.max]
    offsets += [0] * (len(offsets) % 2)
    for pair in zip(offsets[::2], offsets[1::2], strict=True):
        found = intervals(traced, {"query_offset": np.array(pair, dtype)}, **window)
        assert_intervals(found, query_offset=np.array(pair, object), **window)


@pytest.mark.parametrize("padding", [None, 3, 2**32 - 1])
@pytest.mark.parametrize("traced", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize(
    "dtypes",
    [
        ("int64", "int64"),
        ("uint32", "uint32"),
        ("uint64", "int64"),
        ("int64", "uint32"),
        ("uint64", "int32"),
        ("uint32", "int8"),
    ],
)
def test_segment_ids(dtypes: Any, traced: Any, padding: Any, x64: None):
    """Equal or not, as integers: not modulo 2**32, and not clamped. Negative ones are padding, and so
    is one more, in as many runs as there are of it."""
    ids = [0, 3, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 3, 2**40, 2**40 + 1, 2**63 - 1]
    ids += [2**63, 2**63 + 3, -1, -(2**32) + 3, -(2**40), -(2**63)]
    rng = np.random.default_rng(0)
    names = "query_segment_ids", "key_value_segment_ids"
    every = jax.jit(lambda x: jax_fa3.key_intervals(T, S, **x, padding_segment_id=padding))
    for _ in range(8 if len(traced) == 2 else 3):
        arrays: dict[str, Any] = {}
        for name, dtype, length in zip(names, dtypes, (T, S), strict=True):
            limits = np.iinfo(dtype)
            fit = np.array([x for x in ids if limits.min <= x <= limits.max], dtype)
            entries = []
            for _ in range(B):
                cuts = np.sort(rng.choice(length - 1, 4, replace=False) + 1)
                runs = np.diff([0, *cuts, length])
                which = rng.choice(fit, 5, replace=len(fit) < 5)
                if padding is not None and padding in fit:
                    which[rng.choice(5, 2, replace=False)] = padding
                entries.append(np.repeat(which, runs))
            arrays[name] = np.stack(entries)
        wanted = {name: x.astype(object) for name, x in arrays.items()}
        wanted = {name: np.where(x == padding, -1, x) for name, x in wanted.items()}
        known = {name: x for i, (name, x) in enumerate(arrays.items()) if i not in traced}
        unknown: dict[str, Any] = {
            name: jnp.asarray(x) for name, x in arrays.items() if name not in known
        }
        try:
            if known:  # eagerly, which the next time finds all of it compiled
                found = jax_fa3.key_intervals(T, S, **known, **unknown, padding_segment_id=padding)
            else:
                found = every(unknown)
        except ValueError as error:
            assert "negative ids and large ones" in str(error)
            ((name, x),) = known.items()
            other = next(iter(unknown.values())).dtype
            possible = x.astype(object)[x <= jnp.iinfo(other).max]
            assert jnp.iinfo(other).min == 0 and (possible > 2**31 - 1).any()
            continue
        assert_intervals(found, **wanted)


def test_python_integers_of_any_size():
    """Without jax_enable_x64; also what int64 and uint64 cannot hold together."""
    lengths = [2**70, -(2**70)]
    assert_intervals(
        jax_fa3.key_intervals(T, S, key_value_seq_lengths=lengths), key_value_seq_lengths=[S, 0]
    )
    offsets = [2**63, -1]
    found = jax_fa3.key_intervals(T, S, query_offset=offsets, is_causal=True)
    assert_intervals(found, query_offset=offsets, is_causal=True)
    ids = np.array([[2**64 + 3] * 6 + [3] * 6, [2**64] * 4 + [-(2**64)] * 4 + [0] * 4], object)
    found = jax_fa3.key_intervals(T, T, query_segment_ids=ids.tolist(), key_value_segment_ids=ids)
    begin = [[0] * 6 + [6] * 6, [0] * 4 + [0] * 4 + [8] * 4]
    end = [[6] * 6 + [12] * 6, [4] * 4 + [0] * 4 + [12] * 4]
    np.testing.assert_array_equal(found, [begin, end])


def test_uint32_without_x64():
    """The one wide dtype there."""
    offset = jnp.array([2**31 + 5, 3], jnp.uint32)
    window: Any = {"local_window_size": (2**31 + 4, 1)}
    found = jax.jit(lambda x: jax_fa3.key_intervals(T, S, query_offset=x, **window))(offset)
    assert_intervals(found, query_offset=np.array([2**31 + 5, 3], object), **window)
    ids = jnp.array([[2**32 - 1] * 8 + [2**31] * 8, [0] * 8 + [2**31 - 1] * 8], jnp.uint32)
    names: Any = {"query_segment_ids": ids[:, 2:-2], "key_value_segment_ids": ids}
    for padding in (None, 0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**70):
        options: Any = {"padding_segment_id": padding}
        found = jax.jit(functools.partial(jax_fa3.key_intervals, T, S, **options))(**names)
        exact = {name: np.asarray(x).astype(object) for name, x in names.items()}
        exact = {name: np.where(x == padding, -1, x) for name, x in exact.items()}
        assert_intervals(found, **exact)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", *WIDE])
@pytest.mark.parametrize("padding", [0, 5, 127, 200, 255, 256, 2**31, 2**32 - 1, 2**32])
@pytest.mark.parametrize("traced", [False, True])
def test_padding_segment_id(dtype: str, padding: int, traced: bool, x64: None):
    """Of any size: what the ids' dtype lacks is none of them, not even modulo its size."""
    ids = np.array([[5] * 2 + [0] * 3 + [127] * 4 + [5] * 3, [0] * 6 + [5] * 6], dtype)
    names: Any = {"query_segment_ids": ids, "key_value_segment_ids": np.repeat(ids, 2, 1)[:, :S]}
    if padding <= np.iinfo(dtype).max:
        names["query_segment_ids"][:, 7] = names["key_value_segment_ids"][:, 11:13] = padding
    found = intervals(traced, names, padding_segment_id=padding)
    wanted = {k: x.astype(object) for k, x in names.items()}
    wanted = {k: np.where(x == padding, -1, x) for k, x in wanted.items()}
    assert_intervals(found, **wanted)


def test_attention_with_wide_integers(x64: None):
    """What x64 makes of sums and cumulative sums goes in as it is, under vmap and in gradients."""
    q = jax.random.normal(jax.random.key(0), (B, T, 4, 8), jnp.float32)
    mask = jnp.arange(T) < jnp.array([[7], [T]])
    starts = np.concatenate([np.diff(documents(4, 3, 5), prepend=0)[None]] * B)
    ids = jnp.cumsum(jnp.asarray(starts), axis=1) + 2**40
    assert mask.sum(1).dtype == ids.dtype == jnp.int64

    def loss(q: Any, lengths: Any, ids: Any) -> Any:
        options: Any = {"query_segment_ids": ids, "key_value_segment_ids": ids, "is_causal": True}
        out = jax_fa3.dot_product_attention(q, q, q, key_value_seq_lengths=lengths, **options)
        return (out**2).sum()

    wanted = jax.grad(loss)(q, np.array([7, T], np.int32), (ids - 2**40).astype(jnp.int32))
    np.testing.assert_array_equal(jax.grad(loss)(q, mask.sum(1), ids), wanted)
    one_by_one = jax.vmap(jax.grad(loss))(q, mask.sum(1), ids)
    np.testing.assert_allclose(one_by_one, wanted, atol=1e-6)


def test_lengths_of_quantize(x64: None):
    x = jnp.ones((B, T, 1, 64), jnp.bfloat16)
    found = fp8.quantize(x, lengths=jnp.array([2**40, 3]))
    for a, b in zip(found, fp8.quantize(x, lengths=[T, 3]), strict=True):
        np.testing.assert_array_equal(a.astype(jnp.float32), b.astype(jnp.float32))
