"""jax_fa3.kv_cache.append_and_attend against writing row by row and attending; what it is on CUDA."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from kv_cases import E4M3, Case, Inputs, assert_right
from lowering import hide_gpus, lower, operations, targets
from modes import strict
from test_kv_cache_append import MIXED, WINDOW, append, new_rows, written

from jax_fa3 import _targets, kv_cache

append_and_attend: Any = kv_cache.append_and_attend


@pytest.mark.parametrize("case", [Case("", **MIXED, **WINDOW, layout="lanes"), Case("", (2,) * 3, (3, 17, 0), pages=2, contiguous=True)])  # fmt: skip
def test_append_and_attend(case: Case):
    """The new rows are seen; the window's skipped rows are written too."""
    inputs = Inputs(case, jnp.float32)
    key, value = (np.nan_to_num(x, neginf=0) for x in new_rows(inputs))
    key[0, 0, 0] = 1
    arguments = inputs.arguments()
    caches = [arguments.pop(name) for name in ("key_cache", "value_cache")]
    new = (jnp.asarray(inputs.shaped(x), jnp.float32) for x in (key, value))
    with strict():
        out, *found, lse = append_and_attend(
            arguments.pop("query"), *new, *caches, **arguments, return_residual=True
        )
    for x, y in zip(found, written(inputs, key, value), strict=True):
        if x is not None:
            np.testing.assert_array_equal(x, y)
    assert_right(inputs, (out, lse))


def test_append_and_attend_rotates_both():
    """As attention at positions that are only relative."""
    rng = np.random.default_rng(0)
    x = [jnp.asarray(rng.normal(size=(1, 6, 2, 8)), jnp.float32) for _ in range(3)]
    angles = np.arange(40)[:, None] * 10.0 ** -np.arange(4)
    tables = {"rotary_cos": np.cos(angles), "rotary_sin": np.sin(angles)}
    cache = jnp.zeros((1, 8, 2, 8))
    out, *_ = append_and_attend(*x, cache, cache, [6], **tables)
    later = np.arange(6)[None] + 30
    moved, *_ = append_and_attend(*x, cache, cache, [6], **tables, positions=later)
    np.testing.assert_allclose(out, moved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["NHD", "lanes"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, E4M3])
def test_is_one_call_on_cuda(layout: str, dtype: Any, monkeypatch: pytest.MonkeyPatch):
    """Whose results are its operands, and nothing moves them, or anything else."""
    hide_gpus(monkeypatch)
    case = Case("", **MIXED, H=64, V=64, layout=layout, spare=2, cache_dtype=dtype)
    inputs = Inputs(case, jnp.bfloat16)
    arguments = {"query": None, **inputs.arguments()}
    new = (jnp.zeros((case.rows + 2, case.K, 64), jnp.bfloat16) for _ in range(2))
    arguments |= dict(zip(("key", "value"), new, strict=True))
    arguments |= dict.fromkeys(("rotary_cos", "rotary_sin"), jnp.ones((100, 16)))
    static = {"kv_layout": layout}
    arrays = {k: x for k, x in arguments.items() if k not in static}
    for function, target in (
        (append_and_attend, _targets.APPEND_AND_ATTEND),
        (append, _targets.APPEND),
    ):
        text = lower(lambda x, function=function: function(**x, **static), arrays)
        assert targets(text) == [target]
        assert operations(text) - {"output_operand_alias"} <= {
            "custom_call",
            "reshape",
            "broadcast_in_dim",
        }
        assert text.count("output_operand_alias<") == (2 if layout == "NHD" else 1)
