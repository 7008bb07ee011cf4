"""For tests that need no GPU: reads what a function lowers to, and hides the machine's GPUs."""

import re
from typing import Any

import jax
import pytest

from jax_fa3 import _dispatch, _ffi


def lower(function: Any, *args: Any, platform: str = "cuda") -> str:
    """The function's StableHLO for this platform."""
    traced = jax.jit(function).trace(*args)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def targets(text: str) -> list[str]:
    """The custom calls to jax_fa3's targets, in order."""
    return re.findall(r"custom_call @(jax_fa3[\w.]*)", text)


def operations(text: str) -> set[str]:
    """The names of all StableHLO operations, but those that are no work at run time."""
    return set(re.findall(r"stablehlo\.(\w+)", text)) - {"constant", "case", "return"}


def hide_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without GPUs, where kernels were not built; lowering for CUDA works there."""
    monkeypatch.setattr(_ffi, "_C", None)
    monkeypatch.setattr(_dispatch, "compute_capabilities", set)
