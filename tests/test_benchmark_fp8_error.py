"""The FP8 error table on a CPU, in small."""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind an installed jax_fa3

from benchmarks import __main__ as command
from benchmarks import fp8_error, fp8_inputs, report
from benchmarks.check import WrongResult


def test_error_table(tmp_path, capsys, monkeypatch):
    make = partial(fp8_error.ErrorPoint, heads=2, seeds=2, implementation="xla")
    points = [make("outliers", 64, 256), make("spread", 32, 128), make("mean1", 64, 256)]
    monkeypatch.setattr(fp8_error, "SCORES", 2**15)  # half of the queries, and
    monkeypatch.setattr(fp8_error, "SCORES_AT_ONCE", 2**14)  # in two blocks
    monkeypatch.setattr(fp8_error, "environment", dict)
    file = tmp_path / "error.json"
    measured = fp8_error.main(points, file)
    assert json.loads(file.read_text(encoding="utf-8")) == measured
    outliers, spread, mean = (r["rmse"] for r in measured["points"])
    assert [r["rows"] for r in measured["points"]] == [128, 128, 128]
    assert list(mean) == ["fp16", "FP8", "FP8, means left", "FP8, e4m3 already"]
    assert mean["fp16"] < mean["FP8"] < mean["FP8, means left"]
    found = measured["points"][2]["found_over_true"]
    assert all(abs(x - 1) < 0.01 for x in found.values())
    for rmse in (outliers, spread):
        assert list(rmse) == list(fp8_error.VARIANTS)
        assert 0 < rmse["fp16"] < rmse["fp16, standard attention"] < rmse["FP8"] / 10
    assert outliers["FP8"] < outliers["FP8, neither (baseline)"]

    names = [p.name for p in points]
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines()] == names
    page = tmp_path / "benchmarks.md"
    begin, end = report.markers("benchmark-fp8-error")
    page.write_text(f"{begin}\n{end}\n", encoding="utf-8")
    monkeypatch.setattr(command, "PAGE", page)
    arguments = ["--suite", "fp8-error", "--table", str(file), "--write-docs"]
    assert command.main(arguments) == 0
    table = capsys.readouterr().out
    assert page.read_text(encoding="utf-8") == f"{begin}\n{table}{end}\n"
    assert "| 64 | 256 | " in table and "| 32 | 128 | " in table


def test_error_is_that_of_fp64(monkeypatch):
    """The reference agrees with NumPy in fp64; what is not finite is refused."""
    p = fp8_error.ErrorPoint("outliers", 32, 64, heads=2, seeds=1, implementation="xla")
    inputs = fp8_inputs.draw(0, p.inputs, p.rows, p.seqlen, p.heads, p.head_dim)
    q, k, v = (np.asarray(x, np.float64)[0] for x in inputs)
    scores = np.einsum("tnh,snh->nts", q, k) / 32**0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    truth = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v)
    with jax.enable_x64(True):
        found = fp8_error._in_fp64(*inputs)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found[0], truth, rtol=1e-12, atol=1e-13)

    def broken(*qkv, implementation):
        return qkv[0] * jnp.nan

    monkeypatch.setattr(fp8_error, "VARIANTS", {"broken": (None, broken)})
    with pytest.raises(WrongResult, match="broken: the error is nan"):
        fp8_error.measure(p)


def test_inputs():
    p = fp8_error.ErrorPoint("outliers", 64, 1024, heads=4)
    x = np.concatenate(
        [
            np.asarray(x, np.float64).ravel()
            for x in fp8_inputs.draw(0, p.inputs, p.rows, p.seqlen, p.heads, p.head_dim)
        ]
    )
    assert np.var(x) == pytest.approx(1 + 100 * 0.001, rel=0.02)
    assert np.mean(np.abs(x) > 6) == pytest.approx(0.001 * 0.551, rel=0.2)
    key = np.asarray(
        fp8_inputs.draw(0, "spread", p.rows, p.seqlen, p.heads, p.head_dim)[1], np.float64
    )[0]
    magnitudes = np.log10(np.sqrt(np.mean(key**2, axis=(1, 2))))  # of each token
    quantiles = np.quantile(magnitudes, (0.02, 0.25, 0.5, 0.75, 0.98))
    np.testing.assert_allclose(quantiles, (-1.96, -1.5, -1, -0.5, -0.04), atol=0.1)


def test_inputs_like_those_of_models():
    def drawn(kind: str) -> list[np.ndarray]:
        return [np.asarray(x, np.float64)[0] for x in fp8_inputs.draw(0, kind, 64, 2048, 2, 64)]

    assert np.mean(drawn("mean0.5")[2]) == pytest.approx(0.5, abs=0.01)
    channels = np.mean(drawn("channels")[1], axis=(0, 1))
    np.testing.assert_allclose(channels[[3, 35]], (20, -20), atol=0.1)
    assert np.abs(np.delete(channels, [3, 35])).max() < 0.1
    query, key, _ = drawn("sink")
    scores = np.einsum("tnh,snh->nts", query, key) / 8
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    assert 0.6 < np.mean(weights[..., 0] / weights.sum(-1)) < 0.95


def test_error_points(capsys, monkeypatch):
    assert command.main(["--suite", "fp8-error", "--list", "--points", "*d128-s8192"]) == 0
    kinds = [name.split("-")[0] for name in capsys.readouterr().out.split()]
    assert kinds == list(fp8_inputs.KINDS)
    assert [p.rows for p in fp8_error.points(["outliers-d64-*"])] == [1024, 8192, 2048, 512]
    monkeypatch.setattr(command, "why_not_here", lambda: "no GPU")
    assert command.main(["--suite", "fp8-error"]) == command.NO_GPU
    assert "no GPU" in capsys.readouterr().err
