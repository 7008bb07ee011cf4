"""The kernels under compute-sanitizer; as a script, the calls that it watches."""

import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.dlpack
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TABLE
from helpers import with_gradients
from kv_cases import E4M3, Case, Inputs
from kv_cases import run as run_cache
from masks import ints
from test_kv_cache_modes import MISTAKES

import jax_fa3
from jax_fa3 import kv_cache

pytestmark = pytest.mark.gpu

NAMES = [
    "65x63",
    "T = 0",
    "soft cap, lengths",
    "hostile offsets",
    "hostile lengths",
    "planted, all keys",
    "documents, broken run, causal",
    "out of range",
    "head dims 40, 40",
    "head dims 192, 128",
    "head dims 256, 256",
]
attention = functools.partial(
    jax_fa3.dot_product_attention, implementation="fa3", return_residual=True
)


@pytest.mark.parametrize(
    ("tool", "what", "clean"),
    [
        ("memcheck", "bfloat16", True),
        ("memcheck", "float16", True),
        ("memcheck", "caches", True),
        ("memcheck", "appends", True),
        ("memcheck", "overrun", False),
        ("synccheck", "bfloat16", True),
        ("synccheck", "float16", True),
        ("synccheck", "caches", True),
    ],
)
def test_sanitizer(tool: str, what: str, clean: bool):
    """No error in small cases; and where a buffer is too short on purpose, memcheck says so."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer on the PATH")
    if not clean:
        pytest.importorskip("cupy", reason="needs cupy, for an array that lies about its size")
    command = [sanitizer, "--tool", tool, sys.executable, __file__, what]
    # One allocation per buffer: an overrun within XLA's pool would go unseen.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    summary = re.search(r"ERROR SUMMARY: (\d+) error", run.stdout)
    assert summary is not None, f"exit {run.returncode}: {run.stdout[-3000:]}{run.stderr[-3000:]}"
    if clean:
        assert "all calls made" in run.stdout, run.stdout[-3000:] + run.stderr[-3000:]
    assert (summary[1] == "0") == clean, run.stdout[-5000:]


def call_table(dtype: str) -> None:
    for case in TABLE:
        if case.name in NAMES:
            call = functools.partial(attention, **case.arguments)
            run = jax.jit(functools.partial(with_gradients, call))
            jax.block_until_ready(run(case.cotangents(dtype), *case.inputs(dtype)))
    print("all calls made")


def call_caches() -> None:
    """Attention over caches; then with what lengths, tables and starts should not say."""
    wide: Any = {"H": 64, "pages": 5, "ragged": True, "spare": 3}
    for count in (1, 40):
        for other in ({}, {"cache_dtype": E4M3, "scales": "tokens"}):
            inputs = Inputs(Case("", (count,) * 3, (count, 80, 50), **wide, **other), jnp.bfloat16)
            arguments = {**inputs.arguments(), "implementation": "fa3"}
            jax.block_until_ready(run_cache(arguments))
            for name, place, value in MISTAKES.values():
                changed = np.array(arguments[name])
                changed[place] = value
                jax.block_until_ready(run_cache({**arguments, name: changed}))
    print("all calls made")


def call_appends() -> None:
    """New rows into caches that end where their memory does; then with what tables and lengths should
    not say."""
    static = ("kv_layout", "implementation")
    append: Any = jax.jit(kv_cache.append, static_argnames=static)
    append_and_attend: Any = jax.jit(kv_cache.append_and_attend, static_argnames=static)
    wide: Any = {"H": 64, "pages": 5, "ragged": True, "spare": 3}
    others: list[Any] = [{}, {"cache_dtype": E4M3, "scales": "tokens"}, {"H": 20, "layout": "HND"}]
    for count in (1, 40):
        for other in others:
            case = Case("", (count,) * 3, (count, 80, 50), **{**wide, **other})
            inputs = Inputs(case, jnp.bfloat16)
            arguments = inputs.arguments()
            query = arguments.pop("query")
            new = dict.fromkeys(("key", "value"), query[:, : case.K])
            angles = dict.fromkeys(("rotary_cos", "rotary_sin"), jnp.ones((80, case.H // 2)))
            arguments |= {**new, **angles, "query": query, "implementation": "fa3"}
            functions = (append, append_and_attend) if case.H % 8 == 0 else (append,)
            for function in functions:
                jax.block_until_ready(function(**arguments))
                for name, place, value in MISTAKES.values():
                    changed = np.array(arguments[name])
                    changed[place] = value
                    jax.block_until_ready(function(**{**arguments, name: changed}))
    print("all calls made")


def call_overrun() -> None:
    """key_end is said to have 2048 numbers, but only 16 of them are its own."""
    cupy = importlib.import_module("cupy")
    cupy.cuda.set_allocator(None)  # one allocation per array
    short = cupy.full(16, 9, cupy.int32)
    end = jax.dlpack.from_dlpack(cupy.ndarray((1, 2048), cupy.int32, memptr=short.data))
    x = jnp.zeros((1, 2048, 1, 64), jnp.bfloat16)
    jax.block_until_ready(attention(x, x, x, key_begin=ints([0] * 2048), key_end=end))


if __name__ == "__main__":
    tables = {dtype: functools.partial(call_table, dtype) for dtype in ("bfloat16", "float16")}
    calls = {"caches": call_caches, "appends": call_appends, "overrun": call_overrun}
    (tables | calls)[sys.argv[1]]()
