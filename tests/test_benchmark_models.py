"""The suite of models' shapes: what is in it, and what its report says. No GPU, made-up times."""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import pytest
from lowering import hide_gpus

import jax_fa3

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind an installed jax_fa3

from benchmarks import __main__ as command
from benchmarks import models_report, report, run, timing
from benchmarks.models import DOCUMENTS, ROWS, models
from benchmarks.points import Point
from benchmarks.suites import select

POINTS = {p.name: p for p in models()}


def test_rows():
    assert len(ROWS) >= 30 and len(POINTS) == 2 * len(ROWS)
    assert list(POINTS.values()) == select(["models"])
    assert {p.model.rpartition(", TP ")[2] for p in ROWS} == {"1", "2", "4", "8"}
    assert {min(p.batch for p in ROWS), max(p.batch for p in ROWS)} == {1, 32}
    assert min(max(p.seqlen, p.keys) for p in ROWS) == 512
    assert max(p.seqlen for p in ROWS) == 2**17
    assert sum(DOCUMENTS) == 16384
    names = "Llama 3 8B|Llama 3 70B|Qwen 2.5|Qwen 3|Gemma 1|Gemma 2|Gemma 3|gpt-oss|Mistral|Falcon|"
    names += "OLMo|GPT-2|BERT|ViT|SigLIP|DiT|Flux|Wan|Whisper|SDXL|DeepSeek|packed fine-tuning"
    for name in names.split("|"):
        assert any(name in p.model for p in ROWS), name


# batch, queries, keys, heads, head dims, causal, keys to the left, packed, dtype
WANTED = [
    (1, 8192, 8192, 8, 1, 128, 128, True, None, False, "bfloat16"),
    (4, 4096, 4096, 8, 1, 128, 128, True, None, False, "bfloat16"),
    (2, 4096, 4096, 32, 4, 128, 128, True, None, False, "bfloat16"),
    (1, 4096, 4096, 64, 8, 128, 128, True, None, False, "bfloat16"),
    (1, 4096, 4096, 16, 1, 256, 256, True, None, False, "bfloat16"),
    (4, 2048, 2048, 71, 1, 64, 64, True, None, False, "bfloat16"),
    (4, 4096, 4096, 16, 16, 72, 72, False, None, False, "bfloat16"),
    (8, 4096, 77, 10, 10, 64, 64, False, None, False, "bfloat16"),
    (8, 512, 16384, 8, 8, 64, 64, False, None, False, "bfloat16"),
    (16, 4096, 4096, 64, 8, 64, 64, True, 127, False, "bfloat16"),
    (32, 577, 577, 16, 16, 64, 64, False, None, False, "bfloat16"),
    (1, 16384, 16384, 16, 16, 128, 128, True, None, True, "bfloat16"),
    (1, 8192, 8192, 32, 8, 128, 128, True, None, False, "bfloat16"),
    (1, 8192, 8192, 4, 1, 128, 128, True, None, False, "bfloat16"),
    (8, 2048, 2048, 16, 16, 128, 128, True, None, False, "bfloat16"),
    (2, 8192, 8192, 16, 16, 128, 128, True, None, False, "float16"),
    (2, 8192, 8192, 32, 8, 128, 128, True, None, False, "bfloat16"),
    (2, 8192, 8192, 16, 16, 192, 128, True, None, False, "bfloat16"),
    (2, 8192, 8192, 16, 16, 192, 128, False, None, False, "bfloat16"),
    (2, 8192, 8192, 16, 16, 128, 128, True, 1023, False, "bfloat16"),
]


def test_the_shapes_with_bars_of_their_own_are_there():
    def described(p: Point):
        heads = p.num_heads_q, p.num_heads_k, p.head_dim, p.head_dim_v
        mask = p.is_causal, p.window, p.documents is not None
        return (p.batch, p.seqlen, p.keys, *heads, *mask, p.dtype)

    assert set(WANTED) <= {described(p) for p in ROWS}
    for name in models_report.OF_CUDNN:
        assert name in POINTS
    for speed in models_report.SPEEDS:
        assert speed.point in POINTS and speed.other in POINTS
        assert speed.contender in POINTS[speed.other].contenders


def test_this_library_takes_every_row(monkeypatch):
    hide_gpus(monkeypatch)
    for p in ROWS:
        shapes = (
            (p.batch, p.seqlen, p.num_heads_q, p.head_dim),
            (p.batch, p.keys, p.num_heads_k, p.head_dim),
            (p.batch, p.keys, p.num_heads_k, p.head_dim_v),
        )
        arrays = [jax.ShapeDtypeStruct(shape, p.dtype) for shape in shapes]
        window = None if p.window is None else (p.window, 0)
        options = {"is_causal": p.is_causal, "local_window_size": window, "implementation": "fa3"}
        out = jax.eval_shape(partial(jax_fa3.dot_product_attention, **options), *arrays)
        assert out.shape == (*shapes[0][:3], p.head_dim_v)


def test_a_run_takes_less_than_ten_minutes():
    """20 rounds and 11 more calls of everybody at 400 TFLOP/s, and 1.4 s of each to compile and check
    (the paper's grid: 302 s for its 252 that ran)."""
    calls = sum(len(p.contenders) * (31 * p.flops() / 400e12 + 1.4) for p in POINTS.values())
    checks = sum(
        6 * 10 * p.seqlen * p.keys * p.head_dim * p.num_heads_q / p.num_heads_k for p in ROWS
    )
    assert calls + checks / 30e12 < 600


@pytest.mark.parametrize("name", ["packed", "window", "text", "audio"])
def test_flops_of_a_smaller_one(name):
    """Lengths divided by 16, visible pairs counted one by one."""
    long = next(p for p in ROWS if name in p.model)
    documents = long.documents and tuple(n // 16 for n in long.documents)
    changes = {
        "seqlen": sum(documents) if documents else long.seqlen // 16,
        "seqlen_k": long.seqlen_k and long.seqlen_k // 16,
        "window": long.window and long.window // 16,
    }
    p = Point(**{**vars(long), **changes, "documents": documents, "pass_name": "bwd"})
    ids, pairs = p.segment_ids(), 0
    for i in range(p.seqlen):
        for j in range(p.keys):
            seen = not p.documents or ids[i] == ids[j]
            seen = seen and (j <= i or not p.is_causal)
            pairs += seen and (p.window is None or j >= i - p.window)
    per_pair = 2.5 * 2 * (p.head_dim + p.head_dim_v)
    assert p.flops() == pairs * per_pair * p.batch * p.num_heads_q


def measured(point: Point, **ms: float | str) -> dict:
    """A record: milliseconds of each contender, or why it refused."""
    records = {name: {"refused": x} if isinstance(x, str) else {} for name, x in ms.items()}
    ran = {name: float(x) for name, x in ms.items() if not isinstance(x, str)}
    times = {name: [x, 2 * x, 3 * x] for name, x in ran.items()}
    back = {name: timing.Timing(x[1], ("kernel",)) for name, x in times.items()}
    return run.summarise(point, times, back, records, None)


def made_up(*results: dict) -> dict:
    environment = {"gpu": "NVIDIA H200", "date": "2026-11-29", "versions": {"jax": "0.11.2"}}
    made = {"environment": environment, "rounds": 3, "wall_s": 1.0, "points": list(results)}
    return json.loads(json.dumps(made))


LLAMA = "llama-3-70b-tp-8-1x8192"
PACKED = "olmo-2-1b-packed-fine-tuning-tp-1-1x16384"
OLMO = "olmo-2-1b-tp-1-8x2048"
PAPER = "fwd-flashattention-3-paper-tp-1-2x8192"
TEXT = "sdxl-1024-px-on-text-tp-1-8x4096"


def test_table_and_page(tmp_path):
    report_ = made_up(
        measured(POINTS[f"fwd-{LLAMA}"], fa3=0.1, cudnn=0.12, dew=0.11),
        measured(POINTS[f"bwd-{LLAMA}"], fa3=0.2, cudnn=0.25, dew=0.18),
        measured(POINTS[f"fwd-{TEXT}"], fa3=0.01, cudnn=0.02, dew="no"),
        measured(POINTS[f"bwd-{TEXT}"], fa3="no", cudnn="no", dew=0.02),
        measured(POINTS[f"fwd-{PACKED}"], fa3=1.0, cudnn="no", dew="no"),
    )
    text = report.markdown(report_)
    speed = POINTS[f"fwd-{LLAMA}"].flops() / 0.2e9
    assert (
        "| Llama 3 70B, TP 8 | 1 × 8192, 8/1 × 128, causal "
        f"| 200.0 µs, {speed:.0f} | 1.20 | 1.09 | 1.10 "
        f"| 400.0 µs, {speed / 2 * 2.5:.0f} | 1.25 | 1.39 | **0.90** |\n"
    ) in text
    assert "| SDXL, 1024 px, on text, TP 1 | 8 × 4096 on 77, 10/10 × 64, full | 20.0 µs, " in text
    assert "| 2.00 | refused | 2.00 | refused | – | – | – |\n" in text
    assert "| refused | refused | – | – | – | – | – |\n" in text

    page = tmp_path / "benchmarks.md"
    begin, end = report.markers("benchmark-models")
    page.write_text(f"{begin}\nnothing\n{end}\n", encoding="utf-8")
    report.write_page(page, report_)
    assert page.read_text(encoding="utf-8") == f"{begin}\n{text}{end}\n"


def test_bars():
    results = made_up(
        measured(POINTS[f"fwd-{LLAMA}"], fa3=0.1, cudnn=0.12, dew=0.096),  # 0.96: long enough
        measured(POINTS[f"bwd-{LLAMA}"], fa3=0.1, cudnn=0.13, dew=0.099),
        measured(POINTS[f"bwd-{TEXT}"], fa3=0.02, cudnn="no", dew=0.0196),  # 0.98 of a short one
        measured(POINTS[f"fwd-{PACKED}"], fa3=1.0, cudnn="no", dew=1.0),
        measured(POINTS[f"fwd-{OLMO}"], fa3=0.5, cudnn=0.5, dew=0.5),
    )["points"]
    speeds = [r["results"]["fa3"]["tflops"] for r in results[-2:]]
    assert models_report.misses(results) == [
        f"bwd-{LLAMA}: 0.990 of the best rival, wanted 1.00",
        f"bwd-{LLAMA}: 1.300 of cuDNN, wanted 1.35",
        f"fwd-{PACKED}: {speeds[0] / speeds[1]:.3f} of fa3's TFLOP/s at fwd-{OLMO}, wanted 0.95",
        f"fwd-{PACKED}: not measured against cudnn's TFLOP/s at {PAPER}, wanted 1.00",
    ]
    short = made_up(measured(POINTS[f"fwd-{TEXT}"], fa3=0.02, cudnn=0.0192, dew="no"))["points"]
    assert models_report.misses(short) == [f"fwd-{TEXT}: 0.960 of the best rival, wanted 0.97"]
    assert "Every one is met." in models_report.markdown(results[:1])
    assert "- bwd-llama" in models_report.markdown(results[:2])


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    results = made_up(
        measured(POINTS[f"fwd-{LLAMA}"], fa3=0.1, cudnn=0.12, dew=0.09),
        measured(POINTS[f"fwd-{TEXT}"], fa3=0.01, cudnn=0.02, dew="no"),
        measured(POINTS[f"bwd-{TEXT}"], fa3=0.01, cudnn="no", dew="no"),
    )
    file = tmp_path / "models.json"
    file.write_text(json.dumps(results), encoding="utf-8")
    assert command.main(["--table", str(file), "--plot", str(tmp_path)]) == 0
    assert (tmp_path / "models.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def machine(monkeypatch):
    """A GPU whose points take a minute each; the points that it measured."""
    order, clock = [], [0.0]

    def measure(point, rounds, between):
        order.append(point.name)
        clock[0] += 60
        return measured(point, fa3=0.1, cudnn=0.1, dew=0.1)

    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run, "flusher", lambda: None)
    monkeypatch.setattr(run, "environment", lambda: made_up()["environment"])
    monkeypatch.setattr(run, "gpu_state", lambda _: {"matmul_tflops": 790.0 + len(order)})
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(command, "why_not_here", lambda: None)
    return order


def test_a_run_in_parts_is_one_report(machine, tmp_path, capsys):
    file = tmp_path / "models.json"
    arguments = ["--suite", "models", "--points", "*gemma*", "--json", str(file), "--resume"]
    wanted = [p.name for p in select(["models"], ["*gemma*"])]
    for done in (3, 6, 9, len(wanted), len(wanted)):
        assert command.main([*arguments, "--minutes", "2.5"]) == 0
        assert machine == wanted[:done]
    made = json.loads(file.read_text(encoding="utf-8"))
    assert [p["name"] for p in made["points"]] == wanted
    assert [other["wall_s"] for other in made["others"]] == [180, 180, 60]
    assert all("points" not in other for other in made["others"])
    states = [f"end: bf16 8192³ matmul {790 + n} TFLOP/s" for n in (3, 6, 9, 10)]
    assert all(state in report.markdown(made) for state in states)
    with pytest.raises(ValueError, match="got 20 rounds, wanted 5"):
        command.main([*arguments, "--rounds", "5"])
    with pytest.raises(SystemExit):
        command.main(["--resume"])
    assert "--json" in capsys.readouterr().err


def test_rounds_decide_by_their_median():
    """The better rival is one of them over all rounds, not the best of each round."""
    result = measured(POINTS[f"fwd-{LLAMA}"], fa3=1.0, cudnn=1.0, dew=1.0)
    result["results"]["cudnn"]["times_ms"] = [2.0, 4.0, 3.0]
    result["results"]["dew"]["times_ms"] = [1.5, 1.0, 9.0]
    assert models_report.records.of_the_best(result) == 1.5  # of 1.5, 0.5 and 3
