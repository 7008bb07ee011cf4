"""Every public function, small, with each kind of argument: what a mode of JAX must not break."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from masks import documents, ints, packed

import jax_fa3
import jax_fa3.flax
from jax_fa3 import context_parallel, fp8

B, T, N, K, H, FEATURES = 2, 16, 4, 2, 64, 24
IDS = packed(documents(9, 7))
TWO: dict[str, Any] = {name: np.repeat(ids, B, axis=0) for name, ids in IDS.items()}
CAUSAL: Any = {"is_causal": True}
PADDING: Any = {"padding_segment_id": 1}
SINKS: Any = {"sinks": np.linspace(-1, 2, N, dtype=np.float32)}
BROKEN: Any = packed(documents(5, 4, 4, 3, ids=(0, 1, 0, 2)))  # in two runs of id 0
LENGTHS: dict[str, Any] = {"query_seq_lengths": ints(12, 16), "key_value_seq_lengths": ints(0, 9)}
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": CAUSAL,
    "window": {"local_window_size": (3, 2), "query_offset": -1},
    "array offset": {"is_causal": True, "query_offset": ints(2, -3)},
    "lengths": LENGTHS,
    "segments": TWO,
    "padding": {**TWO, **PADDING},
    "intervals": {"key_begin": ints(*[range(T)] * B) - 2, "key_end": ints(*[range(T)] * B) + 1},
    "all": {**TWO, **LENGTHS, "is_causal": True, "key_begin": ints(*[range(T)] * B) - 5},
}


def tensors(dtype: Any = jnp.bfloat16) -> tuple[jax.Array, ...]:
    """query, key and value, of mean 0.5."""
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H)
    query, key, value = (jnp.asarray(rng.normal(0.5, 1, shape), dtype) for shape in shapes)
    return query, key, value


def mesh(kind: AxisType) -> Mesh:
    return Mesh(np.array(jax.devices()[:2]), ("x",), axis_types=(kind,))


def _masked(mask: dict[str, Any]) -> Callable[..., Any]:
    def call(implementation: Any, *qkv: Any) -> Any:
        return jax_fa3.dot_product_attention(*qkv, implementation=implementation, **mask)

    return call


def _dense(implementation: Any, *qkv: Any) -> Any:
    dense: Any = {"bias": jnp.ones((N, T, 1), jnp.bfloat16), "mask": np.tri(T, dtype=bool)}
    return jax_fa3.dot_product_attention(*qkv, **dense, implementation=implementation)


def _options(implementation: Any, *qkv: Any) -> Any:
    options: Any = {"scale": 0.3, "logits_soft_cap": 5.0, "return_residual": True, **SINKS}
    return jax_fa3.dot_product_attention(*qkv, implementation=implementation, **options)


def _array_scale(implementation: Any, *qkv: Any) -> Any:
    return jax_fa3.dot_product_attention(*qkv, scale=jnp.float32(2), implementation=implementation)


def _one(implementation: Any, *qkv: Any) -> Any:
    one = (x[0] for x in qkv)
    lengths: Any = {"query_seq_lengths": 3, "key_end": range(1, T + 1)}
    return jax_fa3.dot_product_attention(*one, implementation=implementation, **lengths)


def _packed(implementation: Any, *qkv: Any) -> Any:
    x = jnp.concatenate(qkv, axis=2)
    return jax_fa3.qkv_dot_product_attention(x, K, implementation=implementation, **TWO, **SINKS)


def _packed_in_three(implementation: Any, query: Any, *_: Any) -> Any:
    x = jnp.stack([query] * 3, axis=2)
    return jax_fa3.qkv_dot_product_attention(x, implementation=implementation, is_causal=True)


def _vmap(implementation: Any, *qkv: Any) -> Any:
    def call(*qkv: Any) -> Any:
        ids: Any = {name: ids[0] for name, ids in IDS.items()}
        return jax_fa3.dot_product_attention(*qkv, implementation=implementation, **ids)

    return jax.vmap(call)(*qkv)


def _vmap_of_query(implementation: Any, query: Any, key: Any, value: Any) -> Any:
    """Whose axis goes into the heads."""
    options: Any = {"implementation": implementation, **LENGTHS}
    call = jax.vmap(lambda x: jax_fa3.dot_product_attention(x, key, value, **options))
    return call(jnp.stack([query, -query, query / 2]))


def _no_heads(implementation: Any, query: Any, key: Any, value: Any) -> Any:
    qkv = query[:, :, :0], key, value
    return jax_fa3.dot_product_attention(*qkv, implementation=implementation)


def _sharding(implementation: Any, *qkv: Any) -> Any:
    where: Any = {"sharding": NamedSharding(mesh(AxisType.Auto), P("x"))}
    return jax_fa3.dot_product_attention(*qkv, implementation=implementation, **where, **TWO)


def _explicit(implementation: Any, *qkv: Any) -> Any:
    qkv = tuple(jax.sharding.reshard(x, P("x")) for x in qkv)
    out = jax_fa3.dot_product_attention(*qkv, implementation=implementation, **LENGTHS)
    return jax.sharding.reshard(out, P())


def _automatic(implementation: Any, *qkv: Any) -> Any:
    where = NamedSharding(mesh(AxisType.Auto), P("x"))
    qkv = tuple(jax.lax.with_sharding_constraint(x, where) for x in qkv)
    return jax_fa3.dot_product_attention(*qkv, implementation=implementation, **LENGTHS)


def _context_parallel(strategy: Any, zigzag: bool, mask: dict[str, Any]) -> Callable[..., Any]:
    def call(implementation: Any, *qkv: Any) -> Any:
        where: Any = {"sharding": NamedSharding(mesh(AxisType.Auto), P(None, "x"))}
        where |= {"axis_name": "x", "strategy": strategy, "zigzag": zigzag}
        return context_parallel.dot_product_attention(
            *qkv, implementation=implementation, **where, **mask
        )

    return call


def _in_shard_map(implementation: Any, *qkv: Any) -> Any:
    def local(*qkv: Any) -> Any:
        options: Any = {"is_causal": True, "implementation": implementation}
        return context_parallel.dot_product_attention(*qkv, axis_name="x", **options)

    spec = P(None, "x")
    return jax.shard_map(local, mesh=mesh(AxisType.Auto), in_specs=spec, out_specs=spec)(*qkv)


def _fp8(quantization: Any) -> Callable[..., Any]:
    def call(implementation: Any, *qkv: Any) -> Any:
        options: Any = {"quantization": quantization, "implementation": implementation}
        return fp8.dot_product_attention(*qkv, **options, **LENGTHS, **SINKS)

    return call


def _layer(api: Any, options: dict[str, Any], **call: Any) -> Callable[..., Any]:
    def run(implementation: Any, query: Any, *_: Any) -> Any:
        inputs = query[..., 0, :FEATURES].astype(jnp.float32)
        sizes: Any = {"num_heads": N, "num_kv_heads": K, "qkv_features": N * H}
        sizes |= {"is_causal": True, "implementation": implementation}
        sizes |= {"dtype": jnp.bfloat16 if implementation == "fa3" else jnp.float32}
        sizes |= options
        if api == "nnx":
            sizes |= {"in_features": FEATURES, "rngs": nnx.Rngs(0)}
            nnx_layer = jax_fa3.flax.nnx.MultiHeadAttention(**sizes)
            if options.get("decode"):
                nnx_layer.init_cache(inputs.shape)
            return nnx_layer(inputs, **call)
        layer = jax_fa3.flax.linen.MultiHeadAttention(**sizes)
        variables: Any = layer.init(jax.random.key(0), inputs)
        return layer.apply(variables, inputs, mutable=["cache"], **call)[0]

    return run


def _attention_fn(implementation: Any, query: Any, key: Any, value: Any) -> Any:
    options: Any = {"mask_to_intervals": True, "implementation": implementation}
    attention = jax_fa3.flax.make_attention_fn(**options)
    return attention(query, key, value, mask=nn.make_causal_mask(jnp.ones((B, T))))


# Not normalize_qk: Flax's norms refuse strict promotion in 16 bit.
ROTARY: Any = {"rotary_base": 100.0}

# Functions of an implementation and of query, key and value, with first derivatives.
CALLS: dict[str, Callable[..., Any]] = {
    **{name: _masked(mask) for name, mask in MASKS.items()},
    "options": _options,
    "without batch": _one,
    "packed": _packed,
    "packed, [3, N]": _packed_in_three,
    "vmap": _vmap,
    "vmap of query": _vmap_of_query,
    "sharding": _sharding,
    "explicit axes": _explicit,
    "automatic axes": _automatic,
    "ring": _context_parallel("ring", False, {**TWO, **LENGTHS, **PADDING, "is_causal": True}),
    "ring, zigzag": _context_parallel(
        "ring", True, {**CAUSAL, **SINKS, "query_offset": ints(1, 2)}
    ),
    "all-gather": _context_parallel("all_gather", True, {"is_causal": True, **LENGTHS}),
    "all-to-all": _context_parallel("all_to_all", True, {"local_window_size": 3}),
    "ring in shard_map": _in_shard_map,
    "fp8, block": _fp8("block"),
    "fp8, head": _fp8("head"),
    "fp8, tensor": _fp8("tensor"),
    "nnx": _layer("nnx", ROTARY | PADDING, **TWO),
    "linen": _layer("linen", ROTARY | PADDING, **TWO),
    "nnx, decoding": _layer("nnx", ROTARY | {"decode": True}),
    "linen, decoding": _layer("linen", ROTARY | {"decode": True}),
    "attention_fn": _attention_fn,
    "bias and mask": _dense,
}

# Those that the kernels do not take.
PLAIN: dict[str, Callable[..., Any]] = {
    "array scale": _array_scale,
    "no query heads": _no_heads,
}


def around(name: str) -> contextlib.AbstractContextManager[Any]:
    """What a call is to be made in."""
    if name == "explicit axes":
        return jax.set_mesh(mesh(AxisType.Explicit))
    return contextlib.nullcontext()
