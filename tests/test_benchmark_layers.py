"""benchmarks/layers.py without a GPU: it measures, refuses what is wrong, and its table is the page's."""

import functools
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from axlearn_stand_in import axlearn
from integrations import project
from maxdiffusion_stand_in import maxdiffusion

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind an installed jax_fa3

from benchmarks import layer_projects, layer_whole, layers
from benchmarks.timing import Timing

XLA = functools.partial(jax.nn.dot_product_attention, is_causal=True)
SIZES = 1, 64, 4, 2, 16


def measured(layer: Any) -> list[dict[str, Any]]:
    def timer(call: Any) -> Timing:
        call()
        return Timing(2.0, ())

    return list(layers.measure(layer, 2, lambda: None, timer))


def test_measures():
    calls = {"jax_fa3": XLA, "default": XLA}
    found = measured(layer_projects.Layer("a layer", layer_projects.tensors(SIZES), calls))
    assert [(x["pass"], x["by"]) for x in found] == [
        ("forward", "jax_fa3"),
        ("forward", "default"),
        ("forward and backward", "jax_fa3"),
        ("forward and backward", "default"),
    ]
    assert found[1]["faster"] == 1 and found[1]["times_ms"] == [2.0, 2.0]


def test_others_that_differ_are_refused():
    wrong = {"jax_fa3": XLA, "default": jax.nn.dot_product_attention}
    with pytest.raises(ValueError, match=r"a layer, forward: default and jax_fa3 differ by \d"):
        measured(layer_projects.Layer("a layer", layer_projects.tensors(SIZES), wrong))


def test_the_page_has_the_table(tmp_path, monkeypatch, capsys):
    text = layers.PAGE.read_text(encoding="utf-8")
    page = tmp_path / "integrations.md"
    between = r"(<!-- benchmark-layers?\S*: begin -->).*?(<!-- benchmark-layers?\S*: end -->)"
    emptied, count = re.subn(between, r"\1\2", text, flags=re.DOTALL)
    page.write_text(emptied, encoding="utf-8")
    monkeypatch.setattr(layers, "PAGE", page)
    file = ROOT / "benchmarks" / "results" / "layers.json"
    measured = layers.sections(json.loads(file.read_text(encoding="utf-8")))
    assert count == len(measured) == 1 + len(layers.PROJECTS)
    layers.main(["--table", str(file), "--write-docs"])
    assert page.read_text(encoding="utf-8") == text
    assert capsys.readouterr().out.count("| tokamax, ") == 6


def test_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(layers, "why_not_here", lambda: "no GPU")
    with pytest.raises(SystemExit) as stopped:
        layers.main([])
    assert stopped.value.code == layers.NO_GPU and capsys.readouterr().err == "no GPU\n"


IMPORTED = {
    "tokamax": ("tokamax",),
    "Levanter": ("levanter.layers.attention", "haliax"),
    "EasyDeL": ("easydel.operations",),
    "AXLearn": (),
    "MaxDiffusion": (),
    "Flax": ("flax",),
    "Equinox": ("equinox",),
    "Gemma": ("gemma.gm.nn._modules",),
    "Tunix": ("tunix.models.qwen3.model",),
}


@pytest.fixture
def with_stand_ins():
    """And AXLearn's list as it was afterwards."""
    with axlearn(), maxdiffusion():
        backends: Any = importlib.import_module("axlearn.common.flash_attention.utils").BACKENDS
        original = list(backends["gpu"])
        yield
        backends["gpu"][:] = original


@pytest.mark.usefixtures("on_cpu", "with_stand_ins")
@pytest.mark.parametrize("name", IMPORTED)
@pytest.mark.filterwarnings("default")  # Levanter's own
def test_projects(name, monkeypatch):
    """Tiny, by this library's XLA path."""
    if IMPORTED[name]:
        project(name, *IMPORTED[name])
    for sizes in ("SIZES", "CAP_SIZES"):
        monkeypatch.setattr(layer_projects, sizes, SIZES)
    monkeypatch.setattr(layer_projects, "FLUX_SIZES", (1, 64, 4, 4, 16))
    for features in ("GEMMA_FEATURES", "QWEN_FEATURES"):
        monkeypatch.setattr(layer_whole, features, 48)
    made = list(layers.PROJECTS[name](None))
    assert all(measured(layer) for layer in made)
    assert {x.name.split(",")[0].removesuffix(" 2") for x in made} == {name}
