"""Dropout: which weights, through every transformation, here in plain JAX, and what is refused. On a
GPU: test_gpu_dropout."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CAUSAL
from dropouts import KEY, DropoutCase, kept
from flax import nnx
from helpers import Results, assert_close, oracle, with_gradients
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import lower, targets
from test_ffi import needs_kernels

import jax_fa3
from jax_fa3 import _dropout, _targets, context_parallel, fp8
from jax_fa3.flax import linen, make_attention_fn
from jax_fa3.flax import nnx as our_nnx

B, T, S, N, K, H = 2, 70, 133, 4, 2, 16
CASE = DropoutCase("dropout", T, S, N, K, H, B=B, mask=CAUSAL, rate=0.25)
SOME: dict[str, Any] = {"dropout_rate": 0.1, "dropout_key": KEY}


def attention(*qkv: Any, **options: Any) -> Any:
    options = {**CASE.options, "return_residual": True, **options}
    return jax_fa3.dot_product_attention(*qkv, **options)


@functools.cache
def exact() -> Results:
    return oracle(CASE, jnp.float32, CASE.inputs(jnp.float32), CASE.cotangents(jnp.float32))


def check(function: Any, *qkv: Any) -> None:
    found = jax.jit(functools.partial(with_gradients, function))
    assert_close(found(CASE.cotangents(jnp.float32), *qkv), exact(), 1e-4)


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("remat", [False, True])
def test_values_and_gradients(implementation: Any, remat: bool):
    call = functools.partial(attention, implementation=implementation)
    check(jax.checkpoint(call) if remat else call, *CASE.inputs(jnp.float32))


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit, "argument"], ids=str)
def test_over_devices(kind: Any, implementation: Any):
    """Batch and heads: each device drops what one alone would."""
    kinds = (AxisType.Auto if kind == "argument" else kind,) * 2
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"), axis_types=kinds)
    where = P("x", None, "y")
    options: Any = {"sharding": NamedSharding(mesh, where)} if kind == "argument" else {}
    qkv = [jax.device_put(x, NamedSharding(mesh, where)) for x in CASE.inputs(jnp.float32)]
    check(functools.partial(attention, implementation=implementation, **options), *qkv)


def test_under_vmap():
    """Each entry has its own where the key is mapped, and all the same where it is not."""
    keys, qkv = jax.random.split(KEY, 3), CASE.inputs(jnp.float32)

    def call(key: Any, query: Any) -> Any:
        return attention(query, *qkv[1:], dropout_key=key)[0]

    queries = jnp.stack([qkv[0], -qkv[0], 2 * qkv[0]])
    both = jax.vmap(call)(keys, queries), jax.vmap(call, (None, 0))(KEY, queries)
    for i in range(3):
        assert_close(both[0][i], call(keys[i], queries[i]), 1e-5)
        assert_close(both[1][i], call(KEY, queries[i]), 1e-5)
    alone = jax.vmap(call, (0, None))(keys, qkv[0])
    assert all(float(jnp.abs(alone[i] - alone[0]).max()) > 0.1 for i in (1, 2))


def test_forward_mode():
    qkv = CASE.inputs(jnp.float32)
    call = functools.partial(attention, implementation=None)
    _, found = jax.jvp(call, qkv, qkv)
    _, wanted = jax.jvp(functools.partial(attention, implementation="xla"), qkv, qkv)
    assert_close(found, wanted, 1e-4)


def test_packed():
    qkv = jnp.stack([CASE.inputs(jnp.float32)[0]] * 3, axis=2)
    for x, arguments in ((qkv, ()), (qkv.reshape(B, T, 3 * N, H), (N,))):
        found = jax_fa3.qkv_dot_product_attention(x, *arguments, **SOME)
        assert_close(
            found, jax_fa3.dot_product_attention(*(qkv[:, :, i] for i in range(3)), **SOME), 1e-5
        )


def test_no_batch_axis():
    qkv = CASE.inputs(jnp.float32)
    found = jax_fa3.dot_product_attention(*(x[0] for x in qkv), **SOME)
    assert_close(found, jax_fa3.dot_product_attention(*qkv, **SOME)[0], 1e-5)


def test_keys():
    """Raw and typed ones, of any generator, traced or not; none where the rate is 0."""
    qkv = CASE.inputs(jnp.float32)
    call = functools.partial(jax_fa3.dot_product_attention, *qkv, dropout_rate=0.1)
    found = call(dropout_key=jax.random.key(3))
    assert_close(found, call(dropout_key=jax.random.PRNGKey(3)), 1e-5)
    assert_close(found, jax.jit(lambda key: call(dropout_key=key))(jax.random.key(3)), 1e-5)
    assert jnp.isfinite(call(dropout_key=jax.random.key(3, impl="rbg"))).all()
    plain = jax_fa3.dot_product_attention(*qkv)
    both: Any = ({"dropout_rate": 0.0, "dropout_key": KEY}, {"dropout_rate": None})
    for off in both:
        assert_close(jax_fa3.dot_product_attention(*qkv, **off), plain, 1e-5)


def test_whether_it_is_dropped_is_independent():
    """Of rows, keys, heads and batch entries: no covariance, and the rate of each place."""
    rate, rows, keys = 0.2, 256, 512
    dropped = 1.0 - np.asarray(kept(KEY, rate, 4, 8, rows, keys), np.float32)
    z = (dropped - rate) / np.sqrt(rate * (1 - rate))
    assert abs(z.sum()) / np.sqrt(z.size) < 4
    for axes in ((0, 1, 2), (0, 1, 3), (2, 3)):  # of each key, row, head
        sums = z.sum(axes)
        normal = sums / np.sqrt(z.size / sums.size)
        assert np.abs(normal).max() < 5 and abs((normal**2).mean() - 1) < 4 * np.sqrt(2 / sums.size)
    shifts = [(0, 0, i, j) for i in range(17) for j in range(65) if i + j]
    shifts += [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 1, 1), (0, 0, 64, 0), (0, 0, 0, 128)]
    found = []
    for b, n, i, j in shifts:
        pairs = z[b:, n:, i:, j:] * z[: 4 - b, : 8 - n, : rows - i, : keys - j]
        found.append(pairs.sum() / np.sqrt(pairs.size))
    assert np.abs(found).max() < 4.5 and abs(np.square(found).mean() - 1) < 0.25


@pytest.mark.parametrize("rate", [1e-4, 0.1, 0.37, 0.9, 0.999])
def test_rate(rate: float):
    """Within 4 sigma, of 10^7 weights; and what is left is multiplied by what it is in the mean."""
    weights = kept(KEY, rate, 2, 20, 256, 1024)
    sigma = np.sqrt(rate * (1 - rate) * weights.size)
    dropped = weights.size - int(weights.sum())
    assert abs(dropped - rate * weights.size) < 4 * sigma
    dropout, _ = _dropout.checked(rate, KEY)
    thresholds = [(dropout + place) >> 3 for place in range(8)]
    assert sum(thresholds) == dropout  # 8 places of 2^15
    assert _dropout.scale(dropout) == pytest.approx(1 / (1 - rate), rel=2**-19 / (1 - rate))


def test_it_does_not_depend_on_sizes():
    """So neither on padding."""
    one = kept(KEY, 0.1, 1, 2, 40, 70)
    assert jnp.array_equal(kept(KEY, 0.1, 3, 4, 90, 200)[:1, :2, :40, :70], one)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no key": ({"dropout_rate": 0.1}, "dropout_key: got None, wanted a key of jax.random"),
    "no rate": ({"dropout_key": KEY}, "dropout_key: got a key without dropout_rate, wanted None"),
    "one": ({**SOME, "dropout_rate": 1.0}, r"dropout_rate: got 1.0, wanted a static float in \[0"),
    "below": ({**SOME, "dropout_rate": -0.1}, "dropout_rate: got -0.1, wanted a static float"),
    "nan": ({**SOME, "dropout_rate": float("nan")}, "dropout_rate: got nan"),
    "text": ({**SOME, "dropout_rate": "0.1"}, "dropout_rate: got '0.1'"),
    "bool": ({**SOME, "dropout_rate": True}, "dropout_rate: got True"),
    "int key": ({**SOME, "dropout_key": 3}, "dropout_key: got a int, wanted one key of jax.random"),
    "keys": (
        {**SOME, "dropout_key": jax.random.split(KEY)},
        r"dropout_key: got keys of shape \(2,",
    ),
    "floats": ({**SOME, "dropout_key": jnp.ones(2)}, r"dropout_key: got float32\[2\], wanted one"),
    "words": (
        {**SOME, "dropout_key": jnp.ones(3, jnp.uint32)},
        r"dropout_key: got uint32\[3\], wanted one key",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case: str):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        jax_fa3.dot_product_attention(*CASE.inputs(jnp.float32), **options)


def test_traced_rate():
    qkv = CASE.inputs(jnp.float32)
    call = lambda rate: jax_fa3.dot_product_attention(*qkv, dropout_rate=rate, dropout_key=KEY)
    with pytest.raises(ValueError, match="^dropout_rate: got .*, wanted a static float"):
        jax.jit(call)(0.1)


def shapes(head_dim: int, key_length: int = S) -> Any:
    q = jax.ShapeDtypeStruct((B, T, N, head_dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((B, key_length, K, head_dim), jnp.bfloat16)
    return q, k, k


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "80": (
        shapes(80),
        {},
        "dropout_rate: got one beside head dim 80, wanted up to 64, or 97 to 128",
    ),
    "256": (shapes(256), {}, "dropout_rate: got one beside head dim 256"),
    "keys": (shapes(64, 2**18 + 1), {}, "dropout_rate: got 262145 keys, wanted at most 262144"),
    "bias": (shapes(64), {"bias": jnp.zeros((T, S))}, "bias: got one beside dropout, wanted one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernels_refuse(case: str):
    qkv, options, message = REFUSED[case]
    reason = jax_fa3.is_supported(*qkv, device="sm_90", **SOME, **options)
    assert reason is not None and re.match(message, reason) and "implementation='xla'" in reason
    call = functools.partial(jax_fa3.dot_product_attention, implementation="fa3", **SOME, **options)
    with pytest.raises(NotImplementedError, match=f"^implementation='fa3': {message}"):
        jax.eval_shape(call, *qkv)


@needs_kernels
@pytest.mark.parametrize("head_dim", [8, 64, 104, 128])
def test_what_they_take(head_dim: int):
    key = jax.eval_shape(lambda: jax.random.key(0))
    options: Any = {"dropout_rate": 0.1, "dropout_key": key}
    assert jax_fa3.is_supported(*shapes(head_dim), device="sm_90", **options) is None


@needs_kernels
def test_lowering():
    """Forward and backward get the heads' words; without dropout nothing is there."""

    def loss(options: Any, *qkv: Any) -> Any:
        out = jax_fa3.dot_product_attention(*qkv, implementation="fa3", **options)
        return out.astype(jnp.float32).sum()

    text = lower(jax.grad(functools.partial(loss, SOME), (0, 1, 2)), *shapes(64))
    assert targets(text) == [_targets.FWD, _targets.BWD]
    assert text.count(f"dropout = {round(0.1 * 2**18)} : i64") == 2
    assert text.count(f"tensor<{B}x{N}x2xui32>") >= 2
    text = lower(jax.grad(functools.partial(loss, {}), (0, 1, 2)), *shapes(64))
    assert text.count("dropout = 0 : i64") == 2 and "2xui32>" not in text


@pytest.mark.parametrize("of", ["fp8", "ring"])
def test_others_have_none(of: str):
    qkv = CASE.inputs(jnp.bfloat16)
    function: Any = fp8.dot_product_attention
    if of == "ring":
        function = functools.partial(context_parallel.dot_product_attention, axis_name="x")
    with pytest.raises(NotImplementedError, match=r"^dropout_rate: got 0.1, wanted 0 or None: "):
        function(*qkv, **SOME)


X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 32)), jnp.float32)
RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


def test_linen_layer():
    layer = linen.MultiHeadAttention(4, dropout_rate=0.5)
    variables = layer.init(RNGS, X, deterministic=True)
    plain: Any = linen.MultiHeadAttention(4).apply(variables, X)
    assert_close(layer.apply(variables, X, deterministic=True), plain, 1e-5)
    assert_close(layer.clone(deterministic=True).apply(variables, X), plain, 1e-5)
    rng: Any = {"rngs": {"dropout": jax.random.key(1)}}
    out = layer.apply(variables, X, deterministic=False, **rng)
    assert_close(out, layer.apply(variables, X, deterministic=False, **rng), 1e-5)
    assert float(jnp.abs(jnp.asarray(out) - plain).max()) > 0.01
    with pytest.raises(ValueError, match="^deterministic: got None, wanted True or False"):
        layer.apply(variables, X, **rng)


def test_nnx_layer():
    plain = our_nnx.MultiHeadAttention(4, 32, rngs=nnx.Rngs(0))
    layer = our_nnx.MultiHeadAttention(4, 32, dropout_rate=0.5, rngs=nnx.Rngs(0))
    assert_close(layer(X, deterministic=True), plain(X), 1e-5)
    out = layer(X, deterministic=False, rngs=nnx.Rngs(dropout=1))
    assert_close(out, layer(X, deterministic=False, rngs=nnx.Rngs(dropout=1)), 1e-5)
    assert float(jnp.abs(out - plain(X)).max()) > 0.01
    with pytest.raises(ValueError, match="^rngs: got None, wanted flax.nnx.Rngs"):
        layer(X, deterministic=False)


def test_in_flax_layers():
    layer = nn.MultiHeadDotProductAttention(4, dropout_rate=0.5, attention_fn=make_attention_fn())
    variables = layer.init(RNGS, X, deterministic=True)
    rngs: Any = {"rngs": {"dropout": jax.random.key(1)}}
    out = layer.apply(variables, X, deterministic=False, **rngs)
    plain: Any = layer.apply(variables, X, deterministic=True)
    assert float(jnp.abs(jnp.asarray(out) - plain).max()) > 0.01
    theirs = nnx.MultiHeadAttention(
        4, 32, dropout_rate=0.5, decode=False, attention_fn=make_attention_fn(), rngs=nnx.Rngs(0)
    )
    out = theirs(X, deterministic=False, rngs=nnx.Rngs(dropout=1))
    assert float(jnp.abs(out - theirs(X, deterministic=True)).max()) > 0.01
    with pytest.raises(ValueError, match="^dropout_rate: got one, wanted none: the layer"):
        make_attention_fn(dropout_rate=0.1)
