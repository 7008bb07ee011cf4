"""Terms of the scores that heads have: their gradients through every transformation, here in plain JAX, and
what the kernels refuse beside them. On a GPU: test_gpu_score_terms."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CAUSAL, Case
from distances import table_of
from helpers import assert_close, reference
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from score_terms import attention, grads

import jax_fa3
from jax_fa3 import context_parallel, fp8

B, T, S, N, K, H = 2, 10, 12, 4, 2, 8
CASE = Case("term", T, S, N, K, H, B=B, mask=CAUSAL)
TERMS = {
    "alibi_slopes": jnp.asarray((0.5, 0.25, -0.1, 0.02)),
    "relative_bias": table_of(CASE, 3),
}


def inputs(name: str) -> tuple[Array, ...]:
    return *CASE.inputs(jnp.float32), TERMS[name]


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit, "argument"], ids=str)
def test_over_devices(name: str, kind: Any):
    """Beside sinks; over devices that share the term, too."""
    arrays, cotangents = inputs(name), CASE.cotangents(jnp.float32)
    exact = grads(name, reference, cotangents, *arrays)
    call = jax.jit(functools.partial(grads, name, attention))
    if kind is None:
        return assert_close(call(cotangents, *arrays), exact, 1e-4)
    kinds = (AxisType.Auto if kind == "argument" else kind,) * 2
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"), axis_types=kinds)
    where = NamedSharding(mesh, P("x", None, "y"))
    if kind == "argument":
        call = jax.jit(functools.partial(grads, name, attention, sharding=where))
        return assert_close(call(cotangents, *arrays), exact, 1e-4)
    with jax.set_mesh(mesh):
        put = [jax.device_put(x, where) for x in (*arrays[:3], *cotangents)]
        assert_close(call(tuple(put[3:]), *put[:3], arrays[3]), exact, 1e-4)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("last", [False, True])
def test_beside_all_that_masks_a_bias_and_a_soft_cap(name: str, last: bool):
    """In plain JAX they go with everything; the cap is of the sum, or of the products alone."""
    *tensors, term = inputs(name)
    rng = np.random.default_rng(0)
    others: Any = {"mask": rng.random((B, 1, T, S)) < 0.7, "bias": rng.normal(size=(1, N, T, S))}
    others = {
        name: jnp.asarray(x, x.dtype if x.dtype == bool else "f4") for name, x in others.items()
    }
    others |= {"logits_soft_cap": 2.0, "soft_cap_last": last, **CAUSAL}
    found = attention(*tensors, **{name: term}, **others)
    assert_close(found, reference(*tensors, **{name: term}, **others), 1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_a_soft_cap_and_a_bias_that_is_nan_where_nobody_looks(last: bool):
    """It reaches no gradient."""
    tensors, cotangents = CASE.inputs(jnp.float32), CASE.cotangents(jnp.float32)
    bias = jnp.ones((B, N, T, S)).at[..., 5:].set(jnp.nan)
    options: Any = {"logits_soft_cap": 2.0, "soft_cap_last": last, "mask": jnp.arange(S) < 5}
    options["sinks"] = jnp.ones(N)
    call = functools.partial(grads, "bias", attention, cotangents, *tensors, **options)
    assert_close(call(bias), call(jnp.nan_to_num(bias)), 1e-6)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("mapped", [3, 0])
def test_under_vmap(name: str, mapped: int):
    arrays, cotangents = list(inputs(name)), CASE.cotangents(jnp.float32)
    axes: list[int | None] = [None] * 4
    axes[mapped] = 0
    stacked = arrays.copy()
    stacked[mapped] = jnp.stack((arrays[mapped], -arrays[mapped]))
    found = jax.jit(jax.vmap(functools.partial(grads, name, attention, cotangents), axes))(*stacked)
    for i in range(2):
        one = arrays.copy()
        one[mapped] = stacked[mapped][i]
        exact = grads(name, reference, cotangents, *one)
        assert_close(jax.tree.map(lambda x, i=i: x[i], found), exact, 1e-4)


@pytest.mark.parametrize("name", TERMS)
def test_tangents(name: str):
    arrays = inputs(name)
    moved = tuple(jnp.ones_like(x) for x in arrays)

    def of(function: Any) -> Any:
        return lambda *x: function(*x[:3], **{name: x[3]})

    found = jax.jvp(of(attention), arrays, moved)
    assert_close(found, jax.jvp(of(reference), arrays, moved), 1e-4)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize(
    "change, found",
    [
        ({"logits_soft_cap": 3.0}, "got some beside logits_soft_cap"),
        ({"head_dim": 136}, "got some beside head dim 136"),
        ({"keys": 2**18 + 8}, "got some beside 262152 keys"),
        ({"bias": jnp.ones((1, 1, T, 1))}, "got some beside a bias"),
        ({"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}, "got some beside dropout"),
        ({"key_begin": (B, T, 2), "key_end": (B, T, 2)}, "key_begin: got several intervals a row"),
    ],
)
def test_refusals_name_the_argument(name: str, change: dict[str, Any], found: str):
    head_dim, keys = change.get("head_dim", 64), change.get("keys", S)
    options = {k: v for k, v in change.items() if k not in ("head_dim", "keys")}
    for side in ("key_begin", "key_end"):
        if side in options:
            options[side] = jax.ShapeDtypeStruct(options[side], jnp.int32)
    q, k = (jax.ShapeDtypeStruct((B, n, N, head_dim), jnp.bfloat16) for n in (T, keys))
    options[name] = jax.ShapeDtypeStruct(TERMS[name].shape, jnp.float32)
    reason = jax_fa3.is_supported(q, k, k, device="sm_90", **options) or ""
    assert f"{'' if 'key_begin' in change else f'{name}: '}{found}" in reason
    assert "implementation='xla'" in reason


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("who", [context_parallel, fp8])
def test_of_others_is_refused_by_name(name: str, who: Any):
    q = jnp.zeros((1, 16, 2, 8), jnp.bfloat16)
    more: Any = {"axis_name": "x"} if who is context_parallel else {}
    with pytest.raises(NotImplementedError, match=f"{name}: got some, wanted none"):
        who.dot_product_attention(q, q, q, **{name: TERMS[name][:2]}, **more)
