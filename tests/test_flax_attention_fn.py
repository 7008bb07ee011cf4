"""make_attention_fn in Flax's own layers, against Flax's own attention."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from helpers import Results, assert_rounded
from lowering import hide_gpus, lower, targets

pytest.importorskip("flax")
from flax import linen as nn
from flax import nnx

from jax_fa3 import _reference
from jax_fa3.flax import make_attention_fn

B, T, N, H, FEATURES = 2, 12, 4, 8, 24
LEFT = jnp.arange(T) >= jnp.array([[3], [0]])
RIGHT = jnp.arange(T) < jnp.array([[12], [7]])
CAUSAL = nn.make_causal_mask(LEFT)  # float32 0 and 1, as all of these
MASKS: dict[str, Any] = {
    "none": None,
    "causal": CAUSAL,
    "bool": CAUSAL.astype(bool),
    "left": nn.combine_masks(CAUSAL, nn.make_attention_mask(LEFT, LEFT)),
    "right": nn.make_attention_mask(RIGHT, RIGHT),
    "keys": RIGHT[:, None, None].astype(jnp.float32),
}
X = jax.random.normal(jax.random.key(0), (B, T, FEATURES))
LINEN: Any = nn.MultiHeadDotProductAttention(N, qkv_features=N * H)
VARIABLES = LINEN.init(jax.random.key(1), X)
NNX: Any = functools.partial(nnx.MultiHeadAttention, N, FEATURES, N * H, decode=False)


def sees(mask: Any) -> jax.Array:
    """[B, T]: rows that see a key; Flax makes the others the mean of all values."""
    return (
        jnp.ones((B, T), bool) if mask is None else jnp.broadcast_to(mask, (B, 1, T, T)).any((1, 3))
    )


def gradients(function: Any, mask: Any, *arguments: Any) -> Any:
    """The result over the rows that see a key, and its gradients, of all arguments."""
    rows = sees(mask)[..., None]

    def loss(*arguments):
        out = jnp.where(rows, function(*arguments), 0)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    (_, out), grads = jax.value_and_grad(loss, range(len(arguments)), has_aux=True)(*arguments)
    return out, jax.tree.leaves(grads)


def assert_close(found: Any, exact: Any) -> None:
    """For fp32. The bias of the keys has no gradient, so what is found there is rounding alone."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        y = np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max(initial=1))


@pytest.mark.parametrize("name", MASKS)
def test_linen_layer(name):
    """The same outputs and gradients, of every parameter and of the input, in fp32."""

    @jax.jit
    def results(variables, x):
        ours = (make_attention_fn(mask_to_intervals=convert) for convert in (True, False))
        layers = LINEN, *(LINEN.clone(attention_fn=fn) for fn in ours)
        apply = (functools.partial(layer.apply, mask=MASKS[name]) for layer in layers)
        return [gradients(function, MASKS[name], variables, x) for function in apply]

    exact, *found = results(VARIABLES, X)
    for result in found:
        assert_close(result, exact)


@pytest.mark.parametrize("name", MASKS)
def test_nnx_layer(name):
    """The same with grouped heads."""
    ours = [make_attention_fn(mask_to_intervals=convert) for convert in (True, False)]
    options = {}, *({"attention_fn": fn} for fn in ours)
    layers = [NNX(**x, num_kv_heads=2, rngs=nnx.Rngs(0)) for x in options]
    graphs, states = zip(*map(nnx.split, layers), strict=True)

    @jax.jit
    def results(state, x):
        apply = (lambda s, x, g=g: nnx.merge(g, s)(x, mask=MASKS[name]) for g in graphs)
        return [gradients(function, MASKS[name], state, x) for function in apply]

    exact, *found = results(states[0], X)
    for result in found:
        assert_close(result, exact)


@pytest.mark.parametrize("name", MASKS)
def test_bfloat16(name):
    """By the tolerance rule, against the functions of linen and of nnx in fp32."""
    mask, case = MASKS[name], Case(name, B=B, T=T, S=T, N=N, K=N, H=H)
    visible = jnp.ones((1, 1, T, T), bool) if mask is None else mask != 0
    ours = make_attention_fn(mask_to_intervals=True)

    def rounded(*qkv, mask):
        return _reference.attention(*qkv, mask=visible, round_to=jnp.bfloat16)[0]

    def results(function, dtype):
        rows = sees(mask)[..., None, None]
        qkv = (x.astype(dtype) for x in case.inputs(jnp.bfloat16))
        out, pullback = jax.vjp(lambda *x: jnp.where(rows, function(*x, mask=mask), 0), *qkv)
        return out, *pullback(case.cotangents(jnp.bfloat16)[0].astype(dtype))

    def all_results():
        theirs = nn.dot_product_attention, nnx.dot_product_attention
        wide = [results(function, jnp.float32) for function in (*theirs, rounded)]
        return [results(ours, jnp.bfloat16), *wide]

    every = [Results(out, None, *grads) for out, *grads in jax.jit(all_results)()]  # type: ignore
    found, *exact, rough = every
    assert found.out.dtype == jnp.bfloat16
    for result in exact:
        assert_rounded(found, result, rough, case, jnp.finfo(jnp.bfloat16).eps)


def test_batch_axes():
    """None, one, several, with masks that broadcast."""
    ours, dense = make_attention_fn(mask_to_intervals=True), make_attention_fn()
    causal, padding = CAUSAL[0], MASKS["keys"][1:]
    full = jnp.broadcast_to(causal, (3, 2, 1, T, T))
    for batch, mask in (((), causal), ((3, 2), full), ((3, 2), padding)):
        q = jax.random.normal(jax.random.key(0), (*batch, T, N, H))
        functions = nn.dot_product_attention, ours, dense
        exact, *found = jax.jit(lambda q, m, fs=functions: [f(q, q, q, mask=m) for f in fs])(
            q, mask
        )
        assert_close(found, [exact, exact])
    assert ours(q[:0], q[:0], q[:0], mask=full[:0]).shape == (0, 2, T, N, H)


def test_options_instead_of_masks():
    q = jax.random.normal(jax.random.key(0), (B, T, N, H))
    exact = nn.dot_product_attention(q, q, q, mask=CAUSAL)
    assert_close(make_attention_fn(is_causal=True)(q, q, q), exact)
    assert_close(make_attention_fn()(q, q, q, is_causal=True), exact)  # as nnx passes it
    assert_close(make_attention_fn(local_window_size=(T, 0))(q, q, q), exact)
    ends = jnp.broadcast_to(jnp.arange(1, T + 1), (B, T))
    assert_close(make_attention_fn(key_end=ends)(q, q, q), exact)
    ids = np.where(RIGHT, 3, 0)
    segments = {"query_segment_ids": ids, "key_value_segment_ids": ids, "padding_segment_id": 0}
    text = make_attention_fn(is_causal=True, **segments)(q, q, q)
    np.testing.assert_array_equal(text, np.where(RIGHT[..., None, None], text, 0))
    assert_close(text, np.where(RIGHT[..., None, None], exact, 0))
    mask = MASKS["left"]
    combined = make_attention_fn(mask_to_intervals=True, is_causal=True)
    padding = nn.make_attention_mask(LEFT, LEFT)
    assert_close(
        jnp.where(sees(mask)[..., None, None], combined(q, q, q, mask=padding), 0),
        jnp.where(sees(mask)[..., None, None], nn.dot_product_attention(q, q, q, mask=mask), 0),
    )


def test_linen_decodes():
    """Step by step, as the causal pass; the layer's mask is one of keys, [B, 1, 1, S]."""
    exact = LINEN.apply(VARIABLES, X, mask=CAUSAL)
    layer = LINEN.clone(decode=True, attention_fn=make_attention_fn(mask_to_intervals=True))
    variables = layer.init(jax.random.key(0), X) | VARIABLES
    step = jax.jit(lambda variables, x: layer.apply(variables, x, mutable=["cache"]))
    for i in range(T):
        out, cache = step(variables, X[:, i : i + 1])
        variables = VARIABLES | cache
        assert_close(out, exact[:, i : i + 1])


def test_nnx_decodes():
    layer = NNX(attention_fn=make_attention_fn(mask_to_intervals=True), rngs=nnx.Rngs(0))
    exact = layer(X, mask=CAUSAL)
    layer.init_cache(X.shape)
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    for i in range(T):
        assert_close(step(layer, X[:, i : i + 1]), exact[:, i : i + 1])


def test_compute_dtype():
    """Only where asked for; the result has the layer's own dtype."""
    q = jax.random.normal(jax.random.key(0), (B, T, N, H))
    exact = make_attention_fn()(q, q, q)
    assert exact.dtype == jnp.float32
    found = make_attention_fn(compute_dtype=jnp.bfloat16)(q, q, q)
    narrow = make_attention_fn()(*[q.astype(jnp.bfloat16)] * 3)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, narrow.astype(jnp.float32))
    layers_dtype = make_attention_fn()(q, q, q, dtype=jnp.bfloat16)
    assert layers_dtype.dtype == jnp.bfloat16
    np.testing.assert_array_equal(layers_dtype, narrow)
    mixed = make_attention_fn()(q, q.astype(jnp.bfloat16), q)
    assert mixed.dtype == jnp.float32


def test_lowers_to_the_kernel(monkeypatch):
    """Both layers with "fa3", with a mask and without, under grad."""
    hide_gpus(monkeypatch)
    mask = jax.ShapeDtypeStruct((B, 1, T, T), jnp.float32)
    x = jax.ShapeDtypeStruct((B, T, 64), jnp.float32)
    fn = make_attention_fn(mask_to_intervals=True, implementation="fa3", compute_dtype=jnp.bfloat16)
    layer: Any = nn.MultiHeadDotProductAttention(N, attention_fn=fn)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    for options in ({}, {"mask": mask}):
        text = lower(lambda v, x, o: layer.apply(v, x, **o), variables, x, options)
        assert targets(text) == ["jax_fa3.fwd.v1"]


def test_dropout_in_evaluation():
    """Rates do no harm in a deterministic layer."""
    layer = LINEN.clone(dropout_rate=0.1, attention_fn=make_attention_fn())
    exact = LINEN.apply(VARIABLES, X)
    assert_close(layer.apply(VARIABLES, X, deterministic=True), exact)
