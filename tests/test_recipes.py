"""The masks of docs/recipes.md are those that its headings say: each block, run with random numbers in place
of its ones, against the same attention with a mask written out."""

import re
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_examples import ROOT, python_of

B, T, N = 2, 256, 8
i, j = np.arange(T)[:, None], np.arange(T)
causal = j <= i
real = (j >= np.array([[30], [0]])) & (j < np.array([[256], [200]]))  # [B, T]
slopes = 2.0 ** -np.arange(1, N + 1)
image, ids = (j >= 64) & (j < 128), np.repeat(np.arange(3), [64, 64, 128])


def by_head(bias: Any) -> Any:
    return (slopes[:, None, None] * bias)[None]


# mask [B or 1, T, S], bias [1, N, T, S], and the name of key and value
WANTED: dict[str, dict[str, Any]] = {
    "out_prefix": {"mask": causal | (j < np.array([40, 100])[:, None, None])},
    "out_images": {"mask": causal | (image & image[:, None])},
    "out_chunked": {"mask": causal & (i // 64 == j // 64)},
    "out_blocks": {"mask": j // 64 <= i // 64},
    "out_windows": {"mask": ids[:, None] == ids},
    "out_text": {"mask": np.arange(77) < np.array([12, 77])[:, None, None], "key": "text"},
    "rollouts": {"mask": causal & real[:, :, None] & real[:, None]},
    "out_intervals": {"mask": causal & ((i - j < 64) | (j < 16))},
    "out_several": {"mask": causal & ((i - j < 64) | (j < 16))},
    "out_alibi": {"mask": causal, "bias": by_head(j - i)},
    "out_both_ways": {"bias": by_head(-abs(i - j))},
}


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict[str, Any]:
    code = python_of(ROOT / "docs" / "recipes.md")
    code, count = re.subn(r"jnp\.ones\((.*?), jnp\.bfloat16\)", r"made(\1)", code)
    assert count == 3  # query, key and value, text
    seeds = iter(range(count))

    def made(shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(jax.random.key(next(seeds)), shape)

    script = tmp_path_factory.mktemp("recipes") / "page.py"
    script.write_text(code, encoding="utf-8")
    return runpy.run_path(str(script), {"made": made})


def test_every_result_is_looked_at(names):
    assert {x for x in names if x.startswith("out")} | {"rollouts"} == WANTED.keys()


@pytest.mark.parametrize("name", WANTED)
def test_recipe(name, names):
    wanted = WANTED[name]
    query, key = names["query"], names[wanted.get("key", "key")]
    query, key = (np.asarray(x, np.float64) for x in (query, key))
    key = np.repeat(key, N // key.shape[2], axis=2)
    scores = np.einsum("btnh,bsnh->bnts", query, key) / 8 + wanted.get("bias", 0)
    mask = np.broadcast_to(wanted.get("mask", True), (B, *scores.shape[2:]))[:, None]
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * mask
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    out = np.einsum("bnts,bsnh->btnh", weights, key)  # value is key
    np.testing.assert_allclose(names[name], out, atol=1e-5)
    assert jnp.isfinite(names[name]).all()
