"""benchmarks/training.py on a CPU, with a tiny model."""

import json
import sys
from pathlib import Path

import pytest

for name in ("flax", "optax", "orbax.checkpoint"):
    pytest.importorskip(name)

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind an installed jax_fa3

from benchmarks import report as reports
from benchmarks import training


def test_speed(tmp_path, capsys, monkeypatch):
    file, page = tmp_path / "training.json", tmp_path / "benchmarks.md"
    begin, end = reports.markers("benchmark-training")
    page.write_text(f"{begin}\n{end}\n", encoding="utf-8")
    monkeypatch.setattr(training, "PAGE", page)
    training.main(
        ["--size", "tiny", "--implementations", "xla", "--rounds", "2", "--json", str(file)]
        + ["--write-docs"]
    )
    report = json.loads(file.read_text())
    assert set(report["steps"]) == {"xla", "xla, packed"}
    plain, packed = report["steps"]["xla"], report["steps"]["xla, packed"]
    assert len(plain["seconds"]) == len(packed["seconds"]) == 2
    config = training.example.SIZES["tiny"]
    pairs = config.rows * config.length * (config.length + 1) / 2
    attention = 12 * pairs * config.width * config.layers
    assert attention < plain["flops"] and packed["flops"] <= plain["flops"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("| xla | ") and lines[-2].endswith("| - | 1.000 |")
    assert lines[-1].startswith("| xla, packed | ")
    table = "\n".join(lines[-4:])
    assert page.read_text(encoding="utf-8") == f"{begin}\n{table}\n{end}\n"


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(training, "why_not_here", lambda: "no GPU")
    for options in ([], ["--curves"], ["--size", "tiny"]):
        with pytest.raises(SystemExit) as stopped:
            training.main(options)
        assert stopped.value.code == training.NO_GPU and capsys.readouterr().err == "no GPU\n"


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "curves.json", tmp_path / "curves.png"
    training.main(
        ["--curves", "--size", "tiny", "--implementations", "xla,fp8"]
        + ["--json", str(file), "--plot", str(picture)]
    )
    losses = json.loads(file.read_text())["losses"]
    assert [len(x) for x in losses.values()] == [3, 3]
    assert losses["xla"][0] == pytest.approx(losses["fp8"][0], rel=1e-2)
    assert losses["xla"] != losses["fp8"]
    assert picture.read_bytes().startswith(b"\x89PNG")
