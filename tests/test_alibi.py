"""alibi_slopes: their term and its gradient through every transformation, here in plain JAX; what the
kernels are given. On a GPU: test_gpu_alibi."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CAUSAL, Case
from helpers import assert_close
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import lower, targets
from test_ffi import needs_kernels

import jax_fa3
from jax_fa3 import _reference, _targets, context_parallel, fp8

B, T, S, N, K, H = 2, 10, 12, 4, 2, 8
CASE = Case("alibi", T, S, N, K, H, B=B, mask=CAUSAL)
SLOPES = (0.5, 0.25, -0.1, 0.02)
attention = functools.partial(jax_fa3.dot_product_attention, return_residual=True)


def loss(function: Any, cotangents: Any, *arrays: Array, **options: Any) -> Array:
    q, k, v, slopes = arrays
    found = function(q, k, v, **CAUSAL, alibi_slopes=slopes, sinks=jnp.ones(N), **options)
    pairs = zip(found, cotangents, strict=True)
    return jnp.asarray(sum((jnp.nan_to_num(x, neginf=0) * y).sum() for x, y in pairs))


def grads(function: Any, cotangents: Any, *arrays: Array, **options: Any) -> Any:
    call = functools.partial(loss, function, cotangents, **options)
    return jax.grad(call, (0, 1, 2, 3))(*arrays)


def inputs() -> tuple[Array, ...]:
    return *CASE.inputs(jnp.float32), jnp.asarray(SLOPES)


def test_results():
    q, k, v, slopes = inputs()
    causal: dict[str, Any] = CAUSAL
    wanted = _reference.attention(q, k, v, alibi_slopes=slopes, **causal)
    assert_close(attention(q, k, v, alibi_slopes=slopes, **causal), wanted, 1e-5)
    # A row's own position changes the log-sum-exp alone.
    bias = slopes[:, None, None] * jnp.arange(S)
    same, _ = attention(q, k, v, bias[None], **causal)
    assert_close(same, wanted[0], 1e-5)


@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit, "argument"], ids=str)
def test_gradients(kind: Any):
    """Beside sinks; over devices that share the slopes, too."""
    arrays, cotangents = inputs(), CASE.cotangents(jnp.float32)
    exact = grads(_reference.attention, cotangents, *arrays)
    call = jax.jit(functools.partial(grads, attention))
    if kind is None:
        return assert_close(call(cotangents, *arrays), exact, 1e-4)
    kinds = (AxisType.Auto if kind == "argument" else kind,) * 2
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"), axis_types=kinds)
    where = NamedSharding(mesh, P("x", None, "y"))
    if kind == "argument":
        call = jax.jit(functools.partial(grads, attention, sharding=where))
        return assert_close(call(cotangents, *arrays), exact, 1e-4)
    with jax.set_mesh(mesh):
        put = [jax.device_put(x, where) for x in (*arrays[:3], *cotangents)]
        assert_close(call(tuple(put[3:]), *put[:3], arrays[3]), exact, 1e-4)


@pytest.mark.parametrize("last", [False, True])
def test_beside_all_that_masks_a_bias_and_a_soft_cap(last: bool):
    """In plain JAX they go with everything; the cap is of the sum, or of the products alone."""
    *tensors, slopes = inputs()
    rng = np.random.default_rng(0)
    others: Any = {"mask": rng.random((B, 1, T, S)) < 0.7, "bias": rng.normal(size=(1, N, T, S))}
    others = {
        name: jnp.asarray(x, x.dtype if x.dtype == bool else "f4") for name, x in others.items()
    }
    others |= {"logits_soft_cap": 2.0, "soft_cap_last": last, **CAUSAL}
    found = attention(*tensors, alibi_slopes=slopes, **others)
    assert_close(found, _reference.attention(*tensors, alibi_slopes=slopes, **others), 1e-5)


@pytest.mark.parametrize("mapped", [3, 0])
def test_under_vmap(mapped: int):
    arrays, cotangents = list(inputs()), CASE.cotangents(jnp.float32)
    axes: list[int | None] = [None] * 4
    axes[mapped] = 0
    stacked = arrays.copy()
    stacked[mapped] = jnp.stack((arrays[mapped], -arrays[mapped]))
    found = jax.jit(jax.vmap(functools.partial(grads, attention, cotangents), axes))(*stacked)
    for i in range(2):
        one = arrays.copy()
        one[mapped] = stacked[mapped][i]
        exact = grads(_reference.attention, cotangents, *one)
        assert_close(jax.tree.map(lambda x, i=i: x[i], found), exact, 1e-4)


def test_tangents():
    arrays = inputs()
    moved = tuple(jnp.ones_like(x) for x in arrays)

    def of(function: Any) -> Any:
        return lambda *x: function(*x[:3], alibi_slopes=x[3])

    found = jax.jvp(of(attention), arrays, moved)
    assert_close(found, jax.jvp(of(_reference.attention), arrays, moved), 1e-4)


@pytest.mark.parametrize(
    "change, found",
    [
        ({"logits_soft_cap": 3.0}, "alibi_slopes: got some beside logits_soft_cap"),
        ({"head_dim": 136}, "alibi_slopes: got some beside head dim 136"),
        ({"keys": 2**18 + 8}, "alibi_slopes: got some beside 262152 keys"),
        ({"bias": jnp.ones((1, 1, T, 1))}, "alibi_slopes: got some beside a bias"),
        ({"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}, "got some beside dropout"),
        ({"key_begin": (B, T, 2), "key_end": (B, T, 2)}, "key_begin: got several intervals a row"),
    ],
)
def test_refusals_name_the_argument(change: dict[str, Any], found: str):
    head_dim, keys = change.get("head_dim", 64), change.get("keys", S)
    options = {k: v for k, v in change.items() if k not in ("head_dim", "keys")}
    for name in ("key_begin", "key_end"):
        if name in options:
            options[name] = jax.ShapeDtypeStruct(options[name], jnp.int32)
    q, k = (jax.ShapeDtypeStruct((B, n, N, head_dim), jnp.bfloat16) for n in (T, keys))
    slopes = jax.ShapeDtypeStruct((N,), jnp.float32)
    reason = jax_fa3.is_supported(q, k, k, alibi_slopes=slopes, device="sm_90", **options)
    assert found in (reason or "") and "implementation='xla'" in (reason or "")


@pytest.mark.parametrize("who", [context_parallel, fp8])
def test_of_others_is_refused_by_name(who: Any):
    q = jnp.zeros((1, 16, 2, 8), jnp.bfloat16)
    more: Any = {"axis_name": "x"} if who is context_parallel else {}
    with pytest.raises(NotImplementedError, match="alibi_slopes: got some, wanted none"):
        who.dot_product_attention(q, q, q, alibi_slopes=jnp.ones(2), **more)


def test_wrong_ones():
    q = jnp.zeros((1, 16, 2, 8))
    with pytest.raises(ValueError, match=r"alibi_slopes: got shape \(3,\), wanted \(2,\)"):
        jax_fa3.dot_product_attention(q, q, q, alibi_slopes=jnp.ones(3))
    with pytest.raises(ValueError, match="alibi_slopes: got dtype int32"):
        jax_fa3.dot_product_attention(q, q, q, alibi_slopes=jnp.ones(2, jnp.int32))


@needs_kernels
@pytest.mark.parametrize("learned", [False, True])
def test_kernels_take_them(learned: bool):
    """From positions: nothing has T x S elements. A gradient that nobody wants is not computed."""
    q, k = (jax.ShapeDtypeStruct((B, n, N, 64), jnp.bfloat16) for n in (300, 301))
    slopes = jax.ShapeDtypeStruct((N,), jnp.float32)

    def one(q: Array, k: Array, v: Array, slopes: Array) -> Array:
        out = jax_fa3.dot_product_attention(q, k, v, alibi_slopes=slopes, implementation="fa3")
        return out.astype(jnp.float32).sum()

    text = lower(jax.grad(one, (0, 1, 2, 3) if learned else (0, 1, 2)), q, k, k, slopes)
    assert targets(text) == [_targets.FWD, _targets.BWD]
    assert "300x301" not in text
    assert (f"tensor<{B}x{N}x{3 * 256}xf32>" in text) == learned
    assert jax_fa3.is_supported(q, k, k, alibi_slopes=slopes, device="sm_90") is None


@needs_kernels
def test_a_dense_mask_beside_them_becomes_intervals():
    q = jax.ShapeDtypeStruct((B, T, N, 64), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((B, 1, T, T), jnp.bool_)

    def call(q: Array, mask: Array) -> Array:
        options: Any = {"alibi_slopes": jnp.asarray(SLOPES), "implementation": "fa3"}
        return jax_fa3.dot_product_attention(q, q, q, mask=mask, **options)

    assert targets(lower(call, q, mask)) == [_targets.FWD]
