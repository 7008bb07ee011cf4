"""_mask against Python's integers, at values that int32 arithmetic would get wrong."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TABLE, Case
from helpers import temporary_bytes
from masks import MARK, ints

import jax_fa3
from jax_fa3 import _mask
from jax_fa3._problem import Masks
from jax_fa3._reference import visible_keys

LOW, HIGH = -(2**31), 2**31 - 1
VALUES = [LOW, LOW + 1, LOW + 6, -9, -4, -1, 0, 1, 2, 5, 6, 7, HIGH - 6, HIGH - 1, HIGH, *MARK]
FAR = [-(2**70), -(2**32), 1 - 2**32, LOW - 1, LOW, -8, -3, 0, 2, 9, HIGH, HIGH + 1, 2**33, 2**70]


def picked(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).choice(np.array(VALUES, np.int32), shape)


def expected(window: Any, key_length: int, row: int, offset: int, *limits: int) -> tuple[int, int]:
    """The row's interval by Python's integers; limits: query length, key length, begin, end."""
    left, right = window
    query_length, length, begin, end = limits
    begin = max(begin, 0 if left is None else row + offset - left, 0)
    end = min(end, length, key_length, *(() if right is None else (row + offset + right + 1,)))
    return (begin, end) if begin < end and row < query_length else (0, 0)


@pytest.mark.parametrize("key_length", [0, 6, HIGH])
@pytest.mark.parametrize("windows", [FAR, [None]], ids=["bounded", "unbounded"])
def test_row_intervals(windows: Any, key_length: int):
    """Any window, any sign of it (a static offset is folded in), any int32 in the arrays."""
    batch, rows = 100, 5
    offset, query_length, length = picked(3, batch)
    begin, end = picked(2, batch, rows)
    begin[::9, 1], end[::9, 1] = MARK
    arrays = (offset, query_length, length, begin, end)
    pairs = [*itertools.product(windows, windows[::-1])][:: 1 if key_length == 6 else 5]
    compute = jax.jit(
        lambda *arrays: [
            _mask.row_intervals(Masks(*arrays), window, batch, rows, key_length) for window in pairs
        ]
    )
    for window, found in zip(pairs, compute(*arrays), strict=True):
        wanted = [
            expected(window, key_length, i, *map(int, (o, t, s, begin[b, i], end[b, i])))
            for b, (o, t, s) in enumerate(zip(offset, query_length, length, strict=True))
            for i in range(rows)
        ]
        np.testing.assert_array_equal(np.stack(found[:2], -1).reshape(-1, 2), wanted)
        inside = np.arange(rows) < query_length[:, None]
        np.testing.assert_array_equal(found[2], inside & (begin == MARK[0]) & (end == MARK[1]))


def test_intersect():
    """Is the intersection, of keys >= 0; the mark wins, and is never made of others."""
    pairs = np.array([*itertools.product(VALUES, VALUES)], np.int32)
    a, b = (x.reshape(-1, 2).T for x in np.broadcast_arrays(pairs[:, None], pairs))
    met = _mask.intersect((jnp.array(a[0]), jnp.array(a[1])), (jnp.array(b[0]), jnp.array(b[1])))
    begin, end = map(np.asarray, met)
    broken = [(x == MARK[0]) & (y == MARK[1]) for x, y in (a, b, (begin, end))]
    np.testing.assert_array_equal(broken[2], broken[0] | broken[1])
    assert 0 < broken[2].sum() < broken[2].size / 50
    most, least = np.maximum(np.maximum(a[0], b[0]), 0), np.minimum(a[1], b[1])
    begin, seen = np.maximum(begin, 0), most < least
    np.testing.assert_array_equal(begin < end, seen & ~broken[2])
    np.testing.assert_array_equal(np.stack([begin, end])[:, seen], np.stack([most, least])[:, seen])


@pytest.mark.parametrize("lengths", [(4, 5), (7, 1), (1, 9)])
def test_segment_intervals(lengths: tuple[int, int]):
    """Ids in any order, not there, negative, at both ends of int32, and broken runs."""
    rng = np.random.default_rng(0)
    ids = np.array([LOW, -1, 0, 1, 2, HIGH], np.int32)
    batch = 400
    query, key = (rng.choice(ids, (batch, n)) for n in lengths)
    key[::2].sort(axis=1)
    begin, end = jax.jit(_mask.segment_intervals)(query, key)
    for b, i in itertools.product(range(batch), range(lengths[0])):
        keys = np.flatnonzero(key[b] == query[b, i]) if query[b, i] >= 0 else np.empty(0)
        if not keys.size:
            wanted = (0, 0)
        elif keys[-1] - keys[0] + 1 == keys.size:
            wanted = (keys[0], keys[-1] + 1)
        else:
            wanted = MARK
        assert (begin[b, i], end[b, i]) == wanted


@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_segment_intervals_of_nothing(sizes: tuple[int, int, int]):
    b, t, s = sizes
    found = _mask.segment_intervals(jnp.zeros((b, t), jnp.int32), jnp.zeros((b, s), jnp.int32))
    assert [x.shape for x in found] == [(b, t), (b, t)] and not any(x.any() for x in found)


def test_segment_intervals_need_little_memory():
    ids = jax.ShapeDtypeStruct((1, 2**18), jnp.int32)
    assert temporary_bytes(_mask.segment_intervals, ids, ids) < 100 * 2**18


MASKED = [case for case in TABLE if case.mask and case.B * case.S * case.T]


@pytest.mark.parametrize("case", MASKED[::3] + MASKED[-7:], ids=str)
def test_key_intervals(case: Case):
    """Passed on instead of the arguments, the result masks as they do."""
    arrays = {k: x for k, x in case.mask.items() if isinstance(x, np.ndarray)}
    masks = {k: x for k, x in case.mask.items() if k not in arrays}

    @jax.jit
    def compute(arrays: dict[str, Any]) -> Any:
        return jax_fa3.key_intervals(case.T, case.S, batch=case.B, **masks, **arrays)

    begin, end = compute(arrays)
    assert begin.shape == end.shape == (case.B, case.T) and begin.dtype == end.dtype == jnp.int32
    found = visible_keys(case.B, case.T, case.S, key_begin=begin, key_end=end)
    for x, y in zip(found, visible_keys(case.B, case.T, case.S, **case.mask), strict=True):
        np.testing.assert_array_equal(x, y)
    reserved = (begin == MARK[0]) & (end == MARK[1])
    assert (reserved | ((begin == 0) & (end == 0)) | ((0 <= begin) & (begin < end))).all()
    again = jax_fa3.key_intervals(case.T, case.S, key_begin=begin, key_end=end)
    np.testing.assert_array_equal(again, (begin, end))


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((4,), {}),
        ((4,), {"is_causal": True, "query_offset": jnp.int32(3), "query_seq_lengths": 2}),
        ((4,), {"key_begin": [0, 1, 2, 3], "query_segment_ids": [1] * 4}),
        ((2, 4), {"batch": 2}),
        ((1, 4), {"batch": 1, "key_begin": [[0, 1, 2, 3]]}),
        ((3, 4), {"query_seq_lengths": [1, 2, 3]}),
        ((3, 4), {"query_offset": np.arange(3), "is_causal": True}),
        ((1, 4), {"key_end": [[1, 2, 3, 4]]}),
    ],
)
def test_key_intervals_shape(shape: tuple[int, ...], arguments: dict[str, Any]):
    if "query_segment_ids" in arguments:
        arguments |= {"key_value_segment_ids": [1] * 5}
    begin, end = jax_fa3.key_intervals(4, 5, **arguments)
    assert begin.shape == end.shape == shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"query_length": np.zeros((2, 4))},
            r"query_length: got shape \(2, 4\), wanted a static int",
        ),
        ({"batch": -1}, "batch: got -1, wanted an int >= 0"),
        ({"query_length": 2.5}, "query_length: got 2.5, wanted a static int"),
        ({"key_length": -3}, "key_length: got -3"),
        ({"batch": 2, "key_begin": [0, 1, 2, 3]}, r"key_begin: got shape \(4,\), wanted \(2, 4\)"),
        ({"query_seq_lengths": [1, 2], "key_end": [[1] * 4]}, r"key_end: got shape \(1, 4\)"),
        ({"implementation": "cudnn"}, "implementation: got 'cudnn', wanted 'fa3', its equal here"),
        ({"query_segment_ids": [1] * 4}, "key_value_segment_ids: got None, wanted both"),
        ({"local_window_size": -2}, "local_window_size: got -2"),
    ],
)
def test_key_intervals_refuses(arguments: dict[str, Any], message: str):
    call: dict[str, Any] = {"query_length": 4, "key_length": 5, **arguments}
    with pytest.raises(ValueError, match=message):
        jax_fa3.key_intervals(**call)


def test_key_intervals_vmap():
    lengths = ints(0, 2, 9)
    found = jax.vmap(lambda n: jax_fa3.key_intervals(4, 5, key_value_seq_lengths=n))(lengths)
    np.testing.assert_array_equal(found[1], np.clip(lengths, 0, 5)[:, None] * ints(1, 1, 1, 1))


def test_key_intervals_shard_map():
    """Ids of the queries the same on all devices, those of the keys not."""
    mesh = jax.make_mesh((8,), ("keys",), axis_types=(jax.sharding.AxisType.Auto,))
    query, key = np.arange(8, dtype=np.int32)[None], np.arange(16, dtype=np.int32)[None]

    def intervals(query: jax.Array, key: jax.Array) -> Any:
        return jax_fa3.key_intervals(8, 2, query_segment_ids=query, key_value_segment_ids=key)[1]

    specs = {"mesh": mesh, "in_specs": (jax.P(), jax.P(None, "keys")), "out_specs": jax.P("keys")}
    found = jax.jit(jax.shard_map(intervals, **specs))(query, key)
    wanted = np.zeros((8, 8), np.int32)
    for device in range(4):
        wanted[device, 2 * device : 2 * device + 2] = 1, 2
    np.testing.assert_array_equal(found, wanted)


def test_key_intervals_are_int32_under_x64():
    with jax.enable_x64(True):
        begin, end = jax_fa3.key_intervals(
            4,
            5,
            is_causal=True,
            query_offset=np.arange(2),
            query_segment_ids=np.ones((2, 4), np.int64),
            key_value_segment_ids=np.ones((2, 5), np.int64),
        )
    assert begin.dtype == end.dtype == jnp.int32
    np.testing.assert_array_equal(end, [[1, 2, 3, 4], [2, 3, 4, 5]])
