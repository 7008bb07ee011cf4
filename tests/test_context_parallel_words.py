"""Numbers as words of 32 bits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_fa3.context_parallel._words import from_words, to_words


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("columns", [0, 5, 8])
def test_words(dtype, columns: int):
    """Those of memory, with a 0 behind an odd number of 16 bits; every bit comes back."""
    rng = np.random.default_rng(columns)
    x = rng.integers(0, 256, (2, 3, columns * jnp.dtype(dtype).itemsize), np.uint8).view(dtype)
    words = to_words(jnp.asarray(x))
    padded = np.pad(x.view(np.uint8), [(0, 0), (0, 0), (0, -x.nbytes // 6 % 4)])
    np.testing.assert_array_equal(words, padded.view(np.uint32))
    more = jnp.concatenate([words, words], axis=-1)
    back = np.asarray(from_words(more, dtype, columns))
    assert back.dtype == dtype
    np.testing.assert_array_equal(back.view(np.uint8), x.view(np.uint8))
