"""Attention as it stands in JAX projects, written again here with their shapes, dtypes and masks: what of
it reaches the kernels of a Hopper GPU, forward and backward."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from lowering import hide_gpus, lower, targets

import jax_fa3
from jax_fa3 import _targets

B, T, N = 2, 256, 8
ROWS, COLUMNS = jnp.arange(T)[:, None], jnp.arange(T)
CAUSAL = COLUMNS <= ROWS
LENGTHS = jnp.array([200, 256])[:, None, None, None]
TOKENS = jnp.ones((B, T), jnp.int32)


class Client(NamedTuple):
    """A call of dot_product_attention: key/value heads, head dim, query's dtype, and other arguments,
    made when it is called."""

    heads: int = N
    head_dim: int = 64
    arguments: Callable[[], dict[str, Any]] = dict
    query: Any = jnp.bfloat16
    rows: int = T

    @property
    def tensors(self) -> tuple[Any, ...]:
        key = jax.ShapeDtypeStruct((B, T, self.heads, self.head_dim), jnp.bfloat16)
        return jax.ShapeDtypeStruct((B, self.rows, N, self.head_dim), self.query), key, key


def dense(mask: Callable[[], jax.Array]) -> Callable[[], dict[str, Any]]:
    return lambda: {"mask": mask()}


# Rotary embeddings in fp32 leave a query, or query and key, that the caller does not cast back.
PROMOTED: Any = {"query": jnp.float32}
ROTARY = {"is_causal": True, "compute_dtype": jnp.bfloat16}

CLIENTS = {
    # Dense masks, of one interval a row each.
    "Flax linen, causal": Client(arguments=dense(lambda: jnp.broadcast_to(CAUSAL, (B, 1, T, T)))),
    "Flax linen, padded": Client(
        arguments=dense(lambda: jnp.broadcast_to(COLUMNS < LENGTHS, (B, 1, T, T)))
    ),
    "Flax nnx, causal and padded": Client(arguments=dense(lambda: CAUSAL & (COLUMNS < LENGTHS))),
    "Flax, decoding": Client(rows=1, arguments=dense(lambda: COLUMNS < LENGTHS)),
    "Gemma, sampling": Client(4, 256, dense(lambda: CAUSAL & (COLUMNS < LENGTHS))),
    "Gemma, window": Client(4, 256, dense(lambda: (CAUSAL & (COLUMNS > ROWS - 64))[None, None])),
    "Gemma, image in text": Client(
        4,
        256,
        dense(lambda: CAUSAL | ((ROWS >= 40) & (ROWS < 80) & (COLUMNS >= 40) & (COLUMNS < 80))),
    ),
    "PaliGemma, prefix": Client(1, 256, dense(lambda: CAUSAL | (COLUMNS < LENGTHS // 4))),
    "EasyDeL, causal for every head": Client(
        arguments=dense(lambda: jnp.broadcast_to(CAUSAL, (B, N, T, T)))
    ),
    "Levanter, explicit mask": Client(2, 128, dense(lambda: CAUSAL[None, None])),
    "Equinox, mask of a layer": Client(arguments=dense(lambda: CAUSAL[None, None])),
    # What rotary embeddings promoted.
    "Tunix, Llama": Client(2, 128, lambda: ROTARY, **PROMOTED),
    "EasyDeL, Qwen": Client(2, 128, lambda: ROTARY, **PROMOTED),
    "Gemma, promoted": Client(
        4, 256, lambda: {"mask": CAUSAL, "compute_dtype": jnp.bfloat16}, **PROMOTED
    ),
    # By name, where cuDNN's stood.
    "MaxDiffusion": Client(arguments=lambda: {"key_value_seq_lengths": jnp.array([77, 256])}),
    # As they are.
    "MaxText": Client(2, 128, lambda: {"is_causal": True}),
    "Levanter, documents": Client(
        2,
        128,
        lambda: {
            "is_causal": True,
            "query_segment_ids": TOKENS,
            "key_value_segment_ids": TOKENS,
        },
    ),
    "ViT": Client(head_dim=72),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_reaches_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch):
    """By what is_supported says of a Hopper GPU, and in the program for CUDA."""
    hide_gpus(monkeypatch)
    client = CLIENTS[name]
    arguments = client.arguments()
    assert jax_fa3.is_supported(*client.tensors, device="sm_90", **arguments) is None

    def loss(*qkv: Any) -> Any:
        out = jax_fa3.dot_product_attention(*qkv, implementation="fa3", **arguments)
        assert out.dtype == client.query
        return out.astype(jnp.float32).sum()

    calls = targets(lower(jax.grad(loss, (0, 1, 2)), *client.tensors))
    assert {_targets.FWD, _targets.BWD} <= set(calls)


def test_names_of_others():
    """cuDNN's name is no way to call the kernels, and dropout wants a key."""
    qkv = CLIENTS["MaxDiffusion"].tensors
    cudnn: Any = {"implementation": "cudnn"}
    with pytest.raises(ValueError, match="fa3"):
        jax.eval_shape(partial(jax_fa3.dot_product_attention, **cudnn), *qkv)
    reason = jax_fa3.is_supported(*qkv, device="sm_90", dropout_rate=0.1)
    assert reason is not None and reason.startswith("dropout_key: got None")
