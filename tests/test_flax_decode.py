"""The layers of jax_fa3.flax with a cache: the numbers of one pass, and every misuse refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax_layers import IDS, B, K, T, X, both, close, make
from lowering import hide_gpus, lower, targets

import jax_fa3.flax
from jax_fa3 import _targets


@both
def test_decodes(api):
    """A prompt of 5 and then one by one, as in one pass; rotary positions and the window go on."""
    options = {"num_kv_heads": K, "rotary_base": 100.0, "local_window_size": 4}
    exact = make(api, **options)(X)
    layer = make(api, **options, decode=True)
    close(layer(X[:, :5]), exact[:, :5])
    for i in range(5, T):
        close(layer(X[:, i : i + 1]), exact[:, i : i + 1])
    with pytest.raises(
        ValueError, match="^cache_index: got 12 of 12 positions filled, wanted room"
    ):
        layer(X[:, :1])


@both
def test_decodes_left_padding(api):
    """Hidden by key_begin, at positions that start where the text does."""
    exact = make(api, rotary_base=100.0)(X[0, 3:])
    layer, padding = make(api, rotary_base=100.0, decode=True), jnp.array([[3], [0]])
    for start, stop in ((0, 6), (6, 7)):
        rows = jnp.arange(start, stop)
        begin = jnp.broadcast_to(padding, (B, len(rows)))
        out = layer(X[:, start:stop], positions=rows - padding, key_begin=begin)
        first = max(start, 3)
        close(out[0, first - start :], exact[first - 3 : stop - 3])


@pytest.mark.parametrize("rows, kv_cache", [(1, True), (3, True), (T, True), (100, False)])
def test_few_rows_go_to_the_kernels_of_caches(rows, kv_cache, monkeypatch):
    """Which write them where the cache is; a prompt goes to those of training."""
    hide_gpus(monkeypatch)
    x = jnp.zeros((B, rows, X.shape[-1]), jnp.bfloat16)
    options = {"qkv_features": 256, "dtype": jnp.bfloat16, "is_causal": True, "decode": True}
    layer = jax_fa3.flax.linen.MultiHeadAttention(4, num_kv_heads=K, **options)
    variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((B, 128, X.shape[-1])))
    text = lower(lambda v, x: layer.apply(v, x, mutable=["cache"]), variables, x)
    assert targets(text) == [_targets.APPEND_AND_ATTEND if kv_cache else _targets.FWD]


def test_past_the_end_under_jit():
    """cache_index is not known there: NaN, in this and every later call, never an older value."""
    linen = make("linen", decode=True)
    layer, variables = linen.layer, linen.variables
    step = jax.jit(lambda v, x: layer.apply(v, x, mutable=["cache"]))
    out, cache = step(variables, X[:, :-1])
    assert not jnp.isnan(out).any()
    for rows, nan in ((1, False), (1, True), (1, True)):
        out, cache = step(variables | cache, X[:, :rows])
        assert jnp.isnan(out).all() == nan == jnp.isnan(out).any()


@both
def test_refuses_misuse_of_the_cache(api):
    layer = make(api, decode=True)
    with pytest.raises(ValueError, match=r"^cached_key: got new entries of shape .* make it again"):
        layer(X[:1, :1])
    with pytest.raises(ValueError, match="^query_segment_ids: got an array, wanted None: decoding"):
        layer(X, query_segment_ids=IDS, key_value_segment_ids=IDS)
    with pytest.raises(
        ValueError, match="^cached_key: got new entries of dtype float16, wanted the"
    ):
        layer = make(api, decode=True, dtype=jnp.float16)
        if api == "linen":
            layer.variables["cache"] = make(api, decode=True).variables["cache"]
        else:
            layer.init_cache(X.shape, jnp.float32)
        layer(X[:, :1])
    with pytest.raises(
        ValueError, match="^is_causal: got False, wanted True for a layer that decodes"
    ):
        make(api, decode=True, is_causal=False)(X)


def test_refuses_to_decode_before_init():
    with pytest.raises(ValueError, match=r"^decode: got no cache, wanted one: call init_cache\("):
        make("nnx")(X, decode=True)
    layer = make("linen", decode=True)
    del layer.variables["cache"]
    with pytest.raises(ValueError, match="^decode: got no cache, wanted the one that init returns"):
        layer(X)


@both
def test_steps_have_derivatives(api):
    """Few rows go through jax_fa3.kv_cache, which has none: they are those of all rows in one call."""

    def loss(rows: jax.Array, decode: bool) -> jax.Array:
        return (make(api, decode=decode)(rows) ** 2).sum()

    found, exact = (jax.grad(loss)(X[:, :2], decode) for decode in (True, False))
    np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5)
