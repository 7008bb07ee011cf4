"""The inputs of the FP8 error tables, by name: query, key and value of one shape."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Arrays = tuple[jax.Array, ...]


def _normal(keys: jax.Array, shapes: list[tuple[int, ...]]) -> Arrays:
    return tuple(jax.random.normal(*x) for x in zip(keys, shapes, strict=True))


def _outliers(keys: jax.Array, shapes: list[tuple[int, ...]]) -> Arrays:
    """The paper's."""

    def one(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        normal, far, rare = jax.random.split(key, 3)
        chosen = jax.random.bernoulli(rare, 0.001, shape)
        return jax.random.normal(normal, shape) + 10 * jax.random.normal(far, shape) * chosen

    return tuple(one(*x) for x in zip(keys, shapes, strict=True))


def _spread(keys: jax.Array, shapes: list[tuple[int, ...]]) -> Arrays:
    """Normal numbers times a magnitude of each token, log-uniform from 0.01 to 1."""

    def one(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        normal, token = jax.random.split(key)
        exponent = jax.random.uniform(token, (shape[0], shape[1], 1, 1), minval=-2, maxval=0)
        return jax.random.normal(normal, shape) * 10**exponent

    return tuple(one(*x) for x in zip(keys, shapes, strict=True))


def _mean(mean: float, keys: jax.Array, shapes: list[tuple[int, ...]]) -> Arrays:
    query, key, value = _normal(keys, shapes)
    return query, key, value + mean


def _channels(keys: jax.Array, shapes: list[tuple[int, ...]]) -> Arrays:
    """Every 32nd channel of key is 20, or -20, in all tokens."""
    query, key, value = _normal(keys, shapes)
    channel = jnp.arange(key.shape[-1])
    return query, jnp.where(channel % 32 == 3, key + 20 - channel // 32 % 2 * 40, key), value


def _sink(keys: jax.Array, shapes: list[tuple[int, ...]]) -> Arrays:
    """A first key that gets most of the weight, and whose value is small."""
    query, key, value = _normal(keys, shapes)
    query = query.at[..., 0].set(4.0)
    first = (jnp.log(float(key.shape[1])) + 2) * key.shape[-1] ** 0.5 / 4
    return query, key.at[:, 0].set(0).at[:, 0, :, 0].set(first), value.at[:, 0].multiply(0.1)


KINDS: dict[str, Callable[..., Arrays]] = {
    "outliers": _outliers,
    "spread": _spread,
    "mean0": _normal,
    "mean0.5": functools.partial(_mean, 0.5),
    "mean1": functools.partial(_mean, 1.0),
    "mean2": functools.partial(_mean, 2.0),
    "channels": _channels,
    "sink": _sink,
}
TITLES = {
    "outliers": "Inputs with outliers: N(0, 1) + N(0, 100) · Bernoulli(0.001), of variance 100:",
    "spread": "Inputs whose tokens' magnitudes spread a hundredfold, from 0.01 to 1:",
    "mean0": "Normal inputs:",
    "mean0.5": "Normal inputs, 0.5 added to values:",
    "mean1": "Normal inputs, 1 added to values:",
    "mean2": "Normal inputs, 2 added to values:",
    "channels": "Normal inputs, every 32nd channel of key 20 or −20 in all tokens:",
    "sink": "Normal inputs, a first key with most of the weight:",
}
VALUES = tuple(KINDS)[2:]  # those of the second set of variants


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def draw(
    seed: int, kind: str, rows: int, keys: int, heads: int, head_dim: int
) -> tuple[jax.Array, ...]:
    """query, key and value in fp16."""
    shapes = [(1, length, heads, head_dim) for length in (rows, keys, keys)]
    drawn = KINDS[kind](jax.random.split(jax.random.key(seed), 3), shapes)
    return tuple(x.astype(jnp.float16) for x in drawn)
