"""The benchmark without a GPU: what is measured, who is believed, and what is printed."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa3

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind an installed jax_fa3

from benchmarks import __main__ as command
from benchmarks import check, contenders, report, run, timing
from benchmarks.points import point

SMALL = point("paper", 64, 256, heads=(4, 2), batch=2, is_causal=True)
PACKED = point(
    "masks",
    64,
    256,
    heads=(4, 2),
    batch=2,
    documents=(100, 50, 106),
    contenders=("fa3", "fa3 full"),
    baseline="fa3 full",
)
TILE = (64, 64)


def dense(p):
    begin, end = p.intervals()
    keys = np.arange(p.seqlen)
    return (keys >= begin[:, None]) & (keys < end[:, None])


def fake_report():
    points = []
    for p in (SMALL, PACKED, dataclasses.replace(PACKED, pass_name="intervals")):
        records: dict[str, dict[str, Any]] = {
            name: {"error_share": 0.5} for name in (*p.contenders, p.baseline)
        }
        records.pop("pallas", None)
        times = {name: [0.5 + 0.1 * i] * 3 for i, name in enumerate(records)}
        back = {name: timing.Timing(0.5, ("kernel",)) for name in records}
        if "cudnn" in p.contenders:
            records["pallas"] = {"refused": "AssertionError: no GPU"}
        points.append(run.summarise(p, times, back, records, TILE))
    state = {"matmul_tflops": 790.0, "clocks.sm": "1980", "power.draw": "600.10"}
    environment = {"gpu": "NVIDIA H200", "date": "2026-11-20", "versions": {"jax": "0.11.2"}}
    measured = {"environment": environment, "begin": state, "end": state, "points": points}
    return measured | {"rounds": 3, "wall_s": 1.0}


@pytest.mark.parametrize("p", [SMALL, PACKED], ids=lambda p: p.name)
def test_check_accepts_right_and_refuses_wrong(p):
    inputs = contenders.PASSES["fwd"].inputs(p)
    q, k, v = (np.asarray(x, np.float32) for x in inputs)
    k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", q, k) / 8
    weights = np.exp(np.where(dense(p), scores, -np.inf))
    out = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
    assert check.check_forward(p, inputs, jnp.asarray(out, jnp.bfloat16)) < 1
    for wrong in (
        out * 1.1,
        np.where(out == out[0, 0, 0, 0], np.nan, out),
        np.roll(out, 1, axis=1),
    ):
        with pytest.raises(check.WrongResult, match=p.name):
            check.check_forward(p, inputs, jnp.asarray(wrong, jnp.bfloat16))
    with pytest.raises(check.WrongResult, match="shape"):
        check.check_forward(p, inputs, jnp.zeros((1, 256, 4, 64)))


def test_check_intervals():
    begin, end = (jnp.asarray(x)[None] for x in PACKED.intervals())
    assert check.check_intervals(PACKED, (), (begin, end)) == 0
    with pytest.raises(check.WrongResult, match="key_end"):
        check.check_intervals(PACKED, (), (begin, end + 1))


def test_rounds_are_one_call_of_each_in_turn():
    order = []

    def timer(call):
        order.append(call)
        return timing.Timing({"a": 2.0, "b": 1.0, "c": 4.0}[call], ())

    flushes = []
    times = timing.in_rounds({n: n for n in "abc"}, 4, lambda: flushes.append(1), timer)
    assert "".join(order) == "abcbcacababc"
    assert len(flushes) == 12
    assert times == {"a": [2.0] * 4, "b": [1.0] * 4, "c": [4.0] * 4}
    assert timing.ratio([2.0, 3.0, 8.0], [1.0, 3.0, 2.0]) == 2.0  # the median of 2, 1 and 4


def test_rivals_may_fail_and_ours_may_only_refuse(monkeypatch):
    def broken(point):
        raise AssertionError

    def not_built(point):
        raise NotImplementedError("no kernel for head dim 64 was built")

    for rival in ("cudnn", "pallas"):
        monkeypatch.setitem(contenders.CONTENDERS, rival, broken)
    monkeypatch.setitem(contenders.CONTENDERS, "fa3", not_built)
    calls, records = run.prepare(SMALL)
    assert not calls
    assert "no kernel for head dim 64" in records["fa3"]["refused"]
    assert records["pallas"]["refused"] == "AssertionError: "
    assert records["flash-attn3-jax"]["refused"] == "head dim 128 only"
    result = run.measure(SMALL, 2, lambda: None)
    assert report.line(result, ["fa3", "cudnn"]).split() == [SMALL.name, "refused", "refused"]

    monkeypatch.setitem(contenders.CONTENDERS, "fa3", broken)
    with pytest.raises(AssertionError):
        run.prepare(SMALL)

    def query_itself(point):
        return contenders.Attention(lambda query, key, value: query)

    monkeypatch.setitem(contenders.CONTENDERS, "fa3", query_itself)
    with pytest.raises(check.WrongResult):
        run.prepare(SMALL)


@pytest.mark.parametrize("p", [SMALL, PACKED], ids=lambda p: p.name)
def test_xla_path_passes_the_check(p, monkeypatch):
    """The calls as they are made on a GPU, but for who runs them."""
    for name in ("dot_product_attention", "key_intervals"):
        plain = getattr(jax_fa3, name)

        def on_xla(*args, plain=plain, **options):
            return plain(*args, **(options | {"implementation": "xla"}))

        monkeypatch.setattr(jax_fa3, name, on_xla)
    names = ("fa3", "fa3 arrays") if p is SMALL else ("fa3", "fa3 full")
    _, records = run.prepare(dataclasses.replace(p, contenders=names, baseline="fa3"))
    assert all(records[name]["error_share"] < 1 for name in names)


@pytest.mark.gpu
def test_one_point_on_the_gpu():
    result = run.measure(SMALL, 2, timing.flusher())
    for name in ("fa3", "cudnn"):
        record = result["results"][name]
        assert record["ms"] > 0 and record["ratio"] > 0 and record["error_share"] <= 1
    assert len(result["results"]["fa3"]["kernels"]) == 1


def test_record_and_line():
    records = {"fa3": {}, "cudnn": {}}
    times = {"fa3": [1.0, 1.1, 1.2], "cudnn": [2.0, 2.2, 2.4]}
    back = {name: timing.Timing(ms[0], ("kernel",)) for name, ms in times.items()}
    result = run.summarise(SMALL, times, back, records, None)
    assert result["results"]["fa3"]["ratio"] == pytest.approx(2)
    assert result["results"]["fa3"]["tflops"] == pytest.approx(SMALL.flops() / 1.1e9)
    assert "2.00x" in report.line(result, ["fa3", "cudnn"])


def test_packed_time_is_compared_with_the_visible_blocks():
    times = {"fa3": [1.1], "fa3 full": [2.0]}
    back = {name: timing.Timing(1.0, ()) for name in times}
    result = run.summarise(PACKED, times, back, {name: {} for name in times}, TILE)
    assert report.over_expected(result) == pytest.approx(1.1 / 2 / PACKED.visible_share(*TILE))
    # the unmasked baseline's speed is that of its own work
    full = PACKED.batch * PACKED.num_heads_q * 4 * 256**2 * 64
    assert result["results"]["fa3 full"]["tflops"] == pytest.approx(full / 2.0 / 1e9)


def test_markdown_and_page(tmp_path):
    made = fake_report()
    paper, masks = (
        {**made, "points": points} for points in (made["points"][:1], made["points"][1:])
    )
    text = report.markdown(json.loads(json.dumps(paper)))
    assert "| forward, head dim 64, causal |" in text
    assert "(1.20)" in text  # cudnn's 0.6 ms over our 0.5
    assert "NVIDIA H200" in text and "1980 MHz" in text
    page = tmp_path / "benchmarks.md"
    (begin, end), (begin_masks, end_masks) = map(report.markers, ("benchmark", "benchmark-masks"))
    old = f"before\n{begin}\nold\n{end}\nafter\n{begin_masks}\n{end_masks}\n"
    page.write_text(old, encoding="utf-8")
    report.write_page(page, made)
    report.write_page(page, made)
    written = page.read_text(encoding="utf-8")
    table = report.markdown(masks)
    assert "Suite `masks`" in table
    assert written == f"before\n{begin}\n{text}{end}\nafter\n{begin_masks}\n{table}{end_masks}\n"
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="benchmark: begin"):
        report.write_page(page, made)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.plot import plot

    written = plot(fake_report(), tmp_path / "plots")
    assert [path.name for path in written] == ["forward.png"]
    assert written[0].stat().st_size > 0


def test_command(tmp_path, capsys, monkeypatch):
    assert command.main(["--list", "--suite", "masks"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    with pytest.raises(SystemExit):
        command.main(["--suite", "nonsense"])
    assert "nonsense" in capsys.readouterr().err
    assert command.main(["--points", "nonsense"]) == 1
    capsys.readouterr()

    file = tmp_path / "report.json"
    file.write_text(json.dumps(fake_report()), encoding="utf-8")
    assert command.main(["--table", str(file)]) == 0
    assert "| forward, head dim 64, causal |" in capsys.readouterr().out

    monkeypatch.setattr(command, "why_not_here", lambda: "no GPU")
    assert command.main(["--quick"]) == command.NO_GPU
    assert "no GPU" in capsys.readouterr().err


def test_command_measures_and_saves(tmp_path, capsys, monkeypatch):
    made = fake_report()
    monkeypatch.setattr(command, "why_not_here", lambda: None)
    monkeypatch.setattr(command, "select", lambda *_: [SMALL])
    monkeypatch.setattr(run, "flusher", lambda: lambda: None)
    monkeypatch.setattr(run, "environment", lambda: made["environment"])
    monkeypatch.setattr(run, "gpu_state", lambda _: made["begin"])
    monkeypatch.setattr(run, "measure", lambda *_: made["points"][0])
    file = tmp_path / "report.json"
    assert command.main(["--json", str(file)]) == 0
    assert json.loads(file.read_text(encoding="utf-8"))["points"][0]["name"] == SMALL.name
    assert "pallas: AssertionError: no GPU" in capsys.readouterr().out

    def wrong(*_):
        raise check.WrongResult("fwd: error 1")

    monkeypatch.setattr(run, "measure", wrong)
    assert command.main([]) == command.WRONG
    assert "wrong result: fwd: error 1" in capsys.readouterr().err
