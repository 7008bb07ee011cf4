"""The decoding kernel on e4m3 caches, with queries of 16 bits, against the oracle in fp64."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equal
from kv_cases import E4M3, Case, Inputs, run
from kv_gpu import assert_near, twice

pytestmark = pytest.mark.gpu

RAGGED: Any = {"counts": (1, 17, 0, 1, 2, 40, 1), "lengths": (9, 17, 30, 0, 50, 64, 1)}
MIXED: Any = {**RAGGED, "ragged": True, "pages": 5}
PAIR: Any = {"counts": (2, 2), "lengths": (700, 65)}
WIDE: Any = {"N": 8, "H": 128, "cache_dtype": E4M3}


def case(name: str, scales: str, **others: Any) -> Case:
    return Case(f"{name}, {scales or 'none'}", scales=scales, **{**WIDE, **others})


KINDS = "", "scalar", "heads", "sequences", "tokens"
TABLE = [
    *(case("mixed", scales, **MIXED) for scales in KINDS),
    case("spare", "tokens", **MIXED, spare=3),
    *(case(layout, x, **PAIR, layout=layout) for layout in ("HND", "interleaved", "lanes") for x in ("heads", "tokens")),
    *(case(f"page {page}", "tokens", **PAIR, page=page) for page in (8, 24, 64, 256)),
    *(case(f"T {t}", x, counts=(t,) * 3, lengths=(t, 130, 515)) for t in (1, 8, 100) for x in ("sequences", "tokens")),
    *(case(f"group {g}", "tokens", counts=(3,) * 3, lengths=(3, 70, 199), N=2 * g) for g in (1, 7, 72)),
    *(case("one long", x, counts=(1,), lengths=(9000,), page=64) for x in ("scalar", "tokens")),
    case("contiguous", "tokens", counts=(1,) * 3, lengths=(1001, 3, 500), page=1001, pages=1, contiguous=True),
    case("window", "tokens", **PAIR, options={"local_window_size": 300}),
    case("soft cap", "tokens", **PAIR, options={"logits_soft_cap": 0.7, "scale": 0.9}),
    case("sinks, left padding", "heads", **PAIR, options={"sinks": np.linspace(-1, 2, 8), "key_begin": [4, 2]}),
    case("values of one sign", "tokens", **PAIR, values=(1, 0.3)),
    case("large values", "sequences", **PAIR, values=(0, 30)),
    case("small values", "tokens", **PAIR, values=(0, 0.02)),
    *(case(f"head dims {h}, {v}", "tokens", **PAIR, H=h, V=v) for h, v in ((64, 64), (80, 48), (96, 96), (192, 128), (192, 192), (256, 256))),
    *(case(f"tall, head dims {h}, {v}", "heads", counts=(100,), lengths=(300,), H=h, V=v) for h, v in ((64, 64), (96, 96), (192, 128), (256, 256))),
]  # fmt: skip
FEW: Any = {"counts": (1, 2, 0, 1, 3, 1), "lengths": (9, 170, 30, 0, 501, 1), "ragged": True}
TABLE += [  # of few rows, and scales that are not of positions
    *(case(f"few, page {page}", "heads", **FEW, page=page) for page in (8, 24, 64, 256)),
    case("few, spare", "heads", **FEW, spare=3),
    case("few, no scales", "", **FEW),
    case("few, window", "heads", **FEW, options={"local_window_size": 100}),
    case("few, soft cap", "scalar", **FEW, options={"logits_soft_cap": 0.7, "scale": 0.9}),
    case("few, not causal", "heads", **FEW, options={"is_causal": False}),
    case("few, values of one sign", "heads", **FEW, values=(1, 0.3)),
    case("few, small values", "heads", **FEW, values=(0, 0.02)),
    *(case(f"few, group {g}", "heads", counts=(2,) * 3, lengths=(3, 70, 199), N=2 * g) for g in (1, 7, 8)),
    *(case(f"few, head dims {h}, {v}", "heads", **FEW, H=h, V=v) for h, v in ((64, 64), (48, 32), (192, 128), (192, 192), (256, 256))),
    *(case(f"one of {s}", "heads", counts=(1,), lengths=(s,), N=32, K=8) for s in (1, 2000)),
    case("one, d 256", "heads", counts=(2,), lengths=(700,), N=32, K=8, H=256),
]  # fmt: skip
IN_FLOAT16 = [x for x in TABLE if x.scales != "tokens"]


@functools.cache
def in_table(dtype: Any) -> dict[str, Any]:
    return twice(TABLE if dtype == jnp.bfloat16 else IN_FLOAT16, dtype)


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_table(case: Case):
    """With NaN wherever nobody may look, in scales, too."""
    inputs, found, again = in_table(jnp.bfloat16)[str(case)]
    assert_near(inputs, found)
    assert equal(found, again)


@pytest.mark.parametrize("case", IN_FLOAT16, ids=str)
def test_float16(case: Case):
    inputs, found, _ = in_table(jnp.float16)[str(case)]
    assert_near(inputs, found)


def test_scales_of_keys_alone():
    inputs = Inputs(case("", "tokens", **FEW), jnp.bfloat16)
    inputs.scale[1] = np.ones_like(inputs.scale[1])
    del inputs.given_scales["value_scale"]
    assert_near(inputs, run({**inputs.arguments(), "implementation": "fa3"}))


@pytest.mark.parametrize("power", [-60, 60])
def test_queries_of_any_size(power: int):
    """Those of bfloat16 become float16: a row by a power of 2."""
    inputs = Inputs(case("", "heads", **FEW), jnp.bfloat16)
    arguments = {**inputs.arguments(), "implementation": "fa3", "scale": 0.1}
    found = run(arguments)
    arguments["query"] *= 2.0**power
    assert equal(run({**arguments, "scale": 0.1 * 2.0**-power}), found)


def test_every_number_of_the_format():
    """One key is seen, whose value comes back as it is: all 256, subnormal ones and NaN among them."""
    numbers = jnp.arange(256, dtype=jnp.uint8).view(E4M3).reshape(2, 1, 1, 128)
    key = jnp.zeros((2, 1, 1, 128), E4M3)
    query, lengths = jnp.ones((2, 1, 1, 128)), np.array([1, 1])
    for dtype in (jnp.bfloat16, jnp.float16):
        found = run(
            {
                "query": query.astype(dtype),
                "key_cache": key,
                "value_cache": numbers,
                "key_value_seq_lengths": lengths,
                "implementation": "fa3",
            }
        )
        np.testing.assert_array_equal(
            np.asarray(found[0], np.float32).ravel(), np.asarray(numbers, np.float32).ravel()
        )


def test_nan_that_a_row_sees():
    """In a key, a value, or a scale: in that sequence's head alone."""
    inputs = Inputs(case("", "tokens", counts=(1, 1), lengths=(70, 40)), jnp.bfloat16)
    arguments = {**inputs.arguments(), "implementation": "fa3"}
    right = np.asarray(run(arguments)[0], np.float32)
    place = inputs.table[0, 2], 7, 1  # position 39, KV head 1
    for name in ("key_cache", "value_cache", "key_scale", "value_scale"):
        changed = arguments[name]
        changed = jnp.asarray(changed).at[place].set(jnp.nan)
        found = np.asarray(run({**arguments, name: changed})[0], np.float32)
        assert np.isnan(found[0, 0, 4:]).all()
        np.testing.assert_array_equal(found[0, 0, :4], right[0, 0, :4])
        np.testing.assert_array_equal(found[1], right[1])


@pytest.mark.parametrize("scales", ["sequences", "tokens"])
def test_split_size_makes_results_independent_of_the_batch(scales: str):
    counts, lengths = (1, 3, 40, 1), (3000, 600, 900, 77)
    inputs = Inputs(case("", scales, counts=counts, lengths=lengths, ragged=True), jnp.bfloat16)
    arguments = {**inputs.arguments(), "split_size": 256, "implementation": "fa3"}
    out, lse = run(arguments)
    assert_near(inputs, (out, lse))
    for order in ([0], [2], [3, 2, 1, 0]):
        fewer, rows = inputs.chosen(arguments, order)
        if scales == "sequences":
            fewer |= {x: arguments[x][order] for x in ("key_scale", "value_scale")}
        assert equal(run(fewer), (out[rows], lse[rows]))
