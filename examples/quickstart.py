"""Attention over a real text: the chapters of Python's own language reference, packed into rows.

    python examples/quickstart.py

Word tokens are embedded and projected with fixed random weights, several chapters share each row of
the batch, and no chapter sees another or its own future. On a Hopper GPU this library's kernel runs,
anywhere else the same function in XLA.
"""

import re
import time
from functools import partial
from pydoc_data.topics import topics  # comes with Python: help("IMPORTING") shows one of them

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa3

BATCH, LENGTH = 2, 2048
LONGEST = 700  # tokens of a chapter; the rest of it is left out
PADDING = -1
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, WIDTH = 8, 2, 64, 512


def read_documents() -> list[list[str]]:
    """The chapters as lists of words and punctuation marks."""
    texts = (topics[name] for name in sorted(topics))
    return [re.findall(r"\w+|[^\w\s]", text.lower())[:LONGEST] for text in texts]


def pack(documents: list[list[str]]) -> tuple[np.ndarray, np.ndarray, int]:
    """Fills the rows with whole documents, one after the other.

    Returns tokens and segment ids, int32 [BATCH, LENGTH], and how many different words there are.
    Where a row has no room for the next document it ends in padding: segment id -1.
    """
    tokens = np.zeros((BATCH, LENGTH), np.int32)
    segment_ids = np.full((BATCH, LENGTH), PADDING, np.int32)
    vocabulary: dict[str, int] = {}
    row, start = 0, 0
    for number, words in enumerate(documents):
        if start + len(words) > LENGTH:
            row, start = row + 1, 0
        if row == BATCH:
            break
        place = slice(start, start + len(words))
        tokens[row, place] = [vocabulary.setdefault(word, len(vocabulary)) for word in words]
        segment_ids[row, place] = number
        start += len(words)
    return tokens, segment_ids, len(vocabulary)


def embed_and_project(tokens: jax.Array, vocabulary: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """query [B, T, N, H], key and value [B, T, K, H] in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 4)
    embedded = jax.random.normal(keys[0], (vocabulary, WIDTH))[tokens]

    def project(key: jax.Array, heads: int) -> jax.Array:
        weights = jax.random.normal(key, (WIDTH, heads, HEAD_DIM)) / WIDTH**0.5
        return jnp.einsum("btw,wnh->btnh", embedded, weights).astype(jnp.bfloat16)

    return (
        project(keys[1], NUM_HEADS),
        project(keys[2], NUM_KV_HEADS),
        project(keys[3], NUM_KV_HEADS),
    )


@jax.jit
def intervals(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mask, once per step: row i sees the keys in [begin[i], end[i]), in every layer."""
    return jax_fa3.key_intervals(
        LENGTH,
        LENGTH,
        is_causal=True,
        query_segment_ids=segment_ids,
        key_value_segment_ids=segment_ids,
    )


@jax.jit
def attention(query, key, value, key_begin, key_end):
    return jax_fa3.dot_product_attention(query, key, value, key_begin=key_begin, key_end=key_end)


@jax.jit
def dense_attention(query, key, value, segment_ids):
    """The same by jax.nn, which needs the mask as a T x T array."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jax.nn.dot_product_attention(query, key, value, mask=same[:, None], is_causal=True)


def milliseconds(fn, calls: int = 50) -> float:
    """The mean of calls launched one after the other."""
    jax.block_until_ready(fn())
    start = time.perf_counter()
    jax.block_until_ready([fn() for _ in range(calls)])
    return (time.perf_counter() - start) / calls * 1e3


def main() -> None:
    tokens, ids, vocabulary = pack(read_documents())
    text = ids != PADDING
    segment_ids = jnp.asarray(ids)
    query, key, value = embed_and_project(jnp.asarray(tokens), vocabulary)
    key_begin, key_end = intervals(segment_ids)

    documents = len(np.unique(ids[text]))
    print(f"input      {np.sum(text)} tokens, {documents} documents in {BATCH} rows of {LENGTH}")
    print(f"           query {query.shape}, key and value {key.shape}, {query.dtype}")
    print(f"device     {jax.devices()[0].device_kind}")

    reason = jax_fa3.is_supported(query, key, value, key_begin=key_begin, key_end=key_end)
    print("ran        " + ("the Hopper kernel" if reason is None else f"XLA, because {reason}"))

    # What is right: the same maths in fp32, from the same bf16 inputs.
    with jax.default_matmul_precision("highest"):
        q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
        reference = np.asarray(dense_attention(q, k, v, segment_ids))

    def error(out: jax.Array) -> float:
        return float(np.max(np.abs(np.asarray(out, np.float32) - reference)[text]))

    out = attention(query, key, value, key_begin, key_end)
    ours, theirs = error(out), error(dense_attention(query, key, value, segment_ids))
    print(f"max error  {ours:.2e} against fp32; jax.nn in bf16 {theirs:.2e}")
    rounding = float(jnp.finfo(query.dtype).eps * np.max(np.abs(reference[text])))
    if not ours <= 2 * max(theirs, rounding):  # a NaN fails too
        raise SystemExit("the result is wrong: bfloat16's rounding does not explain its error")
    if np.any(np.asarray(out)[~text]):
        raise SystemExit("the result is wrong: padding must give 0")

    if jax.default_backend() == "gpu":
        fast = milliseconds(partial(attention, query, key, value, key_begin, key_end))
        slow = milliseconds(partial(dense_attention, query, key, value, segment_ids))
        print(f"time       {fast:.3f} ms; jax.nn with the dense mask {slow:.3f} ms")


if __name__ == "__main__":
    main()
