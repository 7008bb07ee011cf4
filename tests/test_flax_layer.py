"""The layers of jax_fa3.flax, linen's and nnx's: against Flax's own, and what those cannot do."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import hide_gpus, lower, targets
from masks import documents

pytest.importorskip("flax")
from flax import linen as nn
from flax import nnx
from flax_layers import (
    CAUSAL,
    FEATURES,
    IDS,
    SIZES,
    B,
    K,
    N,
    T,
    X,
    both,
    close,
    make,
    value_and_grads,
)

import jax_fa3
import jax_fa3.flax
from jax_fa3.flax import PROJECTION_NAMES
from jax_fa3.flax._layer import rotate


@pytest.mark.parametrize("norm", [False, True])
def test_linen_takes_flax_checkpoints(norm):
    """Parameters and cache have the same tree; outputs and gradients are the same, there and back."""
    theirs: Any = nn.MultiHeadDotProductAttention(**SIZES, normalize_qk=norm, decode=True)
    ours: Any = jax_fa3.flax.linen.MultiHeadAttention(
        **SIZES, normalize_qk=norm, decode=True, is_causal=True
    )
    variables, again = (jax.jit(x.init)(jax.random.key(1), X) for x in (theirs, ours))
    assert jax.tree.structure(variables) == jax.tree.structure(again)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, again)
    close(variables, again)  # even the random numbers
    params = {"params": variables["params"]}
    exact = value_and_grads(
        functools.partial(theirs.clone(decode=False).apply, mask=CAUSAL), params, X
    )
    close(value_and_grads(ours.clone(decode=False).apply, params, X), exact)


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": K, "normalize_qk": True}])
def test_nnx_takes_flax_checkpoints(options):
    sizes: Any = options | {"in_features": FEATURES} | SIZES
    theirs = nnx.MultiHeadAttention(**sizes, decode=False, rngs=nnx.Rngs(1))
    ours = make("nnx", **options)
    state, again = nnx.state(theirs), nnx.state(ours)
    assert jax.tree.structure(state) == jax.tree.structure(again)
    close(state, again)
    graphs = nnx.split(theirs)[0], nnx.split(ours)[0]
    exact = value_and_grads(lambda s, x: nnx.merge(graphs[0], s)(x, mask=CAUSAL), state, X)
    close(value_and_grads(lambda s, x: nnx.merge(graphs[1], s)(x), state, X), exact)


def test_linen_and_nnx_agree():
    """On everything at once, with the parameters of the one in the other."""
    options = {
        "num_kv_heads": K,
        "rotary_base": 100.0,
        "local_window_size": 4,
        "logits_soft_cap": 2.0,
        "scale": 0.7,
        "out_features": 10,
    }
    linen, nnx_layer = make("linen", **options), make("nnx", **options)
    nnx.update(nnx_layer, linen.variables["params"])
    segments = {"query_segment_ids": IDS, "key_value_segment_ids": IDS}
    out = linen(X, **segments)
    assert out.shape == (B, T, 10)
    close(nnx_layer(X, **segments), out)


@both
def test_is_what_it_is_made_of(api):
    """Projections, rotation and jax_fa3.dot_product_attention, spelled out."""
    attention = {"local_window_size": 4, "logits_soft_cap": 2.0, "scale": 0.7}
    layer = make(api, num_kv_heads=K, rotary_base=100.0, **attention)
    params = layer.variables["params"] if api == "linen" else nnx.to_pure_dict(nnx.state(layer))

    def project(name):
        return jnp.einsum("btf,fnh->btnh", X, params[name]["kernel"]) + params[name]["bias"]

    query, key, value = map(project, ("query", "key", "value"))
    positions = jnp.arange(T)
    query, key = (rotate(x, positions, 100.0) for x in (query, key))
    segments = {"query_segment_ids": IDS, "key_value_segment_ids": IDS}
    options: Any = attention | segments | {"is_causal": True}
    out = jax_fa3.dot_product_attention(query, key, value, **options)
    exact = jnp.einsum("btnh,nhf->btf", out, params["out"]["kernel"]) + params["out"]["bias"]
    close(layer(X, **segments), exact)
    close(layer(X, **segments, positions=jnp.broadcast_to(positions + 3, (B, T))), exact)
    close(layer(X[0], **{k: x[0] for k, x in segments.items()}), exact[0])  # no batch axis


@both
def test_padding_segment_id(api):
    """Outputs and the gradients of every parameter, with padding of id 0 at both ends."""
    ids = np.stack([documents(2, 7, 3, ids=(0, 1, 0)), documents(5, 2, 4, 1, ids=(4, 0, 3, 0))])

    def results(ids, **options):
        segments = {"query_segment_ids": ids, "key_value_segment_ids": ids}
        layer = make(api, num_kv_heads=K, **options)
        if api == "linen":
            return value_and_grads(
                lambda v, x: layer.layer.apply(v, x, **segments), layer.variables, X
            )
        graph, state = nnx.split(layer)
        return value_and_grads(lambda s, x: nnx.merge(graph, s)(x, **segments), state, X)

    found = results(ids, padding_segment_id=0)
    close(found, results(np.where(ids == 0, -1, ids)))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    layer = make(api, padding_segment_id=0, decode=True)  # calls without ids do not need it
    close(layer(X[:, :5]), make(api)(X)[:, :5])


@both
def test_cross_attention(api):
    layer, keys = make(api, is_causal=False), jax.random.normal(jax.random.key(2), (B, 5, FEATURES))
    close(layer(X, keys), layer(X, keys, keys))
    lengths = jnp.array([5, 2])
    out = layer(X, keys, key_value_seq_lengths=lengths)
    close(out[1], layer(X[1], keys[1, :2]))


def test_rotate():
    """By angle position * base ** (-i / half) in the plane of coordinates i and i + half."""
    x = jax.random.normal(jax.random.key(0), (3, 5, 2, 6))
    positions = np.array([0, 1, 7, 100, 3])
    pairs = np.asarray(x[..., :3]) + 1j * np.asarray(x[..., 3:])
    turned = pairs * np.exp(1j * positions[:, None, None] * 50.0 ** (-np.arange(3) / 3))
    found = rotate(x, positions, 50.0)
    np.testing.assert_allclose(found[..., :3], turned.real, atol=1e-4)
    np.testing.assert_allclose(found[..., 3:], turned.imag, atol=1e-4)
    rope = getattr(nnx, "RoPE", None)  # from flax 0.12.10 or so on
    if rope is not None:
        theirs = rope(theta=50.0)(x.swapaxes(1, 2), jnp.asarray(positions, jnp.float32))
        np.testing.assert_allclose(found, theirs.swapaxes(1, 2), atol=1e-4)
    assert rotate(x.astype(jnp.bfloat16), positions, 50.0).dtype == jnp.bfloat16


@both
def test_remat_names(api):
    """With both sets of names saved, neither projections nor attention are computed again."""
    layer = make(api, rotary_base=100.0)
    policy = jax.checkpoint_policies.save_only_these_names(
        *PROJECTION_NAMES, *jax_fa3.RESIDUAL_NAMES
    )
    names = [
        eqn.params["name"] for eqn in jax.make_jaxpr(layer)(X).eqns if eqn.primitive.name == "name"
    ]
    assert set(PROJECTION_NAMES) <= set(names)
    exact = value_and_grads(layer, X)
    close(value_and_grads(jax.checkpoint(layer, policy=policy), X), exact)


def test_kernel_axes():
    axes = {"kernel_axes": ("embed", "heads")}
    wanted = {
        "kernel": jax.P("embed", "heads", None),
        "bias": jax.P("heads", None),
        "out kernel": jax.P("heads", None, "embed"),
        "out bias": jax.P("embed"),
    }
    linen = nn.get_partition_spec(make("linen", **axes).variables)["params"]
    with nnx.use_eager_sharding(False):
        layer = make("nnx", **axes)
    specs = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(layer)))
    for params in (linen, specs):
        for name in ("query", "key", "value"):
            assert params[name] == {"kernel": wanted["kernel"], "bias": wanted["bias"]}
        assert params["out"] == {"kernel": wanted["out kernel"], "bias": wanted["out bias"]}
    close(layer(X), make("nnx")(X))


def test_sharded():
    """On a mesh the layer is made sharded, and gives the same."""
    mesh = jax.make_mesh((2, 2), ("embed", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    exact = make("nnx")(X)
    with jax.set_mesh(mesh):
        layer = make("nnx", kernel_axes=("embed", "heads"))
        assert layer.query.kernel[...].sharding.spec == jax.P("embed", "heads", None)
        close(nnx.jit(lambda layer, x: layer(x))(layer, X), exact)


@both
def test_lowers_to_the_kernel(api, monkeypatch):
    hide_gpus(monkeypatch)
    layer = make(api, qkv_features=N * 64, dtype=jnp.bfloat16, num_kv_heads=K)
    if api == "linen":  # whose init has run the layer
        layer.layer = layer.layer.clone(implementation="fa3")
    else:
        layer.implementation = "fa3"
    assert targets(lower(lambda x: layer(x), X)) == ["jax_fa3.fwd.v1"]
    with pytest.raises(NotImplementedError, match="dtype float32, wanted bfloat16 or float16"):
        make("nnx", implementation="fa3")(X)


@both
def test_other_attention(api):
    """jax.nn's function is called with what it knows, and no more."""
    options = {"is_causal": True, "local_window_size": (3, 0)}
    layer = make(api, **options, attention_fn=jax.nn.dot_product_attention)
    close(layer(X), make(api, **options)(X))
