"""jax_fa3.flax on a Hopper GPU: the kernels in Flax's layers and in ours."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from cases import Case
from helpers import Results, assert_rounded

pytest.importorskip("flax")
from flax import linen as nn

import jax_fa3.flax
from jax_fa3 import _reference

pytestmark = pytest.mark.gpu
B, T, N, H = 2, 200, 4, 64
CAUSAL = nn.make_causal_mask(jnp.ones((B, T)))
LEFT = jnp.arange(T) >= jnp.array([[30], [0]])
MASKS = {
    "none": jnp.ones((B, 1, T, T)),
    "causal": CAUSAL,
    "left": nn.combine_masks(CAUSAL, LEFT[:, None, None].astype(jnp.float32)),
    "keys": LEFT[:, None, None].astype(jnp.float32),
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_fn(name):
    """Outputs and gradients by the tolerance rule, against Flax's own function in fp32."""
    mask: Any = MASKS[name]
    case = Case(name, B=B, T=T, S=T, N=N, K=N, H=H)
    seen = jnp.broadcast_to(mask != 0, (B, 1, T, T))
    ours = jax_fa3.flax.make_attention_fn(mask_to_intervals=True, implementation="fa3")

    def rounded(*qkv, mask):
        return _reference.attention(*qkv, mask=seen, round_to=jnp.bfloat16)[0]

    def results(function: Any, dtype: Any) -> Results:
        rows = seen.any((1, 3))[..., None, None]
        qkv = (x.astype(dtype) for x in case.inputs(jnp.bfloat16))
        out, pullback = jax.vjp(lambda *x: jnp.where(rows, function(*x, mask=mask), 0), *qkv)
        grads = pullback(case.cotangents(jnp.bfloat16)[0].astype(dtype))
        return Results(out, None, *grads)  # type: ignore[arg-type]

    with jax.default_matmul_precision("highest"):
        exact = results(nn.dot_product_attention, jnp.float32)
        rough = results(rounded, jnp.float32)
    eps = jnp.finfo(jnp.bfloat16).eps
    assert_rounded(results(ours, jnp.bfloat16), exact, rough, case, eps)


def test_layer_decodes():
    """A prompt and then tokens one by one, through the kernel with a cache, as in one pass."""
    options: dict[str, Any] = {"is_causal": True, "rotary_base": 1e4, "dtype": jnp.bfloat16}
    layer: Any = jax_fa3.flax.linen.MultiHeadAttention(
        N, num_kv_heads=2, implementation="fa3", decode=True, **options
    )
    x = jax.random.normal(jax.random.key(0), (B, 40, N * H))
    variables = layer.init(jax.random.key(1), x)
    whole, cache = layer.apply(variables, x, mutable=["cache"])
    for start, stop in ((0, 33), (33, 34), (34, 40)):
        out, cache = layer.apply(variables, x[:, start:stop], mutable=["cache"])
        variables = variables | cache
        error = jnp.abs(out.astype(jnp.float32) - whole[:, start:stop].astype(jnp.float32)).max()
        assert error <= 0.02 * jnp.abs(whole).max()
