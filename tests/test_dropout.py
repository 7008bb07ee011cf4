"""Dropout: which weights, through every transformation, here in plain JAX. What is refused:
test_dropout_refusals; the layers: test_flax_dropout; on a GPU: test_gpu_dropout."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CAUSAL
from dropouts import KEY, DropoutCase, kept
from helpers import Results, assert_close, oracle, with_gradients
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa3
from jax_fa3 import _dropout

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
    # Sums of z[i, j] * z[i + a, j + b] for all a and b at once, by what they are in the frequencies.
    size = 2 * rows, 2 * keys
    near = np.fft.irfft2((np.abs(np.fft.rfft2(z, size)) ** 2).sum((0, 1)), size)
    steps = [(i, j) for i in range(17) for j in range(65) if i + j]
    found = [near[i, j] / np.sqrt(32 * (rows - i) * (keys - j)) for i, j in steps]
    for b, n, i, j in ((0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 1, 1), (0, 0, 64, 0), (0, 0, 0, 128)):
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
    thresholds = _dropout.threshold(dropout, np.arange(2**15))
    assert thresholds.sum() * _dropout.WHOLE == dropout * 2**7 * 2**15  # to the last digit of it
    assert _dropout.scale(dropout) == pytest.approx(1 / (1 - rate), rel=2**-19 / (1 - rate))


def test_small_rates_drop_in_clusters():
    """As docs/usage.md says: 64 keys of a row have one threshold."""
    dropped = ~np.asarray(kept(KEY, 0.01, 4, 8, 256, 1024)).reshape(-1, 64)
    assert dropped.sum(1).var() / (64 * 0.01 * 0.99) == pytest.approx(1.08, abs=0.03)


def test_it_does_not_depend_on_sizes():
    """So neither on padding."""
    one = kept(KEY, 0.1, 1, 2, 40, 70)
    assert jnp.array_equal(kept(KEY, 0.1, 3, 4, 90, 200)[:1, :2, :40, :70], one)
