"""Training on a mesh of data and model: where the arrays of a step are, and cuDNN with grouped heads there."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(text: str) -> Mesh:
    """Of "2x4", as many devices as that is: batches over 2, heads and the widest layers over 4."""
    data, model = map(int, text.split("x"))
    if data * model > jax.device_count():
        raise ValueError(f"--mesh: got {text}, wanted at most {jax.device_count()} devices")
    return Mesh(np.reshape(jax.devices()[: data * model], (data, model)), ("data", "model"))


def put_state(mesh: Mesh, state: Any) -> Any:
    """Parameters, and the optimizer's moments alike, split over "model" as in tensor parallelism: heads,
    and the wide side of the others' kernels; what it does not divide is on all devices."""

    def put(path: Any, x: jax.Array) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, _spec(jax.tree_util.keystr(path), x, mesh)))

    return jax.tree_util.tree_map_with_path(put, state)


def _spec(name: str, x: jax.Array, mesh: Mesh) -> P:
    axis = None
    if "MultiHeadAttention" in name and "'kernel'" in name:
        axis = x.ndim - (3 if "'out'" in name else 2)
    elif "Dense" in name:
        axis = int(np.argmax(x.shape))
    if axis is None or x.shape[axis] % mesh.shape["model"]:
        return P()
    return P(*[None] * axis, "model")


def put_batch(mesh: Mesh, batch: tuple[np.ndarray, ...]) -> tuple[jax.Array, ...]:
    where = NamedSharding(mesh, P("data"))
    return tuple(jax.device_put(x, where) for x in batch)


def cudnn(model: int) -> Any:
    """cuDNN through jax.nn, with key/value heads repeated where there are fewer than devices, without
    which it does not split them."""

    @functools.wraps(jax.nn.dot_product_attention)
    def attend(query: Any, key: Any, value: Any, **options: Any) -> Any:
        repeats = max(1, model // key.shape[2])
        key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn", **options)

    return attend
