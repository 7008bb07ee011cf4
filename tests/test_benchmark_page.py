"""docs/benchmarks.md has the tables that the command writes from benchmarks/results."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind an installed jax_fa3

from benchmarks import __main__ as command
from benchmarks import report

RESULTS = ROOT / "benchmarks" / "results"
SECTIONS = {
    "benchmark": "speed",
    "benchmark-masks": "masks",
    "benchmark-deterministic": "deterministic",
    "benchmark-fp8": "fp8",
    "benchmark-fp8-error": "fp8_error",
    "benchmark-scaling": "scaling",
    "benchmark-ring": "ring",
    "benchmark-decode": "decode",
    "benchmark-models": "models",
    "benchmark-forward-mode": "forward_mode",
    "benchmark-wide": "wide",
}
ALONE = {
    "fp8_error": "fp8-error",
    "scaling": "scaling",
    "ring": "ring",
    "decode": "decode",
    "forward_mode": "forward-mode",
    "wide": "wide",
}


@pytest.mark.parametrize("section", SECTIONS)
def test_tables_are_those_of_the_results(section, tmp_path, monkeypatch, capsys):
    text = command.PAGE.read_text(encoding="utf-8")
    begin, end = report.markers(section)
    assert text.count(begin) == text.count(end) == 1
    before, rest = text.split(begin)
    if not (RESULTS / f"{SECTIONS[section]}.json").exists():
        assert rest.startswith(f"\nNo run is committed yet.\n{end}\n")
        return
    page = tmp_path / "benchmarks.md"
    page.write_text(before + begin + end + rest.split(end)[1], encoding="utf-8")
    monkeypatch.setattr(command, "PAGE", page)
    name = SECTIONS[section]
    suite = ["--suite", ALONE[name]] if name in ALONE else []
    assert command.main([*suite, "--table", str(RESULTS / f"{name}.json"), "--write-docs"]) == 0
    assert "|---" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8") == text


def test_training_table(monkeypatch):
    pytest.importorskip("optax")
    pytest.importorskip("orbax.checkpoint")
    from benchmarks import training

    monkeypatch.setattr(training.example, "peak_flops", lambda: training.example.PEAK_FLOPS)
    made = json.loads((RESULTS / "training.json").read_text(encoding="utf-8"))
    models = training.contenders(made["size"], [name for name in made["steps"] if "," not in name])
    begin, end = report.markers("benchmark-training")
    table = training.table(models, made["steps"])
    assert f"{begin}\n{table}\n{end}" in command.PAGE.read_text(encoding="utf-8")
