"""Terms of the scores that heads have, on a Hopper GPU, and their gradients. What one of them has alone:
test_gpu_alibi, test_gpu_relative_bias."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from biases import PAST, with_gradients
from cases import CAUSAL, Case
from helpers import equal
from masks import documents, packed
from score_terms import TERMS, assert_gradient, check, kernels, term_of

import jax_fa3

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("name", TERMS)]

WINDOW: dict[str, Any] = {"local_window_size": (40, 3)}
CASES = [
    Case("causal", H=128, mask=CAUSAL),
    Case("full", 300, 333, 8, 2, H=64, B=1),
    Case("window", 300, 333, 6, 6, H=128, mask=WINDOW),
    Case("long", 1500, 1500, H=64, B=1, mask=CAUSAL),
    Case("long", 700, 1900, 4, 4, H=128, B=1),
    Case("planted", B=3, H=64, mask=PAST, planted=True),
    Case("planted", B=3, H=128, mask=PAST, planted=True),
    Case("documents", 200, 200, H=128, B=1, mask=packed(documents(50, 40, 60, 50))),
    Case("broken run", 200, 200, B=1, mask=packed(documents(50, 40, 60, 50, ids=(0, 1, 0, 2)))),
    Case("sinks", H=128, mask=CAUSAL, sinks=(0.0, -2.0, 3.0, 1.5)),
    Case("one row", 1, 300),
    Case("heads", 150, 270, 6, 2, H=104, V=72),
    Case("heads", 150, 270, 6, 2, H=96, mask=CAUSAL),
    Case("heads", 150, 270, 6, 2, H=80),
    Case("heads", 150, 270, 16, 1, H=128, mask=CAUSAL),
]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.H}")
def test_table(name: str, case: Case, dtype: Any):
    check(name, case, (*case.inputs(dtype), term_of(name, case)))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("values", ["means", "small", "large"])
def test_values(name: str, values: str, head_dim: int):
    case = Case(values, 300, 333, H=head_dim, mask=CAUSAL)
    change: Any = {
        "means": lambda x: 1 + 0.3 * x, "small": lambda x: 1e-3 * x, "large": lambda x: 30 * x,
    }[values]  # fmt: skip
    check(name, case, (*map(change, case.inputs(jnp.bfloat16)), term_of(name, case)))


def test_packed_array(name: str):
    case = Case("packed", 200, 200, 4, 4, H=64, mask=CAUSAL)

    def packed(q: Any, k: Any, v: Any, term: Any) -> Any:
        options: Any = {"implementation": "fa3", "return_residual": True, name: term}
        return jax_fa3.qkv_dot_product_attention(jnp.stack((q, k, v), 2), **CAUSAL, **options)

    check(name, case, (*case.inputs(jnp.bfloat16), term_of(name, case)), packed)


def test_under_vmap(name: str):
    case = Case("vmap", 100, 130, H=64)
    *tensors, term = *case.inputs(jnp.bfloat16), term_of(name, case)
    call = functools.partial(with_gradients, kernels(name, case, deterministic_backward=True))
    cotangents = case.cotangents(jnp.bfloat16)
    of_both = jnp.stack((term, -term / 8))
    found = jax.jit(jax.vmap(call, (None, None, None, None, 0)))(cotangents, *tensors, of_both)
    for i, x in enumerate(of_both):
        entry = jax.tree.map(lambda y, i=i: y[i], found)
        assert equal(entry.results, jax.jit(call)(cotangents, *tensors, x).results)
        assert_gradient(name, entry.dbias, case, (*tensors, x), cotangents)
