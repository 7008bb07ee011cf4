"""Dropout on a Hopper GPU: the same weights as in plain JAX, and what comes of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CAUSAL
from dropouts import DROPOUTS, KEY, DropoutCase, kept
from helpers import assert_rounded, both_oracles, equal, poison, with_gradients
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa3

pytestmark = pytest.mark.gpu

attention = functools.partial(jax_fa3.dot_product_attention, implementation="fa3")
wanted = jax.jit(both_oracles, static_argnums=(0, 1))


def of(case: DropoutCase, **options: Any) -> Any:
    return functools.partial(attention, return_residual=True, **case.options, **options)


def check(case: DropoutCase, inputs: Any, **options: Any) -> Any:
    dtype = inputs[0].dtype
    cotangents = case.cotangents(dtype)
    poison(case, dtype)
    call = functools.partial(with_gradients, of(case, **options))
    found = jax.jit(call)(cotangents, *inputs)
    exact, rounded = wanted(case, dtype, inputs, cotangents)
    assert_rounded(found, exact, rounded, case, jnp.finfo(dtype).eps)
    return found


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", DROPOUTS, ids=lambda case: f"{case}, {case.H}")
def test_table(case: DropoutCase, dtype: Any):
    check(case, case.inputs(dtype))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("values", ["means", "small", "large"])
def test_values(values: str, head_dim: int):
    case = DropoutCase(values, 300, 333, H=head_dim, mask=CAUSAL)
    changes: Any = {
        "means": lambda x: 1 + 0.3 * x,
        "small": lambda x: 1e-3 * x,
        "large": lambda x: 30 * x,
    }
    for dtype in (jnp.bfloat16, jnp.float16):
        check(case, tuple(map(changes[values], case.inputs(dtype))))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_weights_are_those_of_plain_jax(head_dim: int):
    """Each alone, in the forward and in the backward: values are rows of the identity, all weights are
    equal, and out is 0 or not; and so is dV, of one row's cotangent at a time."""
    rate, rows, keys, heads = 0.3, 333, 512, 3
    q = jnp.zeros((2, rows, heads, head_dim), jnp.bfloat16)
    k = jnp.zeros((2, keys, 1, head_dim), jnp.bfloat16)
    right = np.asarray(kept(KEY, rate, 2, heads, rows, keys))
    call = jax.jit(functools.partial(attention, dropout_rate=rate, dropout_key=KEY))
    for first in range(0, keys, head_dim):
        v = (
            jnp.zeros_like(k)
            .at[:, first : first + head_dim, 0]
            .set(jnp.eye(head_dim, dtype=k.dtype))
        )
        found = np.asarray(call(q, k, v) != 0).swapaxes(1, 2)
        assert (found == right[..., first : first + head_dim]).all()

    @jax.jit
    def gradient(first: Any) -> Any:
        """dV [B, S, V], whose column j is of row first + j of the second head alone."""
        dout = jnp.eye(head_dim, dtype=q.dtype)
        whole = jnp.zeros((2, rows + head_dim, heads, head_dim), q.dtype)
        whole = jax.lax.dynamic_update_slice(
            whole, jnp.stack([dout] * 2)[:, :, None], (0, first, 1, 0)
        )
        return jax.vjp(lambda v: call(q, k, v), jnp.zeros_like(k))[1](whole[:, :rows])[0][:, :, 0]

    for first in range(0, rows, head_dim):
        found = np.asarray(gradient(first) != 0).swapaxes(1, 2)
        part = right[:, 1, first : first + head_dim]
        assert (found[:, : part.shape[1]] == part).all()


@pytest.mark.parametrize("rate", [0.1, 0.001])
def test_rate_of_1e8_weights(rate: float):
    """Within 4 sigma. All weights are equal, and each column of value has 1 for 32 of the keys: so few
    are counted exactly by what is left of them."""
    batch, length, heads = 2, 2048, 12
    q = jnp.zeros((batch, length, heads, 64), jnp.float16)
    v = jnp.tile(jnp.eye(64, dtype=q.dtype), (length // 64, 1))[None, :, None]
    call = functools.partial(attention, dropout_rate=rate, dropout_key=KEY)
    out = jax.jit(call)(q, q, jnp.broadcast_to(v, q.shape))
    left = np.asarray(jnp.round(out.astype(jnp.float32) * length * (1 - rate)), np.int64).sum()
    weights = batch * heads * length**2
    sigma = np.sqrt(rate * (1 - rate) * weights)
    assert weights > 1e8 and abs(weights - left - rate * weights) < 4 * sigma


@pytest.mark.parametrize("head_dim", [64, 128])
def test_deterministic(head_dim: int):
    case = DropoutCase("deterministic", 700, 513, 8, 2, H=head_dim, B=3, mask=CAUSAL)
    inputs = case.inputs(jnp.bfloat16)
    found = [check(case, inputs, deterministic_backward=True) for _ in range(2)]
    assert equal(*found)


def test_on_a_mesh_under_vmap_and_packed():
    """As alone; entries have their own where the key is mapped."""
    case = DropoutCase("mesh", 200, 200, 4, 4, H=64, mask=CAUSAL)
    q, k, v = case.inputs(jnp.bfloat16)
    alone = jax.jit(of(case))(q, k, v)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = Mesh(np.array(jax.local_devices(backend="cuda")[:1]), ("x",), axis_types=(kind,))
        where = NamedSharding(mesh, P("x", None, None))
        on_mesh = [jax.device_put(x, where) for x in (q, k, v)]
        assert equal(jax.jit(of(case))(*on_mesh), alone)
    options: Any = {"return_residual": True, "implementation": "fa3", **case.options}
    packed = jax.jit(functools.partial(jax_fa3.qkv_dot_product_attention, **options))
    assert equal(packed(jnp.stack((q, k, v), 2)), alone)

    def with_key(key: Any, q: Any) -> Any:
        return attention(q, k, v, **{**case.options, "dropout_key": key})

    keys = jax.random.split(KEY, 2)
    both = jax.jit(jax.vmap(with_key))(keys, jnp.stack((q, q)))
    assert equal(tuple(both), tuple(jax.jit(with_key)(key, q) for key in keys))
    assert not equal(both[0], both[1])
    same = jax.jit(jax.vmap(with_key, (None, 0)))(KEY, jnp.stack((q, q)))
    assert equal(same[0], alone[0]) and equal(same[1], alone[0])
