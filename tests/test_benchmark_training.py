"""benchmarks/training.py on a CPU, with a tiny model."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

for name in ("flax", "optax", "orbax.checkpoint"):
    pytest.importorskip(name)

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind an installed jax_fa3

from benchmarks import report as reports
from benchmarks import training, training_mesh


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


def test_on_a_mesh(tmp_path, monkeypatch):
    """Grouped heads, two key/value heads over four devices among them: the losses of one device."""
    monkeypatch.setattr(training.example, "ATTENTION", dict(training.example.ATTENTION))

    def losses(*options: str) -> list[float]:
        file = tmp_path / "mesh.json"
        command = ["--size", "tiny", "--implementations", "xla", "--rounds", "1", "--heads", "8"]
        training.main([*command, "--kv-heads", "2", "--json", str(file), *options])
        report = json.loads(file.read_text())
        assert report["mesh"] == (options[1] if options else None)
        return [x["loss"] for x in report["steps"].values()]

    assert losses("--mesh", "2x4") == pytest.approx(losses(), rel=1e-2)


def test_what_a_mesh_splits():
    mesh = training_mesh.make_mesh("2x4")
    config = dataclasses.replace(training.example.SIZES["tiny"], heads=8, kv_heads=2)
    state = training_mesh.put_state(mesh, training.example.initialize(config))
    block = state["params"]["blocks"]
    attention = block["MultiHeadAttention_0"]
    parts = {name: x["kernel"].addressable_shards[0].data.shape for name, x in attention.items()}
    assert parts == {
        "query": (1, 64, 2, 8),
        "key": (1, 64, 2, 8),  # two heads do not go over four devices
        "value": (1, 64, 2, 8),
        "out": (1, 2, 8, 64),
    }
    wide = [block[x]["kernel"].addressable_shards[0].data.shape for x in ("Dense_0", "Dense_1")]
    assert wide == [(1, 64, 64), (1, 64, 64)]
    with pytest.raises(ValueError, match="--mesh: got 4x4, wanted at most 8 devices"):
        training_mesh.make_mesh("4x4")


def test_cudnn_with_fewer_heads_than_devices(monkeypatch):
    seen: Any = {}
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *x, **y: seen.update(y, x=x))
    key = jnp.arange(2.0).reshape(1, 1, 2, 1)
    training_mesh.cudnn(4)(key, key, key, is_causal=True)
    assert seen["implementation"] == "cudnn" and seen["is_causal"]
    assert seen["x"][1].ravel().tolist() == seen["x"][2].ravel().tolist() == [0, 0, 1, 1]


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
