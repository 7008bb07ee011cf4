"""The calls of engines for TPUs, against what their own reference functions compute."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_fa3 import kv_cache

N, K, PAGE, PAGES, WIDTH, TOKENS = 4, 2, 16, 20, 4, 24
COUNTS, LENGTHS = (1, 1, 15, 3), (9, 33, 15, 64)
RNG = np.random.default_rng(0)
STARTS = np.cumsum([0, *COUNTS])
# Two more sequences, which do not count: whatever is there is not looked at.
KV_LENS = jnp.array([*LENGTHS, 10**6, -1], jnp.int32)
CU_Q_LENS = jnp.array([*STARTS, 10**6, -5], jnp.int32)
TABLE = RNG.permutation(PAGES)[: 4 * WIDTH].reshape(4, WIDTH)
INDICES = jnp.asarray(np.concatenate([TABLE, np.full((2, WIDTH), 10**6)]), jnp.int32)
DISTRIBUTION = jnp.array([2, 2, 4], jnp.int32)


def reference(
    q: Any, k: Any, v: Any, *, sm_scale: float = 1.0, sliding_window: Any = None, soft_cap: Any = None,
    causal: bool = True, sinks: Any = None,
) -> np.ndarray:  # fmt: skip
    """Of one sequence: q [q_len, N, H]; k, v [kv_len, K, H]. What ref_ragged_paged_attention does."""
    k, v = (np.repeat(np.asarray(x, np.float64), N // K, axis=1) for x in (k, v))
    scores = np.einsum("qnh,knh->nqk", np.asarray(q, np.float64), k) * sm_scale
    rows = len(k) - len(q) + np.arange(len(q))[:, None]
    keys = np.arange(len(k))
    hidden = np.zeros(scores.shape[1:], bool)
    if causal:
        hidden = rows < keys
        if sliding_window is not None:
            hidden |= rows - sliding_window >= keys
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    scores = np.where(hidden, -np.inf, scores)
    if sinks is not None:
        scores = np.concatenate(
            [scores, np.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))], 2
        )
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("nqk,knh->qnh", weights[..., : len(k)], v)


def inputs(H: int, dtype: Any = jnp.float32) -> Any:
    """queries, keys, values of the tokens; and of each sequence what is in the cache, [len, K, H]."""
    rows = [jnp.asarray(RNG.normal(size=(TOKENS, heads, H)), dtype) for heads in (N, K, K)]
    old = [[RNG.normal(size=(n, K, H)) for _ in range(2)] for n in LENGTHS]
    return rows, [[np.asarray(jnp.asarray(x, dtype), np.float64) for x in pair] for pair in old]


def filled(old: Any, shape: tuple[int, ...], side_by_side: bool = False) -> np.ndarray:
    """A cache of this shape with them, and NaN where there is nothing."""
    cache = np.full((*shape[:2], shape[2] * shape[3], shape[4]), np.nan)
    for b, (key, value) in enumerate(old):
        for p in range(len(key)):
            at = cache[TABLE[b, p // PAGE], p % PAGE]
            for i in range(K):
                if side_by_side:
                    at[i, :128] = np.concatenate([key[p, i], value[p, i]])
                else:
                    at[2 * i, : key.shape[2]], at[2 * i + 1, : key.shape[2]] = (
                        key[p, i],
                        value[p, i],
                    )
    return cache.reshape(shape)


def assert_right(out: Any, queries: Any, old: Any, eps: float = 1e-5, **options: Any) -> None:
    for b, (key, value) in enumerate(old):
        rows = slice(STARTS[b], STARTS[b + 1])
        wanted = reference(queries[rows], key, value, **options)
        np.testing.assert_allclose(np.asarray(out[rows], np.float64), wanted, rtol=eps, atol=eps)
    np.testing.assert_array_equal(out[STARTS[-1] :], 0)


def updated(old: Any, keys: Any, values: Any) -> Any:
    """The last positions of each sequence are its tokens'."""
    new = []
    for b, pair in enumerate(old):
        rows = slice(STARTS[b], STARTS[b + 1])
        pair = [np.array(x) for x in pair]
        for x, tokens in zip(pair, (keys, values), strict=True):
            x[len(x) - COUNTS[b] :] = tokens[rows]
        new.append(pair)
    return new


OPTIONS = [
    {},
    {"sm_scale": 0.3, "sliding_window": 5},
    {"sm_scale": 0.3, "soft_cap": 2.0, "use_causal_mask": False, "sliding_window": 5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_v3(options: Any):
    """Head dim 80 in 128 columns; the cache is given away, and what is padding stays."""
    (queries, keys, values), old = inputs(80)
    shape = kv_cache.get_kv_cache_shape(PAGES, PAGE, K, 80, jnp.bfloat16)
    assert shape == (PAGES, PAGE, 2, 2, 128)
    cache = jnp.asarray(filled(old, shape), jnp.float32)
    where = KV_LENS, INDICES.ravel(), CU_Q_LENS, DISTRIBUTION
    out, found = kv_cache.ragged_paged_attention(
        queries, keys, values, cache, *where, **options, mask_value=-1e9, d_block_sizes=(1, 2)
    )
    assert cache.is_deleted()
    new = updated(old, keys, values)
    np.testing.assert_array_equal(found, filled(new, shape).astype(np.float32))
    options = {**options, "causal": options.get("use_causal_mask", True)}
    options.pop("use_causal_mask", None)
    assert_right(out, queries, new, **options)


def test_v3_without_update():
    """Keys and values are not used."""
    (queries, keys, _), old = inputs(128)
    shape = kv_cache.get_kv_cache_shape(PAGES, PAGE, K, 128, jnp.float32)
    cache = filled(old, shape).astype(np.float32)
    where = KV_LENS, INDICES.ravel(), CU_Q_LENS, DISTRIBUTION
    out, found = kv_cache.ragged_paged_attention(
        queries, keys, keys, jnp.asarray(cache), *where, update_kv_cache=False
    )
    np.testing.assert_array_equal(found, cache)
    assert_right(out, queries, old, eps=1e-4)


def test_v3_padded_heads_and_scales():
    """Three key/value heads are six of eight, in e4m3, and the query is rounded to e4m3 too."""
    rng = np.random.default_rng(1)
    shape = kv_cache.get_kv_cache_shape(PAGES, PAGE, 3, 128, jnp.float8_e4m3fn)
    assert shape == (PAGES, PAGE, 2, 4, 128)
    cache = jnp.asarray(rng.normal(size=shape), jnp.float8_e4m3fn)
    before = np.asarray(cache, np.float32).reshape(PAGES, PAGE, 8, 128)
    queries = jnp.asarray(rng.normal(size=(1, 3, 128)), jnp.bfloat16)
    keys, values = (jnp.asarray(rng.normal(size=(1, 3, 128)), jnp.float8_e4m3fn) for _ in range(2))
    where: Any = jnp.array([20]), jnp.array([7, 3]), jnp.array([0, 1]), jnp.array([1, 1, 1])
    scales = {"q_scale": 0.5, "k_scale": 0.25, "v_scale": 2.0}
    out, found = kv_cache.ragged_paged_attention(
        queries, keys, values, cache, *where, sm_scale=0.2, **scales
    )
    after = np.asarray(found, np.float32).reshape(before.shape)
    np.testing.assert_array_equal(after[3, 3, 0:6:2], np.asarray(keys[0], np.float32))
    np.testing.assert_array_equal(after[3, 3, 1:6:2], np.asarray(values[0], np.float32))
    before[3, 3, :6] = after[3, 3, :6]
    np.testing.assert_array_equal(after, before)
    both = np.concatenate([after[7], after[3]])[:20]
    query = (queries.astype(jnp.float32) / 0.5).astype(jnp.float8_e4m3fn).astype(jnp.float32)[
        0
    ] * 0.5
    scores = np.einsum("nh,knh->nk", query, both[:, 0:6:2] * 0.25) * 0.2
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = np.einsum("nk,knh->nh", weights / weights.sum(-1, keepdims=True), both[:, 1:6:2] * 2)
    np.testing.assert_allclose(np.asarray(out[0], np.float32), wanted, rtol=2**-7, atol=2**-7)


def test_hd64():
    """Keys and values side by side, and sinks, as the ninth argument."""
    (queries, keys, values), old = inputs(64)
    shape = kv_cache.get_kv_cache_shape_hd64(PAGES, PAGE, K, jnp.bfloat16)
    assert shape == (PAGES, PAGE, 1, 2, 128)
    cache = jnp.asarray(filled(old, shape, True), jnp.float32)
    where = KV_LENS, INDICES.ravel(), CU_Q_LENS, DISTRIBUTION
    sinks = jnp.linspace(-1, 1, N)
    out, found = kv_cache.ragged_paged_attention_hd64(
        queries, keys, values, cache, *where, sinks, sm_scale=0.125, sliding_window=20
    )
    new = updated(old, keys, values)
    np.testing.assert_array_equal(found, filled(new, shape, True).astype(np.float32))
    assert_right(out, queries, new, sm_scale=0.125, sliding_window=20, sinks=np.asarray(sinks))


def test_v2():
    """Against JAX's own reference function."""
    options: Any = {"sm_scale": 0.3, "sliding_window": 5, "soft_cap": 2.0}
    options |= {"k_scale": 0.5, "v_scale": 2.0}
    try:
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel
    except (ImportError, AttributeError) as error:
        pytest.skip(str(error))
    (queries, _, _), old = inputs(64)
    pages = jnp.nan_to_num(filled(old, (PAGES, PAGE, 2 * K, 1, 64))[:, :, :, 0]).astype(jnp.float32)
    lengths, table, starts = KV_LENS[:4], INDICES[:4], CU_Q_LENS[:5]
    count = jnp.array([4], jnp.int32)
    operands = queries, pages, lengths, table, starts, count
    wanted = kernel.ref_ragged_paged_attention(*operands, **options)
    out = kv_cache.ragged_paged_attention_v2(*operands, **options, num_kv_pages_per_block=2)
    np.testing.assert_allclose(out[: STARTS[-1]], wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(out[STARTS[-1] :], 0)


def test_in_a_jitted_step():
    """As engines call it: no copy of the cache."""
    (queries, keys, values), _ = inputs(128)
    shape = kv_cache.get_kv_cache_shape(PAGES * 8, PAGE, K, 128, jnp.float32)
    where = KV_LENS, INDICES.ravel(), CU_Q_LENS, DISTRIBUTION

    def step(cache: Any) -> Any:
        for _ in range(2):
            out, cache = kv_cache.ragged_paged_attention(queries, keys, values, cache, *where)
        return out, cache

    cache = jnp.zeros(shape)
    compiled = jax.jit(step, donate_argnums=0).lower(cache).compile()
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < cache.nbytes
    pointer = cache.unsafe_buffer_pointer()
    assert compiled(cache)[1].unsafe_buffer_pointer() == pointer


WRONG = {
    "queries": (jnp.zeros((1, TOKENS, N, 128)), r"queries: got shape .*, wanted \(tokens, N, H\)"),
    "keys": (
        jnp.zeros((TOKENS, K, 64)),
        r"keys: got shape .*, wanted \(24, K, 128\) as queries has",
    ),
    "kv_cache": (jnp.zeros((PAGES, PAGE, 4, 128)), r"kv_cache: got shape .* a \* b >= 4"),
    "kv_lens": (jnp.zeros((2, 2), int), r"kv_lens: got shape \(2, 2\), wanted \(B,\)"),
    "page_indices": (INDICES, r"page_indices: got shape \(6, 4\), wanted one axis"),
    "distribution": (jnp.zeros(2, int), r"distribution: got shape \(2,\), wanted \(3,\)"),
    "sliding_window": (0, r"sliding_window: got 0, wanted an int > 0, or None"),
}


@pytest.mark.parametrize("name", WRONG)
def test_refuses(name: str):
    value, message = WRONG[name]
    good: dict[str, Any] = {
        "queries": jnp.zeros((TOKENS, N, 128)),
        "keys": jnp.zeros((TOKENS, K, 128)),
        "values": jnp.zeros((TOKENS, K, 128)),
        "kv_cache": jnp.zeros((PAGES, PAGE, 2, 2, 128)),
        "kv_lens": KV_LENS,
        "page_indices": INDICES.ravel(),
        "cu_q_lens": CU_Q_LENS,
        "distribution": DISTRIBUTION,
    }
    with pytest.raises(ValueError, match=f"^{message}"):
        kv_cache.ragged_paged_attention(**{**good, name: value})


def test_refuses_unknown_arguments():
    with pytest.raises(TypeError, match="^custom_mask: not an argument of ragged_paged_attention"):
        nothing: Any = [None] * 8
        kv_cache.ragged_paged_attention(*nothing, custom_mask=None)
