"""The appending kernel before attention: one call as two, and each step's own row is seen."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equal
from kv_cases import E4M3, Case, Inputs
from test_gpu_kv_cache_append import LAYOUTS, RAGGED, append, call_of, rotary
from test_kv_cache_append import new_rows

from jax_fa3 import kv_cache

pytestmark = pytest.mark.gpu
append_and_attend: Any = functools.partial(kv_cache.append_and_attend, implementation="fa3")
attend: Any = functools.partial(kv_cache.dot_product_attention, implementation="fa3")

ONE: Any = {"N": 32, "K": 8, "H": 128}
BOTH = [
    Case("one, cluster", (1,), (4000,), 64, **ONE),
    Case("one, cluster, T 2", (2,), (333,), 16, **ONE),
    Case("one, long", (1,), (9000,), 64, N=8, H=128),
    Case("eight", (1,) * 8, (700, 1, 0, 33, 64, 65, 3000, 8), 64, **ONE),
    Case("contiguous, four", (1,) * 4, (100, 0, 2000, 7), 2000, **ONE, pages=1, contiguous=True),
    Case("mixed", **RAGGED, N=8, H=128, spare=3),
    Case("prompt", (600,), (3000,), 64, N=8, H=128),
    *(Case(f"layout {x}", **RAGGED, N=8, H=64, layout=x) for x in LAYOUTS),
    Case("e4m3, few", (1,) * 3, (700, 65, 1), 64, N=8, H=128, cache_dtype=E4M3, scales="heads"),
    Case("e4m3, one", (1,), (4000,), 64, **ONE, cache_dtype=E4M3, scales="scalar"),
    Case("e4m3, tokens", **RAGGED, N=8, H=128, cache_dtype=E4M3, scales="tokens"),
    Case("window, split", **RAGGED, N=8, H=128, options={"local_window_size": 100, "split_size": 256}),
]  # fmt: skip


@functools.cache
def both() -> dict[str, Any]:
    """append_and_attend as one call, and as two."""
    arguments = []
    for case in BOTH:
        inputs = Inputs(case, jnp.bfloat16)
        rows = [np.clip(np.nan_to_num(x, neginf=0), -9, 9) for x in new_rows(inputs)]
        call = call_of(inputs, *rows, **rotary(inputs, case.H // 2, False, jnp.float32, False))
        # Angles for each length that there is.
        steps = np.arange(9001)[:, None] * 10.0 ** -np.arange(case.H // 2)
        call |= {"rotary_cos": np.cos(steps), "rotary_sin": np.sin(steps)}
        arguments.append((call, case.options))

    @jax.jit
    def program(arrays: Any, lengths: Any) -> Any:
        found = []
        for (call, options), x, length in zip(arguments, arrays, lengths, strict=True):
            call = {**call, **x, "key_value_seq_lengths": length}
            together = append_and_attend(**call, **options, return_residual=True)
            *caches, query = append(**call)
            where = {k: v for k, v in call.items() if k in WHERE}
            apart = attend(query, *caches, **where, **options, return_residual=True)
            found.append((together, (apart[0], *caches, apart[1])))
        return found

    arrays = [{k: c[k] for k in ("key_cache", "value_cache")} for c, _ in arguments]
    lengths = [jnp.asarray(c["key_value_seq_lengths"], jnp.int32) for c, _ in arguments]
    found = program(arrays, lengths)
    return {case.name: x for case, x in zip(BOTH, found, strict=True)}


WHERE = {"key_value_seq_lengths", "page_table", "cache_rows", "query_starts", "num_sequences"}
WHERE |= {"key_scale", "value_scale", "kv_layout"}


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_together_as_apart(case: Case):
    """Bit by bit."""
    together, apart = both()[case.name]
    for x, y in zip(together, apart, strict=True):
        assert x is None is y or equal(x, y)
    assert not np.isnan(np.asarray(together[0], np.float32)).any()


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_attention_sees_what_is_appended(batch: int):
    """Each step's own key has all the weight, so its result is its own value, step after step."""
    steps, length, heads, dim = 120, 4096, 8, 128
    pages = batch * length // 64
    table = jax.random.permutation(jax.random.key(0), pages).reshape(batch, -1).astype(jnp.int32)
    caches = tuple(jnp.zeros((pages, 64, heads, dim), jnp.bfloat16) for _ in range(2))

    @functools.partial(jax.jit, donate_argnums=0)
    def program(caches: Any) -> Any:
        def step(caches: Any, i: Any) -> Any:
            row = 32 * jax.nn.one_hot(i, dim, dtype=jnp.bfloat16)
            query = jnp.broadcast_to(row, (batch, 1, 4 * heads, dim))
            key = query[:, :, :heads]
            value = jnp.full_like(key, 1) * i.astype(jnp.bfloat16)
            lengths = jnp.full(batch, length - steps + 1, jnp.int32) + i
            new = query, key, value
            out, *caches = append_and_attend(*new, *caches, lengths, page_table=table)  # pyright: ignore
            return tuple(caches), out

        return jax.lax.scan(step, caches, jnp.arange(steps, dtype=jnp.int32))

    _, out = program(caches)
    out = np.asarray(out, np.float32)
    wanted = np.broadcast_to(np.arange(steps).reshape(-1, 1, 1, 1, 1), out.shape)
    np.testing.assert_array_equal(out, wanted)
