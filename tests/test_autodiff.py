"""The kernels' derivatives in reverse mode, on a machine without a GPU: its forward and backward run as plain JAX
there, and must agree with the derivatives of implementation="xla", under every transformation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_alike
from jax.test_util import check_grads
from lowering import lower, targets

import jax_fa3

B, T, S, N, K, H, V = 2, 10, 14, 4, 2, 16, 8
FWD, BWD = "jax_fa3.fwd.v1", "jax_fa3.bwd.v1"
BWD_PACKED = "jax_fa3.bwd_packed.v1"
SEGMENTS = {
    "query_segment_ids": np.array([[0, 0, 1, 1, 1, 2, 2, -1, 3, 3], [5, 4] * 5]),
    "key_value_segment_ids": np.array([[2] * 4 + [1] * 5 + [0] * 4 + [-1], [4] * 7 + [5] * 7]),
}
MASKS: list[dict[str, Any]] = [
    {},
    {"is_causal": True, "query_offset": jnp.array([4, -3]), "logits_soft_cap": 2.0},
    {"query_seq_lengths": [3, 10], "key_value_seq_lengths": [14, 0], "local_window_size": (3, 4)},
    SEGMENTS | {"key_begin": np.arange(B * T).reshape(B, T) % 5, "scale": 0.7},
]


pytestmark = pytest.mark.usefixtures("on_cpu")


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float16)


QKV = normal(B, T, N, H), normal(B, S, K, H, seed=1), normal(B, S, K, V, seed=2)
WEIGHTS = normal(B, T, N, V, seed=3)


def loss(implementation: Any = None, **options: Any) -> Any:
    """A function of query, key and value, into which out and log-sum-exp enter."""

    def function(*qkv):
        attention = functools.partial(jax_fa3.dot_product_attention, return_residual=True)
        out, lse = attention(*qkv, implementation=implementation, **options)
        weighted = (out * WEIGHTS[:1]).astype(jnp.float32).sum()
        return weighted + jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0).sum()

    return function


@pytest.mark.parametrize("options", MASKS)
def test_gradients(options):
    found = jax.value_and_grad(loss(**options), (0, 1, 2))(*QKV)
    assert_alike(found, jax.value_and_grad(loss("xla", **options), (0, 1, 2))(*QKV))


@pytest.mark.parametrize("argnums", [0, 1, 2, (0, 2), (1, 2)])
def test_gradients_of_some_arguments(argnums):
    assert_alike(jax.grad(loss(), argnums)(*QKV), jax.grad(loss("xla"), argnums)(*QKV))


Q, K_, V_ = QKV
QQ, KK = jnp.stack([Q, -2 * Q]), jnp.stack([K_, 0.5 * K_])


def scanned(f: Any) -> Any:
    def function(queries, key, value):
        return jax.lax.scan(lambda total, q: (total + f(q, key, value), None), 0.0, queries)[0]

    return jax.grad(function, (0, 1, 2))


@pytest.mark.parametrize(
    ("transform", "operands"),
    [
        (lambda f: jax.jit(jax.grad(f, (0, 1, 2))), QKV),
        (lambda f: jax.grad(jax.checkpoint(f), (0, 1, 2)), QKV),
        (lambda f: jax.vmap(jax.grad(f, (0, 1, 2)), (0, None, None)), (QQ, K_, V_)),
        (lambda f: jax.grad(lambda *x: jax.vmap(f, (None, 0, None))(*x).sum(), 1), (Q, KK, V_)),
        (lambda f: jax.vmap(jax.vmap(f, (None, 0, None)), (0, None, None)), (QQ, KK, V_)),
        (scanned, (QQ, K_, V_)),
        (lambda f: jax.jacrev(jax.vmap(f, (0, None, None))), (QQ, K_, V_)),
        (lambda f: lambda *x: jax.vjp(f, *x)[1](jnp.float32(3)), QKV),
    ],
    ids=["jit", "remat", "vmap of grad", "grad of vmap", "vmap of vmap", "scan", "jacrev", "vjp"],
)
def test_transformations(transform, operands):
    found, exact = (transform(loss(x, is_causal=True))(*operands) for x in (None, "xla"))
    assert_alike(found, exact)


@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_packed_gradient(num_kv_heads):
    """Is one packed array, the gradients of the three parts."""
    num_heads, kv_heads = (N, K) if num_kv_heads else (N, N)
    qkv = normal(B, T, num_heads + 2 * kv_heads, H, seed=4)
    shape = (B, T, 3, N, H) if num_kv_heads is None else qkv.shape

    def packed(qkv):
        qkv = qkv.reshape(shape)
        out = jax_fa3.qkv_dot_product_attention(qkv, num_kv_heads, is_causal=True)
        return (out * normal(B, T, N, H)).astype(jnp.float32).sum()

    def split(qkv):
        parts = jnp.split(qkv, (num_heads, num_heads + kv_heads), axis=2)
        out = jax_fa3.dot_product_attention(*parts, is_causal=True, implementation="xla")
        return (out * normal(B, T, N, H)).astype(jnp.float32).sum()

    assert_alike(jax.value_and_grad(packed)(qkv), jax.value_and_grad(split)(qkv))


def test_integer_arguments_have_no_gradient():
    def function(query, lengths):
        return loss(query_seq_lengths=lengths)(query, *QKV[1:])

    grads = jax.grad(function, (0, 1), allow_int=True)(QKV[0], jnp.array([3, 5]))
    assert grads[1].dtype == jax.dtypes.float0
    assert not grads[0][0, 3:].any() and grads[0][0, :3].any()


@pytest.mark.parametrize("function", [loss(), loss("fa3")])
def test_second_order_is_refused(function):
    message = "use implementation='xla'"
    with pytest.raises(NotImplementedError, match=message):
        lower(jax.grad(lambda q: jax.grad(function)(q, *QKV[1:]).sum()), QKV[0])
    with pytest.raises(NotImplementedError, match=message):
        lower(jax.hessian(function), *QKV)


def test_xla_has_every_order():
    """Forward mode and second derivatives, of query, key, value, scale and bias."""

    def function(query, key, value, scale, bias):
        attention = functools.partial(jax_fa3.dot_product_attention, implementation="xla")
        return jnp.sin(attention(query, key, value, bias, scale=scale, is_causal=True)).sum()

    with jax.enable_x64(True):
        qkv = [x[:1, :3, :2, :8].astype(jnp.float64) for x in QKV]
        check_grads(function, (*qkv, jnp.float64(0.3), jnp.ones((1, 1, 3, 3))), order=2)


def test_residual_names_save_the_second_forward():
    policy = jax.checkpoint_policies.save_only_these_names(*jax_fa3.RESIDUAL_NAMES)
    operands = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in QKV]

    def forwards(**options) -> int:
        def function(*qkv):
            return jnp.sin(jax_fa3.dot_product_attention(*qkv).astype(jnp.float32)).sum()

        differentiated = jax.value_and_grad(jax.checkpoint(function, **options))
        return targets(lower(differentiated, *operands)).count(FWD)

    assert forwards() == 2
    assert forwards(policy=policy) == 1


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("context", ["context"]),  # as MaxText's policies have it
        ("flash_residuals", ["flash_residuals", "query"]),
        (("context", "flash_residuals"), ["context", "flash_residuals"]),
        ("context", jax_fa3.RESIDUAL_NAMES),  # which stay
        ("context", ["context", *jax_fa3.RESIDUAL_NAMES]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_checkpoint_name_saves_the_second_forward(given, names, packed):
    def function(qkv, **options):
        parts: Any = (qkv, 2) if packed else jnp.split(qkv, (N, N + K), axis=2)
        attend = jax_fa3.qkv_dot_product_attention if packed else jax_fa3.dot_product_attention
        return jnp.sin(attend(*parts, **options).astype(jnp.float32)).sum()

    def forwards(**options) -> int:
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        remat = jax.checkpoint(functools.partial(function, **options), policy=policy)
        text = lower(jax.value_and_grad(remat), qkv)
        assert targets(text).count(BWD_PACKED if packed else BWD) == 1
        return targets(text).count(FWD)

    qkv = jax.ShapeDtypeStruct((B, T, N + 2 * K, H), jnp.bfloat16)
    assert forwards(checkpoint_name=given) == 1
    assert forwards() == (1 if names[-1] in jax_fa3.RESIDUAL_NAMES else 2)
    if given == "context":
        assert forwards(checkpoint_name=("another", "name")) == forwards()


def test_checkpoint_name_on_xla():
    """Out and log-sum-exp, which policies may save there as well."""
    function = loss("xla", checkpoint_name=("context", "rest"))
    text = str(jax.make_jaxpr(function)(*QKV))
    assert text.count("name[name=context]") == text.count("name[name=rest]") == 1
    assert_alike(jax.grad(function)(*QKV), jax.grad(loss("xla"))(*QKV))


def test_backward_does_not_run_the_forward_again():
    operands = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in QKV]
    text = lower(jax.grad(loss("fa3", is_causal=True), (0, 1, 2)), *operands)
    assert targets(text) == [FWD, BWD]
