"""The import swap of docs/integrations.md: a model of Flax's own layers moved to jax_fa3.flax.nnx."""

from typing import Any

import jax.numpy as jnp
import pytest
from integrations import (
    assert_no_further,
    assert_runs_kernels,
    assert_same_as_theirs,
    inputs,
    project,
)

nnx, linen = project("flax", "flax.nnx", "flax.linen")
ours = project("flax", "jax_fa3.flax.nnx")
pytestmark = pytest.mark.usefixtures("on_cpu")
B, T, WIDTH = 2, 24, 32


def model(attention: Any, dtype: Any = None, **options: Any) -> Any:
    """A block with this attention; of one seed, so the weights are Flax's."""

    class Block(nnx.Module):
        def __init__(self, rngs: Any):
            self.norm = nnx.LayerNorm(WIDTH, dtype=dtype, rngs=rngs)
            self.attention = attention(
                num_heads=4, in_features=WIDTH, decode=False, dtype=dtype, rngs=rngs, **options
            )

        def __call__(self, x: Any, mask: Any = None) -> Any:
            masks = {} if mask is None else {"mask": mask}
            return x + self.attention(self.norm(x), **masks)

    return nnx.split(Block(nnx.Rngs(0)), nnx.Param, ...)


def swapped(dtype: Any = None) -> tuple[Any, Any, Any]:
    """Flax's weights, and both models as functions of them and of x."""
    graph, weights, rest = model(nnx.MultiHeadAttention, dtype)
    our_graph, _, our_rest = model(ours.MultiHeadAttention, dtype, is_causal=True)
    mask = linen.make_causal_mask(jnp.ones((B, T)))

    def found(weights: Any, x: Any) -> Any:
        return nnx.merge(our_graph, weights, our_rest)(x)

    return weights, found, lambda weights, x: nnx.merge(graph, weights, rest)(x, mask)


def test_same_as_flax():
    weights, found, theirs = swapped()
    assert_same_as_theirs(found, theirs, (weights, *inputs([(B, T, WIDTH)], jnp.float32)))


def test_bf16():
    weights, found, theirs = swapped(jnp.bfloat16)
    arrays = weights, *inputs([(B, T, WIDTH)], jnp.bfloat16)
    assert_no_further(found, theirs, arrays, exact=swapped()[2], pooled=True)


def test_reaches_the_kernels():
    weights, found, _ = swapped(jnp.bfloat16)
    assert_runs_kernels(found, (weights, *inputs([(B, T, WIDTH)], jnp.bfloat16)))
