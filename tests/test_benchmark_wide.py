"""The benchmark of wide heads without a GPU: it runs, checks, and prints shares beside their bars."""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind an installed jax_fa3

import jax_fa3
from benchmarks import __main__ as command
from benchmarks import contenders, wide
from benchmarks.check import WrongResult
from benchmarks.rivals import Attention

pytestmark = pytest.mark.usefixtures("on_cpu")


def small(point):
    sizes = {"batch": 1, "seqlen": 64, "num_heads_q": 2, "num_heads_k": 1}
    keys = point.seqlen_k and 128
    return dataclasses.replace(point, **sizes, seqlen_k=keys, contenders=("fa3",), baseline="fa3")


SMALL = [small(wide.points([name])[0]) for name in ("fwd-d576*", "bwd-d512-causal*")]


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch):
    def of_plain_jax(point, **options):
        function = functools.partial(
            jax_fa3.dot_product_attention, is_causal=point.is_causal, **options
        )
        return Attention(function)

    monkeypatch.setitem(contenders.CONTENDERS, "fa3", of_plain_jax)
    for name in ("environment", "flusher", "matmul_call"):
        monkeypatch.setattr(wide, name, dict)
    monkeypatch.setattr(wide, "gpu_state", lambda _: {})
    times = lambda calls, rounds, _: {name: [1.0] * rounds for name in calls}
    monkeypatch.setattr(wide, "in_rounds", times)
    monkeypatch.setattr(wide, "matmul_tflops", lambda ms: 0.1)


def test_measures_checks_and_prints(tmp_path, capsys):
    file = tmp_path / "wide.json"
    wide.main(SMALL, 2, file)
    capsys.readouterr()
    assert command.main(["--suite", "wide", "--table", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "| forward | 1 × 64 on 128, 2/1, (576, 512), full | 1.000 | 0 | 0.357 of 0 |" in printed
    assert "| 0.55, missed | refuses |" in printed
    assert "| backward | 1 × 64, 2/1, (512, 512), causal | 1.000 |" in printed
    assert len(json.loads(file.read_text(encoding="utf-8"))["points"]) == 2


def test_wrong_results_are_refused(monkeypatch):
    wrong = functools.partial(jax_fa3.dot_product_attention, scale=1.0)
    monkeypatch.setitem(contenders.CONTENDERS, "fa3", lambda point: Attention(wrong))
    with pytest.raises(WrongResult):
        wide.main(SMALL[:1], 2, None)


def test_names():
    assert len({p.name for p in wide.POINTS}) == len(wide.POINTS)
    assert all(p.pass_name in wide.BARS for p in wide.POINTS)
