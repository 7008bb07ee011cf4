"""The scaling benchmark without a GPU: whom it calls, and how records become a share of ideal."""

import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind an installed jax_fa3

from benchmarks import __main__ as command
from benchmarks import scaling


def test_slowest_gpu_from_the_records_of_all():
    records = [("bwd", 3.0), ("pre", 0.2), ("pre", 0.1), ("bwd", 2.0)]
    assert scaling.slowest(records, 1) == pytest.approx(5.3)
    assert scaling.slowest(records, 2) == pytest.approx(3.2)


def test_measure():
    """Two devices: one GPU alone takes 1 ms, the other 2 ms, both together 2.5 ms."""
    devices = jax.local_devices(backend="cpu")[:2]

    def records(call):
        used = call.args[0].sharding.device_set
        assert call.args[0].size == 2 * 16 * 2 * 8 * len(used)
        return [("fwd", 1.0 if used == {devices[0]} else 2.5 if len(used) == 2 else 2.0)] * len(
            used
        )

    options = {"counts": (2, 4), "shape": (2, 16, 2, 8), "records": records}
    results = list(scaling.measure(devices, 2, lambda: None, **options))
    assert [(r["gpus"], r["split"], r["of_ideal"]) for r in results] == [
        (2, split, 0.8) for split in ("batch", "heads") * 2
    ]
    assert scaling.markdown(results).count("| 2.500 ms | 0.800 |") == 4


def test_command_needs_gpus(monkeypatch, capsys):
    monkeypatch.setattr(command, "why_not_here", lambda: "no GPU")
    assert command.main(["--suite", "scaling"]) == command.NO_GPU
    assert "no GPU" in capsys.readouterr().err


def test_table_of_a_file(capsys, monkeypatch):
    monkeypatch.setattr(command, "why_not_here", lambda: "no GPU")
    file = ROOT / "benchmarks" / "results" / "scaling.json"
    assert command.main(["--suite", "scaling", "--table", str(file)]) == 0
    rows = capsys.readouterr().out.splitlines()[4:]
    assert len(rows) == 8 and all(row.count("|") == 6 for row in rows)
