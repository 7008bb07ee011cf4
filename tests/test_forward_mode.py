"""Forward mode of the kernels' custom_jvp, on a machine without a GPU, where plain JAX runs in it: the
same as that of implementation="xla", under every transformation, and together with reverse mode. Which
kernels run: test_forward_mode_kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_alike
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import lower
from meshes import make_mesh

import jax_fa3

B, T, S, N, K, H, V = 2, 10, 14, 4, 2, 16, 8
MASKS: list[dict[str, Any]] = [
    {},
    {"is_causal": True, "query_offset": jnp.array([4, -3]), "logits_soft_cap": 2.0},
    {"query_seq_lengths": [3, 10], "key_value_seq_lengths": [14, 0], "local_window_size": (3, 4)},
    {"sinks": jnp.arange(N) / 2, "is_causal": True, "scale": 0.7},
    {"mask": jnp.tri(T, S, 2, dtype=bool)[None, None]},
]

pytestmark = pytest.mark.usefixtures("on_cpu")


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def tensors(seed: int = 0, dtype: Any = jnp.float16) -> tuple[jax.Array, ...]:
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V)
    return tuple(normal(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes))


QKV, ALONG = tensors(), tensors(7)


def attention(implementation: Any = None, **options: Any) -> Any:
    function = functools.partial(jax_fa3.dot_product_attention, return_residual=True)
    return functools.partial(function, implementation=implementation, **options)


def finite(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 7), tree)


@pytest.mark.parametrize("options", MASKS)
def test_jvp(options):
    found = jax.jvp(attention(**options), QKV, ALONG)
    assert_alike(finite(found), finite(jax.jvp(attention("xla", **options), QKV, ALONG)))


def test_jvp_of_sinks():
    sinks = jnp.arange(N) / 2

    def function(implementation, query, sinks):
        return attention(implementation, sinks=sinks)(query, *QKV[1:])

    along = ALONG[0], jnp.ones(N)
    found = jax.jvp(functools.partial(function, None), (QKV[0], sinks), along)
    assert_alike(found, jax.jvp(functools.partial(function, "xla"), (QKV[0], sinks), along))


def test_finite_differences():
    """In fp64, which implementation=None runs in plain JAX; the other tests compare with that."""
    with jax.enable_x64(True):
        qkv, along = tensors(dtype=jnp.float64), tensors(7, jnp.float64)
        function = functools.partial(attention(is_causal=True, logits_soft_cap=3.0))
        step = 1e-5
        ahead, behind = (
            function(*(x + sign * step * t for x, t in zip(qkv, along, strict=True)))
            for sign in (1, -1)
        )
        _, found = jax.jvp(function, qkv, along)
        for x, y, z in zip(found, ahead, behind, strict=True):
            np.testing.assert_allclose(x, (y - z) / (2 * step), atol=1e-8)


@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 2)])
def test_some_operands_move(moving):
    def function(implementation, *some):
        chosen = dict(zip(moving, some, strict=True))
        return attention(implementation)(*(chosen.get(i, x) for i, x in enumerate(QKV)))

    some, along = ([x[i] for i in moving] for x in (QKV, ALONG))
    found, exact = (jax.jvp(functools.partial(function, x), some, along) for x in (None, "xla"))
    assert_alike(found, exact)


@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_packed(num_kv_heads):
    heads = (3, N) if num_kv_heads is None else (N + 2 * K,)
    qkv, along = normal(B, T, *heads, H), normal(B, T, *heads, H, seed=1)

    def function(implementation, qkv):
        return jax_fa3.qkv_dot_product_attention(
            qkv, num_kv_heads, is_causal=True, return_residual=True, implementation=implementation
        )

    found, exact = (
        jax.jvp(functools.partial(function, x), (qkv,), (along,)) for x in (None, "xla")
    )
    assert_alike(found, exact)


def pushed(f: Any) -> Any:
    return lambda q, k, v, *along: jax.jvp(f, (q, k, v), along)


Q, K_, V_ = QKV
QQ, KK = jnp.stack([Q, -2 * Q]), jnp.stack([K_, 0.5 * K_])
TT = [jnp.stack([x, 0.5 * x]) for x in ALONG]


@pytest.mark.parametrize(
    ("transform", "operands"),
    [
        (lambda f: jax.jit(pushed(f)), (*QKV, *ALONG)),
        (lambda f: pushed(jax.jit(f)), (*QKV, *ALONG)),
        (lambda f: pushed(jax.checkpoint(f)), (*QKV, *ALONG)),
        (lambda f: jax.vmap(pushed(f), (0, None, None, 0, None, None)), (QQ, K_, V_, TT[0], *ALONG[1:])),
        (lambda f: pushed(jax.vmap(f, (0, None, None))), (QQ, K_, V_, TT[0], *ALONG[1:])),
        (lambda f: jax.vmap(pushed(f), (None, None, None, 0, 0, 0)), (*QKV, *TT)),
        (lambda f: jax.vmap(jax.vmap(pushed(f), (None, 0, None, None, 0, None)),
                            (0, None, None, 0, None, None)), (QQ, KK, V_, TT[0], TT[1], ALONG[2])),
        (lambda f: lambda *x: jax.linearize(f, *x[:3])[1](*x[3:]), (*QKV, *ALONG)),
        (lambda f: jax.jacfwd(lambda s, *x: f(s * x[0], *x[1:])), (jnp.float16(1), *QKV)),
        (lambda f: lambda *x: jax.lax.scan(lambda c, y: (c, pushed(f)(y[0], *x[1:3], y[1], *x[4:])),
                                           jnp.zeros(()), (x[0], x[3])), (QQ, K_, V_, TT[0], *ALONG[1:])),
    ],
    ids=["jit", "of jit", "of remat", "vmap", "of vmap", "vmap of tangents", "vmap of vmap",
         "linearize", "jacfwd", "scan"],
)  # fmt: skip
def test_transformations(transform, operands):
    found, exact = (transform(attention(x, is_causal=True))(*operands) for x in (None, "xla"))
    assert_alike(found, exact)


def mean_flow(implementation: Any, wrap: Any = lambda f: f) -> Any:
    """A loss as MeanFlow has it: both modes in one step, two layers deep."""

    def layer(x, weights):
        parts = (jnp.einsum("bth,hnd->btnd", x, w).astype(jnp.float16) for w in weights)
        out = jax_fa3.dot_product_attention(*parts, is_causal=True, implementation=implementation)
        return x + out.reshape(x.shape).astype(x.dtype)

    def model(weights, x):
        return jax.lax.scan(lambda x, w: (wrap(layer)(x, w), None), x, weights)[0]

    def loss(weights, x, along):
        out, tangent = jax.jvp(functools.partial(model, weights), (x,), (along,))
        return jnp.square(out - jax.lax.stop_gradient(along - 0.3 * tangent)).mean()

    shape = 2, N * H, N, H
    weights = tuple(normal(*shape, seed=i, dtype=jnp.float32) / 8 for i in range(3))
    x, along = (normal(B, T, N * H, seed=i, dtype=jnp.float32) for i in (4, 5))
    return loss, (weights, x, along)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit])
def test_both_modes_in_one_step(wrap):
    found, exact = (
        jax.jit(jax.value_and_grad(loss))(*arguments)
        for loss, arguments in (mean_flow(None, wrap), mean_flow("xla", wrap))
    )
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(x, y, rtol=0.02, atol=1e-3 * float(jnp.abs(y).max()))


def test_gradient_of_the_tangent():
    """Goes through XLA."""

    def function(implementation, *qkv):
        out, lse = jax.jvp(attention(implementation, is_causal=True), qkv, ALONG)[1]
        return jnp.sin(out.astype(jnp.float32)).sum() + jnp.sin(lse).sum()

    for transform in (lambda f: f, jax.checkpoint):
        found, exact = (
            jax.grad(transform(functools.partial(function, x)), (0, 1, 2))(*QKV)
            for x in (None, "xla")
        )
        assert_alike(found, exact)


def test_gradient_by_the_tangents():
    """What is linear, transposed: the same as reverse mode."""

    def function(implementation, *along):
        out, lse = jax.jvp(attention(implementation), QKV, along)[1]
        return out.astype(jnp.float32).sum() + lse.sum()

    found, exact = (jax.grad(functools.partial(function, x), (0, 2))(*ALONG) for x in (None, "xla"))
    assert_alike(found, exact)


def test_refused():
    """Derivatives of the backward."""
    loss = lambda *x: attention()(*x)[0].astype(jnp.float32).sum()
    for derivative in (jax.hessian(loss), lambda *x: jax.jvp(jax.grad(loss), x, x)):
        with pytest.raises(NotImplementedError, match="use implementation='xla'"):
            lower(derivative, *QKV)


SPEC = P("dp", None, "tp", None)


@pytest.mark.parametrize("way", ["explicit", "automatic", "argument", "shard_map"])
def test_meshes(way):
    """Each device has its own batch entries and heads, in both modes."""
    mesh = make_mesh(AxisType.Explicit if way == "explicit" else AxisType.Auto, dp=2, tp=2)
    exact = pushed(attention("xla", is_causal=True))(*QKV, *ALONG)
    placed = [jax.device_put(x, NamedSharding(mesh, SPEC)) for x in (*QKV, *ALONG)]
    options: Any = {"sharding": NamedSharding(mesh, SPEC)} if way == "argument" else {}
    function = attention(is_causal=True, **options)
    if way == "shard_map":
        out_specs = SPEC, P("dp", None, "tp")
        function = jax.shard_map(function, mesh=mesh, in_specs=(SPEC,) * 3, out_specs=out_specs)

    def step(*operands):
        def loss(*operands):
            results = pushed(function)(*operands)
            return results[0][0].astype(jnp.float32).sum(), results

        grads, results = jax.grad(loss, (0, 1), has_aux=True)(*operands)
        return results, grads

    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(*placed).compile()
        results, grads = compiled(*placed)
    assert_alike(results, exact)
    assert results[1][0].sharding.spec[0] == "dp"
    sums = lambda *x: attention("xla", is_causal=True)(*x)[0].astype(jnp.float32).sum()
    assert_alike(grads, jax.grad(sums, (0, 1))(*QKV))
