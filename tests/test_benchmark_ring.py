"""The benchmark of context parallelism without a GPU: it runs, checks, and prints."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from lowering import hide_gpus

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind an installed jax_fa3

from benchmarks import __main__ as command
from benchmarks import ring
from benchmarks.check import WrongResult

SMALL = ring.RingPoint(64, "fwd+bwd", (4, 2), 16, "xla")


def test_measures_checks_and_prints(tmp_path, capsys, monkeypatch):
    hide_gpus(monkeypatch)
    monkeypatch.setattr(ring, "GPUS", (2,))
    monkeypatch.setattr(ring, "flusher", lambda: lambda: None)
    monkeypatch.setattr(ring, "environment", dict)
    monkeypatch.setattr(ring, "gpu_state", lambda _: {})
    file = tmp_path / "ring.json"
    ring.main([SMALL], 1, file)
    printed = capsys.readouterr().out
    results = json.loads(file.read_text(encoding="utf-8"))["points"][0]["results"]
    assert list(results) == ["alone 2", "ring 2", "all_gather 2", "all_to_all 2"]
    assert results["alone 2"]["of_ideal"] == 1 and results["ring 2"]["ms"] > 0
    assert "| fwd+bwd-d16-causal-s64, ring | 2 | " in printed
    assert command.main(["--suite", "ring", "--table", str(file)]) == 0
    assert capsys.readouterr().out == printed.rstrip("\n") + "\n"


def test_wrong_gradients_are_refused(monkeypatch):
    monkeypatch.setattr(ring, "check_forward", lambda *_: 0.0)
    right = [jnp.ones((2, 2))] * 4
    results = {"alone 2": right, "ring 2": [*right[:3], 1.1 * right[3]]}
    with pytest.raises(WrongResult, match="ring 2: gradient of value is off by 10.0%"):
        ring._check(SMALL, results, ())


def test_points(capsys):
    assert command.main(["--suite", "ring", "--list", "--points", "*s131072"]) == 0
    assert capsys.readouterr().out.split() == [
        "fwd-d128-causal-s131072",
        "fwd+bwd-d128-causal-s131072",
    ]
    assert ring.points()[1].flops() == 3.5 * 2 * 32 * 2**30 * 128
    with pytest.raises(SystemExit):
        command.main(["--suite", "ring,paper"])
