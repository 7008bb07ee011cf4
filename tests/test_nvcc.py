"""cmake/nvcc.py: what it makes of ptxas's words, and what fails a strict build."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parent.parent / "cmake" / "nvcc.py"
GOOD = """\
ptxas info    : Compiling entry function 'good' for 'sm_90a'
ptxas info    : Function properties for good
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""
SPILLS = GOOD.replace("good", "spills").replace("0 bytes spill stores", "16 bytes spill stores")
ADVICE = "ptxas info    : (%s) Potential Performance Loss: wgmma.mma_async instructions are %s"


@pytest.fixture(scope="module")
def nvcc() -> Any:
    spec = importlib.util.spec_from_file_location("nvcc", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_numbers(nvcc):
    assert nvcc.parse(GOOD + SPILLS) == {
        "good": {"registers": 168, "spilled": 0, "serialised": False},
        "spills": {"registers": 168, "spilled": 16, "serialised": False},
    }


@pytest.mark.parametrize("code", ["C7510", "C7511", "C7514", "C7515", "C7517", "C7520"])
@pytest.mark.parametrize("names_it", [True, False])
def test_serialised_for_any_reason(nvcc, code: str, names_it: bool):
    """With the function's name, or after the line that names it."""
    reason = "serialized due to a reason" + " in the function 'slow'" * names_it
    log = GOOD.replace("good", "slow") + ADVICE % (code, reason)
    assert nvcc.parse(log)["slow"]["serialised"]
    assert len(nvcc.faults(nvcc.parse(GOOD + log), "")) == 1


def test_strict(nvcc):
    found = nvcc.faults(nvcc.parse(GOOD + SPILLS), "")
    assert len(found) == 1 and "spills" in found[0] and "16" in found[0]
    assert nvcc.faults(nvcc.parse(GOOD + SPILLS), "spills  # a reason\n") == []
