"""A training step of MeanFlow (Geng et al., arXiv 2505.13447) with a small DiT: a network u(z, r, t) whose
target is made of its own tangent along (v, 0, 1), and in which a gradient is taken of the primal alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

# query, key and value [B, T, N, H] to out
Attention = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a DiT-B."""

    batch: int = 2
    tokens: int = 4096
    layers: int = 12
    width: int = 768
    heads: int = 12


def inputs(sizes: Sizes) -> tuple[Any, ...]:
    """Weights of all layers in fp32, z [B, T, D] and its velocity in bf16, r and t [B]."""

    def normal(seed: int, *shape: int) -> Array:
        return jax.random.normal(jax.random.key(seed), shape, jnp.float32)

    d = sizes.width
    shapes = (d, 3 * d), (d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)
    weights = tuple(normal(i, sizes.layers, *s) * s[0] ** -0.5 / 2 for i, s in enumerate(shapes))
    z, velocity = (normal(i, sizes.batch, sizes.tokens, d).astype(jnp.bfloat16) for i in (8, 9))
    return weights, z, velocity, jnp.full(sizes.batch, 0.2), jnp.full(sizes.batch, 0.7)


def _normalized(x: Array) -> Array:
    wide = x.astype(jnp.float32)
    wide -= wide.mean(-1, keepdims=True)
    return (wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def _layer(
    attention: Attention, heads: int, of_time: Array, x: Array, weights: Sequence[Array]
) -> Array:
    modulate, qkv, out, up, down = (w.astype(x.dtype) for w in weights)
    shift, scale, gate = jnp.split((of_time @ modulate)[:, None], 3, axis=-1)
    y = _normalized(x) * (1 + scale) + shift
    parts = (y @ qkv).reshape(*x.shape[:2], 3, heads, -1)
    attended = attention(parts[:, :, 0], parts[:, :, 1], parts[:, :, 2])
    x = x + gate * (attended.reshape(x.shape) @ out)
    return x + jax.nn.gelu(_normalized(x) @ up) @ down


def _model(
    attention: Attention, heads: int, weights: Sequence[Array], z: Array, r: Array, t: Array
) -> Array:
    frequencies = jnp.arange(1.0, z.shape[-1] // 2 + 1)
    angles = [x[:, None] * frequencies for x in (r, t)]
    of_time = jnp.concatenate((jnp.sin(angles[0]), jnp.cos(angles[1])), -1).astype(z.dtype)
    layer = jax.checkpoint(functools.partial(_layer, attention, heads, of_time))
    return lax.scan(lambda x, w: (layer(x, w), None), z, tuple(weights))[0]


def loss(
    attention: Attention,
    heads: int,
    weights: Sequence[Array],
    z: Array,
    velocity: Array,
    r: Array,
    t: Array,
) -> Array:
    along = velocity, jnp.zeros_like(r), jnp.ones_like(t)
    u, du = jax.jvp(functools.partial(_model, attention, heads, weights), (z, r, t), along)
    target = velocity - (t - r)[:, None, None].astype(velocity.dtype) * du
    return jnp.square((u - lax.stop_gradient(target)).astype(jnp.float32)).mean()


def step(attention: Attention, heads: int) -> Callable[..., tuple[Array, Any]]:
    """Of `inputs`: the loss and the gradient of the weights, under jit."""
    return jax.jit(jax.value_and_grad(functools.partial(loss, attention, heads)))
