"""Padding that has segment id 0, at both ends of a row: a loss that leaves it out, and the argument
that says so, in every function that takes segment ids."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equal
from jax import Array
from sequences import Split

import jax_fa3
from jax_fa3 import context_parallel, fp8

pytestmark = pytest.mark.usefixtures("on_cpu")

# A prompt padded at the left and its answer at the right; padding in the middle; none.
IDS = np.array([[0, 0, 1, 1, 1, 1, 0, 0], [2, 2, 0, 0, 3, 3, 3, 0], [5, 5, 5, 5, 4, 4, 4, 4]])
SEGMENTS: dict[str, Any] = {"query_segment_ids": IDS, "key_value_segment_ids": IDS}
NEGATIVE = {name: np.where(ids == 0, -1, ids) for name, ids in SEGMENTS.items()}
PADDED = SEGMENTS | {"padding_segment_id": 0}
B, T, N, K, H = 3, 8, 4, 2, 16
QKV = tuple(
    jax.random.normal(jax.random.key(i), (B, T, heads, H)) * 2 + 0.3
    for i, heads in enumerate((N, K, K))
)
TEXT = (IDS != 0)[..., None, None]


def on_devices(strategy: str, zigzag: bool) -> Any:
    split = Split(strategy, zigzag, "two", inside=zigzag)
    return lambda *qkv, **options: split.attention(*qkv, **options)


def plain(*qkv: Array, **options: Any) -> Any:
    return jax_fa3.dot_product_attention(*qkv, **options, return_residual=True)


def packed(*qkv: Array, **options: Any) -> Any:
    qkv_ = jnp.concatenate(qkv, axis=2)
    return jax_fa3.qkv_dot_product_attention(qkv_, K, **options, return_residual=True)


def by_intervals(*qkv: Array, **options: Any) -> Any:
    begin, end = jax_fa3.key_intervals(T, T, **options)
    return plain(*qkv, key_begin=begin, key_end=end)


def without_batch(*qkv: Array, **options: Any) -> Any:
    entries = [
        plain(*(x[i] for x in qkv), **{k: x[i] if np.ndim(x) else x for k, x in options.items()})
        for i in range(B)
    ]
    return [jnp.stack(x) for x in zip(*entries, strict=True)]


EXACT: dict[str, Any] = {
    "kernels' derivative": plain,
    "xla": functools.partial(plain, implementation="xla"),
    "qkv": packed,
    "key_intervals": by_intervals,
    "without batch": without_batch,
    "ring": on_devices("ring", True),
    "ring, whole arrays": on_devices("ring", False),
    "all_gather": on_devices("all_gather", True),
    "all_to_all": on_devices("all_to_all", False),
}
ALL = EXACT | {
    "fp8": functools.partial(fp8.dot_product_attention, return_residual=True),
    "fp8, xla": functools.partial(
        fp8.dot_product_attention, return_residual=True, implementation="xla"
    ),
}


def value_and_grads(function: Any, **options: Any) -> Any:
    """Of a loss of the text, log-sum-exp included."""

    def loss(*qkv: Array) -> Any:
        out, lse = function(*qkv, **options)
        out, lse = jnp.where(TEXT, out, 0), jnp.where(TEXT[..., 0], lse, 0)
        return (out**2).sum() + jnp.sin(lse).sum(), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*QKV)


def dense(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
    """With the ids as a mask, by jnp; padding sees padding."""
    key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
    mask = IDS[:, None, :, None] == IDS[:, None, None, :]
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) / H**0.5
    scores = jnp.where(mask, scores, -jnp.inf)
    out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), value)
    return out, jax.nn.logsumexp(scores, axis=-1).swapaxes(1, 2)


@functools.cache
def exact(name: str) -> Any:
    return value_and_grads(dense) if name in EXACT else value_and_grads(ALL[name], **NEGATIVE)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("options", [SEGMENTS, PADDED, NEGATIVE], ids=["0", "said", "-1"])
def test_loss_of_the_text(name: str, options: Any):
    """Right, whether padding is said to be padding or is a broken run; 0 where nothing goes in."""
    (loss, out), grads = value_and_grads(ALL[name], **options)
    (wanted, wanted_out), wanted_grads = exact(name)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    for x, y in zip((out, *grads), (wanted_out, *wanted_grads), strict=True):
        assert not np.where(TEXT, 0, x).any()  # NaN is not 0
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("name", ALL)
def test_is_as_negative_ids(name: str):
    """Bit by bit, of all rows: those of padding are 0, and -inf."""

    def results(options: Any) -> Any:
        return jax.jit(functools.partial(ALL[name], **options))(*QKV)

    found = results(PADDED)
    assert equal(found, results(NEGATIVE))
    assert not np.where(TEXT, 0, found[0]).any()
    assert (np.asarray(found[1])[IDS == 0] == -np.inf).all()
    other = {k: np.where(x == 0, 7, x) for k, x in SEGMENTS.items()} | {"padding_segment_id": 7}
    assert equal(found, results(other))
    both = {k: np.where(np.arange(T) < 4, x, other[k]) for k, x in NEGATIVE.items()}
    assert equal(found, results(both | {"padding_segment_id": np.int64(7)}))


@pytest.mark.parametrize("name", ["xla", "qkv", "key_intervals", "ring, whole arrays", "fp8"])
@pytest.mark.parametrize("id_", [2**31, 2**40, 2**64])
def test_ids_beyond_int32(name: str, id_: int):
    huge: dict[str, Any] = {k: np.where(x == 0, id_, x.astype(object)) for k, x in SEGMENTS.items()}
    huge["padding_segment_id"] = id_
    assert equal(ALL[name](*QKV, **huge), ALL[name](*QKV, **NEGATIVE))


def test_default_is_the_negative_ids():
    """Id 0 is a segment as any other: in row 1 there are two runs of it, which are NaN."""
    out, _ = plain(*QKV, **SEGMENTS)
    nan = np.isnan(out).all((2, 3))
    np.testing.assert_array_equal(nan, [row == 0 if (row == 0).any() else row < 0 for row in IDS])
    assert equal(plain(*QKV, **NEGATIVE), plain(*QKV, **NEGATIVE, padding_segment_id=-3))


def test_quantized():
    pairs = [fp8.quantize(x) for x in QKV]
    arrays, scales = zip(*pairs, strict=True)
    call = functools.partial(fp8.quantized_dot_product_attention, *arrays, *scales)
    assert equal(call(**PADDED), call(**NEGATIVE))


def test_keys_and_queries_of_their_own():
    """Padding among the keys alone, in runs that would be broken; and queries that ask for it."""
    query_ids, key_ids = np.array([[4, 4, 9, 4, 3, 9]]), np.array([[9, 4, 4, 9, 9, 3, 9]])
    begin, end = jax_fa3.key_intervals(
        6, 7, query_segment_ids=query_ids, key_value_segment_ids=key_ids, padding_segment_id=9
    )
    np.testing.assert_array_equal(begin, [[1, 1, 0, 1, 5, 0]])
    np.testing.assert_array_equal(end, [[3, 3, 0, 3, 6, 0]])


CALLS: dict[str, Any] = {
    "dot_product_attention": plain,
    "qkv_dot_product_attention": packed,
    "key_intervals": lambda *_, **options: jax_fa3.key_intervals(T, T, batch=B, **options),
    "context_parallel": lambda *qkv, **options: context_parallel.dot_product_attention(
        *qkv, axis_name="sp", sharding=Split(mesh="two").sharding, **options
    ),
    "fp8": fp8.dot_product_attention,
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"padding_segment_id": 0},
            "got 0 without segment ids, wanted None, or both query_segment",
        ),
        (SEGMENTS | {"padding_segment_id": True}, "got True, wanted a static int"),
        (SEGMENTS | {"padding_segment_id": 0.0}, "got 0.0, wanted a static int"),
        (SEGMENTS | {"padding_segment_id": "0"}, "got '0', wanted a static int"),
        (SEGMENTS | {"padding_segment_id": jnp.int32(0)}, "got Array.*, wanted a static int"),
        (SEGMENTS | {"padding_segment_id": [0]}, r"got \[0\], wanted a static int"),
    ],
)
def test_refuses(name: str, options: Any, message: str):
    with pytest.raises(ValueError, match=f"^padding_segment_id: {message}"):
        CALLS[name](*QKV, **options)


def test_is_supported():
    ids = {k: jax.ShapeDtypeStruct(x.shape, jnp.int32) for k, x in SEGMENTS.items()}
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in QKV]
    reason = jax_fa3.is_supported(*shapes, **ids, padding_segment_id=0)
    assert reason is None or "padding_segment_id" not in reason
    reason = jax_fa3.is_supported(*shapes, padding_segment_id=0)
    assert reason is not None and reason.startswith("padding_segment_id: got 0 without segment ids")


def test_under_strict_modes():
    options: Any = {"implementation": "xla", **PADDED}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        begin, _ = jax_fa3.key_intervals(T, T, **options)
    np.testing.assert_array_equal(begin[0], [0, 0, 2, 2, 2, 2, 0, 0])
