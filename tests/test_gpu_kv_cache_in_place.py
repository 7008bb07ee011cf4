"""No copy of a cache in what XLA compiles for GPUs, where attention has its kernel."""

import functools
from typing import Any

import jax.numpy as jnp
import pytest
from test_kv_cache_in_place import FORMS, caches_of, in_place, scan

pytestmark = pytest.mark.gpu
LARGE = 200  # times what a CPU needs: the workspace is smaller than that


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_no_copy(form: Any):
    in_place(functools.partial(form, layout="NHD"), caches_of("NHD", jnp.bfloat16, LARGE))


@pytest.mark.parametrize("layout", ["HND", "interleaved", "lanes"])
def test_no_copy_in_other_layouts(layout: str):
    in_place(functools.partial(scan, layout=layout), caches_of(layout, jnp.bfloat16, LARGE))
