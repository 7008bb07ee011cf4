"""The benchmark of context parallelism without a GPU: it runs, checks, and prints."""

import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from lowering import hide_gpus

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind an installed jax_fa3

from benchmarks import __main__ as command
from benchmarks import ring, ring_tables
from benchmarks.check import WrongResult

SMALL = ring.RingPoint(64, "fwd+bwd", (8, 2), 16, "xla")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    hide_gpus(monkeypatch)
    monkeypatch.setattr(ring, "LINK_BYTES", 64)


def test_measures_checks_and_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ring, "GPUS", (2, 8))
    monkeypatch.setattr(ring, "flusher", lambda: lambda: None)
    monkeypatch.setattr(ring, "environment", dict)
    monkeypatch.setattr(ring, "gpu_state", lambda _: {})
    monkeypatch.setitem(ring_tables.BARS, (8, 64), 0.9)
    file = tmp_path / "ring.json"
    ring.main([SMALL], 1, file)
    printed = capsys.readouterr().out
    report = json.loads(file.read_text(encoding="utf-8"))
    results = report["points"][0]["results"]
    two = ["alone 2", "ring 2", "all_gather 2", "all_to_all 2"]
    eight = [x.replace("2", "8") for x in two]
    assert list(results) == [*two, *eight, "heads_and_ring 8"]
    assert results["alone 2"]["of_ideal"] == 1 and results["ring 2"]["ms"] > 0
    assert all(record["temporary_bytes"] > 0 for record in results.values())
    assert report["link_gb_per_s"] > 0
    lines = printed.splitlines()
    assert [x.split(" | ")[-2] for x in lines[2:11]] == ["–"] * 5 + ["0.90"] * 4
    assert "| fwd+bwd-d16-causal-s64, heads_and_ring | 8 | " in printed
    assert command.main(["--suite", "ring", "--table", str(file)]) == 0
    assert capsys.readouterr().out == printed.rstrip("\n") + "\n"
    grid = ring_tables.grid(report).splitlines()
    assert grid[0] == "| TFLOP/s per GPU (of ideal) | 2 GPUs, 0k | 8 GPUs, 0k |"
    assert grid[-2].startswith('| forward and backward, heads over 2, `"ring"` | – | ')
    assert grid[-1] == "| the bar | – | (0.90) |"


def test_two_levels_split_heads_between_neighbours():
    layout = ring.Layout("heads_and_ring", 8)
    assert (layout.ring, layout.zigzag) == (4, True)
    ids = np.vectorize(lambda device: device.id)(layout.sharding.mesh.devices)
    assert ids.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    x = jnp.arange(64.0).reshape(1, 16, 4, 1)
    wanted = np.array([0, 5, 15])
    for strategy in ("alone", *ring.STRATEGIES):
        layout = ring.Layout(strategy, 8)
        np.testing.assert_array_equal(layout.rows(layout.put(x), wanted), x[0, wanted])
    assert [x.strategy for x in ring.layouts(2, ["heads_and_ring", "ring"])] == ["alone", "ring"]


@pytest.mark.parametrize("wrong", range(4))
def test_wrong_results_are_refused(wrong, monkeypatch):
    monkeypatch.setattr(ring, "check_forward", lambda *_, **__: 0.0)
    alone, other = ring.Layout("alone", 2), ring.Layout("ring", 2)
    found = [jnp.ones((1, 64, 4, 2))] * 4
    results = {layout: [layout.put(x) for x in found] for layout in (alone, other)}
    kept: Any = {}
    ring._check(SMALL, results, (), kept)
    # One row of out, or all of a gradient.
    change = 1 + 0.1 * (jnp.arange(64) == 7)[:, None, None] if wrong == 0 else 1.1
    results[other][wrong] = other.put(found[wrong] * change)
    what = ("out", "gradient of query", "gradient of key", "gradient of value")[wrong]
    with pytest.raises(WrongResult, match=f"ring 2: {what} is off by 10.0%"):
        ring._check(SMALL, {other: results[other]}, (), kept)


def test_long_calls_alone_run_once(monkeypatch):
    ran: list[str] = []
    monkeypatch.setattr(
        ring,
        "_wall_time",
        lambda call, calls: ring.Timing(ran.append(f"{call} {calls}") or 7.0, ()),
    )
    first = {"alone 2": 9000.0, "ring 2": 4000.0}
    times = ring._timed({x: x for x in first}, first, 20, lambda: None)  # pyright: ignore
    assert times == {"alone 2": [9000.0] * 5, "ring 2": [7.0] * 5} and ran == ["ring 2 1"] * 5
    ran.clear()
    first = {"alone 2": 100.0, "ring 2": 50.0}
    times = ring._timed({x: x for x in first}, first, 20, lambda: None)  # pyright: ignore
    assert set(ran) == {"alone 2 3", "ring 2 3"} and len(ran) == 2 * 20


def test_points(capsys):
    assert command.main(["--suite", "ring", "--list", "--points", "*s131072"]) == 0
    assert capsys.readouterr().out.split() == [
        "fwd-d128-causal-s131072",
        "fwd+bwd-d128-causal-s131072",
    ]
    assert ring.points()[1].flops() == 3.5 * 2 * 32 * 2**30 * 128
    with pytest.raises(SystemExit):
        command.main(["--suite", "ring,paper"])
