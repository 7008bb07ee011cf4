"""The engine of generate.py: the transformer of gpt.py over pages, one step for all requests."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from gpt import Config

from jax_fa3 import kv_cache

NO_PAGE = 2**30  # no page of any layer


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the engine. What a sequence's results are does not depend on any but chunk and split."""

    slots: int = 4  # sequences at a time
    rows: int = 24  # tokens of a step
    chunk: int = 8  # of a prompt, that one step reads
    page: int = 16  # positions
    pages: int = 32  # of the pool
    longest: int = 128  # positions of a sequence
    split: int = 64  # keys that are summed at a time


@dataclasses.dataclass
class Request:
    tokens: list[int]  # of the prompt, and then what is written
    length: int  # tokens to write
    prompt: int = 0  # how many of the tokens are the prompt's
    done: int = 0  # how many of them are in the cache
    pages: list[int] = dataclasses.field(default_factory=list)

    @property
    def finished(self) -> bool:
        written = len(self.tokens) - self.prompt
        return written > 0 and (written == self.length or self.tokens[-1] == 0)  # which ends a text


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def step(config: Config, sizes: Sizes, params: Any, pools: Any, tokens: Any, where: Any) -> Any:
    """The most likely token after each sequence's last row, and the pools.

    Args:
        tokens: int32 [rows].
        where: key_value_seq_lengths, query_starts and page_table of the slots.
    """
    dtype, heads = jnp.bfloat16, config.heads
    head_dim = config.width // heads
    angles = jnp.arange(sizes.longest)[:, None] * 10000.0 ** -(
        jnp.arange(head_dim // 2) / (head_dim // 2)
    )
    options: Any = {
        "rotary_cos": jnp.cos(angles),
        "rotary_sin": jnp.sin(angles),
        "split_size": sizes.split,
        "implementation": "xla",
    }
    embed = nn.Embed(config.vocabulary, config.width, dtype=dtype)

    def norm(scale: Any, x: Any) -> Any:
        return nn.RMSNorm(dtype=dtype).apply({"params": scale}, x)

    def layer(carry: Any, of_layer: Any) -> Any:
        (x, pools), (p, i) = carry, of_layer
        kernels = {name: q["kernel"].astype(dtype) for name, q in p["MultiHeadAttention_0"].items()}
        y = norm(p["RMSNorm_0"], x)
        qkv = (jnp.einsum("rw,wnh->rnh", y, kernels[name]) for name in ("query", "key", "value"))
        table = where["page_table"] + i * sizes.pages
        out, *pools = kv_cache.append_and_attend(
            *qkv, *pools, **{**where, "page_table": table}, **options
        )
        x += jnp.einsum("rnh,nhw->rw", out, kernels["out"])
        narrow, wide = (p[name]["kernel"].astype(dtype) for name in ("Dense_0", "Dense_1"))
        x += nn.gelu(norm(p["RMSNorm_1"], x) @ wide) @ narrow
        return (x, tuple(pools)), None

    embedding = {"params": params["Embed_0"]}
    carry = embed.apply(embedding, tokens), pools
    layers = params["blocks"], jnp.arange(config.layers, dtype=jnp.int32)
    (x, pools), _ = jax.lax.scan(layer, carry, layers)
    last = jnp.maximum(where["query_starts"][1:] - 1, 0)
    x = norm(params["RMSNorm_0"], x[last])
    logits: Any = embed.apply(embedding, x, method="attend")
    return jnp.argmax(logits, -1), logits, pools


class Engine:
    def __init__(self, config: Config, params: Any, sizes: Sizes):
        self.config, self.params, self.sizes = config, params, sizes
        shape = config.layers * sizes.pages, sizes.page, config.heads, config.width // config.heads
        self.pools = jnp.zeros(shape, jnp.bfloat16), jnp.zeros(shape, jnp.bfloat16)
        self.free = list(range(sizes.pages))
        self.slots: list[Request | None] = [None] * sizes.slots

    def admit(self, request: Request) -> bool:
        """If there is a slot, and room for all that it will read and write."""
        sizes = self.sizes
        need = -(-(len(request.tokens) + request.length) // sizes.page)
        if need * sizes.page > sizes.longest:
            raise SystemExit(
                f"a request needs {need} pages of {sizes.page}, more than {sizes.longest}"
            )
        if None not in self.slots or need > len(self.free):
            return False
        request.prompt = len(request.tokens)
        request.pages = [self.free.pop() for _ in range(need)]
        self.slots[self.slots.index(None)] = request
        return True

    def step(self) -> tuple[list[Request], int]:
        """Requests that have left, and how many tokens went through the model."""
        sizes, slots = self.sizes, self.slots
        counts, left = [0] * len(slots), sizes.rows
        # Those that write come first, for they have one row; a chunk waits if it does not fit.
        for i in sorted(range(len(slots)), key=lambda i: self._rows(slots[i])):
            rows = self._rows(slots[i])
            if rows <= left:
                counts[i], left = rows, left - rows
        table = np.full((len(slots), sizes.longest // sizes.page), NO_PAGE, np.int32)
        tokens: list[int] = []
        lengths = np.zeros(len(slots), np.int32)
        for i, request in enumerate(slots):
            if request is not None:
                table[i, : len(request.pages)] = request.pages
                tokens += request.tokens[request.done : request.done + counts[i]]
                request.done += counts[i]
                lengths[i] = request.done if counts[i] else 0
        starts = np.cumsum([0, *counts]).astype(np.int32)
        where = {"key_value_seq_lengths": lengths, "query_starts": starts, "page_table": table}
        padded = np.array(tokens + [0] * left, np.int32)
        args = self.config, self.sizes, self.params, self.pools, padded, where
        found, _, self.pools = step(*args)
        gone = []
        for i, (request, token) in enumerate(zip(slots, np.asarray(found).tolist(), strict=True)):
            if request is not None and counts[i] and request.done == len(request.tokens):
                request.tokens.append(token)
                if request.finished:
                    gone.append(request)
                    self.free += request.pages
                    slots[i] = None
        return gone, len(tokens)

    def _rows(self, request: Request | None) -> int:
        return 0 if request is None else min(self.sizes.chunk, len(request.tokens) - request.done)
