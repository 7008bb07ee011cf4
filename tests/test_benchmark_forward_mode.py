"""The benchmark of forward mode without a GPU: it runs, checks, and prints."""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind an installed jax_fa3

import jax_fa3
from benchmarks import __main__ as command
from benchmarks import forward_mode
from benchmarks.check import WrongResult
from benchmarks.mean_flow import Sizes

pytestmark = pytest.mark.usefixtures("on_cpu")
SMALL = [forward_mode.Tangents(128, True, 64), forward_mode.Step(Sizes(2, 64, 2, 128, 2))]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(forward_mode, "ours", jax_fa3.dot_product_attention)
    monkeypatch.setattr(forward_mode, "WIDTH", 256)
    for name in ("environment", "flusher"):
        monkeypatch.setattr(forward_mode, name, dict)
    monkeypatch.setattr(forward_mode, "gpu_state", lambda _: {})
    times = lambda calls, rounds, _: {name: [1.0 + i] * rounds for i, name in enumerate(calls)}
    monkeypatch.setattr(forward_mode, "in_rounds", times)


def test_measures_checks_and_prints(tmp_path, capsys):
    file = tmp_path / "forward_mode.json"
    forward_mode.main(SMALL, 2, file)
    capsys.readouterr()
    assert command.main(["--suite", "forward-mode", "--table", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "| d128-causal-s64 | 1.000 | 2.000 (2.00) | 3.000 (3.00) | 4.000 (4.00) | " in printed
    assert "| mean-flow-s64 | 1.0 | 2.0 | 2.00 |" in printed
    assert len(json.loads(file.read_text(encoding="utf-8"))["points"]) == 2


@pytest.mark.parametrize("point", SMALL, ids=lambda p: p.name)
def test_wrong_results_are_refused(point: Any, monkeypatch):
    wrong = functools.partial(jax_fa3.dot_product_attention, scale=1.0)
    monkeypatch.setattr(forward_mode, "ours", wrong)
    with pytest.raises(WrongResult, match="off by"):
        forward_mode.check(point, point.calls())


def test_names():
    assert [p.name for p in forward_mode.points(["mean-flow*"])] == ["mean-flow-s4096"]
    assert len(forward_mode.points(["d*-s4096"])) == 6
