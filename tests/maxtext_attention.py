"""What the tests of MaxText's adapter share: its AttentionOp by its configuration's `attention`."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from integrations import project

maxtext, attention_op = project("maxtext", "maxtext", "maxtext.layers.attention_op")
B, T, N, K, H = 2, 32, 4, 2, 16
SHAPES = (B, T, N, H), (B, T, K, H), (B, T, K, H)


@contextmanager
def installed() -> Iterator[None]:
    """The adapter, for as long."""
    original = attention_op.AttentionOp.apply_attention
    importlib.import_module("jax_fa3.integrations.maxtext").install()
    yield
    attention_op.AttentionOp.apply_attention = original


@cache
def config(*arguments: str) -> Any:
    pyconfig = importlib.import_module("maxtext.configs.pyconfig")
    base = os.fspath(Path(maxtext.__file__).parent / "configs" / "base.yml")
    fixed = "run_name=test", "enable_checkpointing=False", "skip_jax_distributed_system=True"
    sizes = f"max_target_length={T}", "per_device_batch_size=1"
    hardware = () if any(x.startswith("hardware=") for x in arguments) else ("hardware=cpu",)
    return pyconfig.initialize(["", base, *fixed, *sizes, *hardware, *arguments])


def attention(kernel: str, kind: str = "global", arguments: Any = (), **options: Any) -> Any:
    """AttentionOp with the configuration's `attention`, as a function of query, key and value."""
    utils = importlib.import_module("maxtext.utils.maxtext_utils")
    settings = config(f"attention={kernel}", *arguments)
    mesh = jax.sharding.Mesh(
        utils.create_device_mesh(settings, jax.devices("cpu")), settings.mesh_axes
    )
    static = "attn_logits_soft_cap", "sliding_window_size", "chunk_attn_window_size", "dropout_rate"
    op = attention_op.AttentionOp(
        settings,
        mesh,
        attention_kernel=settings.attention,
        max_target_length=T,
        num_query_heads=N,
        num_kv_heads=options.pop("num_kv_heads", K),
        attention_type=attention_op.AttentionType(kind),
        **{name: options.pop(name) for name in static if name in options},
    )
    segment_ids, positions = options.pop("segment_ids", None), options.pop("positions", None)
    mode = options.pop("mode", "train")

    def call(query: Any, key: Any, value: Any) -> Any:
        linen = importlib.import_module("flax.linen")
        with linen.logical_axis_rules(settings.logical_axis_rules):
            return op(query, key, value, segment_ids, positions, mode, **options)

    return call


ids = np.ones((B, T), np.int32)
ids[0, 10:] = 2
ids[1, 25:] = 0  # padding
real = jnp.asarray(ids > 0)[..., None, None]
image = np.zeros((B, T), bool)
image[0, 4:9] = image[0, 12:13] = image[1, 20:25] = True

CASES = {
    "global": {},
    "full": {"kind": "full"},
    "window": {"kind": "local_sliding", "sliding_window_size": 7},
    "chunk": {"kind": "chunk", "chunk_attn_window_size": 8},
    "segments": {"segment_ids": ids},
    "sinks": {"segment_ids": ids, "sinks": jnp.linspace(-1, 2, N)},
    "soft cap, window, segments": {
        "kind": "local_sliding",
        "sliding_window_size": 7,
        "attn_logits_soft_cap": 2.0,
        "segment_ids": ids,
    },
    "chunk, segments": {"kind": "chunk", "chunk_attn_window_size": 8, "segment_ids": ids},
    "images": {"bidirectional_mask": image},
    "images, window": {
        "kind": "local_sliding",
        "sliding_window_size": 3,
        "bidirectional_mask": image,
        "segment_ids": ids,
    },
}


def on_real_rows(function: Any) -> Any:
    """Rows of padding, which see each other in MaxText and nothing here, left out."""
    return lambda *arrays: jnp.where(real, function(*arrays), 0)
