"""The transformer and the text of train_transformer.py."""

import ast
import collections
import dataclasses
import functools
import re
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import jax_fa3
import jax_fa3.fp8
from jax_fa3.flax.linen import MultiHeadAttention

ATTENTION = {  # beside the implementations of jax_fa3.dot_product_attention
    "fp8": jax_fa3.fp8.dot_product_attention,  # the forward; the backward is that of 16 bits
    "cudnn": functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
}
PIECE = re.compile(r" ?\w+|\s+|[^\w\s]")


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int
    width: int
    heads: int
    vocabulary: int  # 256 bytes, the text's most frequent pieces, and possibly some to spare
    length: int  # tokens of a row
    rows: int  # of a batch
    steps: int
    learning_rate: float
    implementation: str | None = None
    packed: bool = True
    kv_heads: int | None = None  # None: as many as heads


SIZES = {
    "tiny": Config(1, 64, 2, 512, 32, 2, 3, 3e-3),  # only to see that it runs
    "small": Config(2, 128, 2, 4096, 256, 8, 150, 5e-3),
    "350m": Config(24, 1024, 8, 49152, 8192, 4, 200, 6e-4),  # 352M parameters, head dim 128
}


class Block(nn.Module):
    config: Config
    decode: bool

    @nn.compact
    def __call__(self, x: jax.Array, key_begin: Any) -> tuple[jax.Array, None]:
        options: dict[str, Any] = {"implementation": self.config.implementation}
        if self.config.implementation in ATTENTION:
            options = {"attention_fn": ATTENTION[self.config.implementation]}
        norm = functools.partial(nn.RMSNorm, dtype=jnp.bfloat16)
        dense = functools.partial(nn.Dense, use_bias=False, dtype=jnp.bfloat16)
        x += MultiHeadAttention(
            self.config.heads,
            num_kv_heads=self.config.kv_heads,
            is_causal=True,
            rotary_base=10000.0,
            use_bias=False,
            dtype=jnp.bfloat16,
            decode=self.decode,
            **options,
        )(norm()(x), key_begin=key_begin)
        x += dense(self.config.width)(nn.gelu(dense(4 * self.config.width)(norm()(x))))
        return x, None


class Transformer(nn.Module):
    config: Config
    decode: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array, key_begin: Any = None) -> jax.Array:
        """Tokens [B, T] to logits [B, T, vocabulary]; key_begin: the first token each may see."""
        config, init = self.config, nn.initializers.normal(0.02)
        embed = nn.Embed(config.vocabulary, config.width, dtype=jnp.bfloat16, embedding_init=init)
        # Computed again in the backward pass: everything but what attention leaves for it.
        policy = jax.checkpoint_policies.save_only_these_names(*jax_fa3.RESIDUAL_NAMES)
        block = Block if self.decode else nn.remat(Block, policy=policy, prevent_cse=False)
        to_each: Any = nn.broadcast
        blocks = nn.scan(  # compiled once, not once a layer
            block,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            in_axes=to_each,
            length=config.layers,
        )
        x, _ = blocks(config, self.decode, name="blocks")(embed(tokens), key_begin)
        return embed.attend(nn.RMSNorm(dtype=jnp.bfloat16)(x))


@functools.cache
def read_documents() -> list[str]:
    """Python's language reference by chapter, its library's docstrings by module, its licence."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = [topics[name] for name in sorted(topics)]
    texts += [path.read_text(encoding="utf-8") for path in library.glob("LICENSE*")]
    documented = ast.Module, ast.ClassDef, ast.FunctionDef
    for path in sorted(library.glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_bytes()))
        found = [ast.get_docstring(node) for node in nodes if isinstance(node, documented)]
        texts.append("\n\n".join(filter(None, found)))
    return [text for text in texts if len(text) > 200]


class Text:
    """The documents as one stream of tokens, each with the start of its document."""

    def __init__(self, config: Config):
        documents = [PIECE.findall(text) for text in read_documents()]
        counts = collections.Counter(piece for pieces in documents for piece in pieces)
        common = [piece for piece, _ in counts.most_common(config.vocabulary - 256)]
        self.pieces = [bytes([i]) for i in range(256)] + [piece.encode() for piece in common]
        self.ids = {piece: 256 + i for i, piece in enumerate(common)}
        streams = [[*self.encode("".join(pieces)), 0] for pieces in documents]
        order = np.random.default_rng(0).permutation(len(streams))
        self.tokens = np.concatenate([np.array(streams[i], np.int32) for i in order])
        self.documents = np.repeat(np.arange(len(order)), [len(streams[i]) for i in order])

    def encode(self, text: str) -> list[int]:
        """Pieces that are not in the vocabulary become bytes."""
        pieces = PIECE.findall(text)
        return [i for p in pieces for i in ([self.ids[p]] if p in self.ids else p.encode())]

    def decode(self, tokens: Any) -> str:
        return b"".join(self.pieces[i] for i in tokens if i < len(self.pieces)).decode(
            errors="replace"
        )

    def batch(self, config: Config, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and document numbers [rows, length + 1], from anywhere; each step has its own."""
        starts = np.random.default_rng(step).integers(
            len(self.tokens) - config.length, size=config.rows
        )
        where = starts[:, None] + np.arange(config.length + 1)
        return self.tokens[where], self.documents[where]
