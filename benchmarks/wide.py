"""`python -m benchmarks --suite wide`: heads wider than 256 (Gemma 4's, MLA's absorbed), as shares of the
rate of a bf16 8192^3 matmul in the same rounds; beside cuDNN where it takes them."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .points import Point, point
from .run import prepare
from .timing import (
    Call,
    environment,
    flusher,
    gpu_state,
    in_rounds,
    matmul_call,
    matmul_tflops,
)

BARS = {"fwd": 0.55, "bwd": 0.35}  # of the matmul's rate, at 4,096 tokens and more
CONTENDERS = ("fa3", "cudnn")
KEYS_OF_PREFILL = 8192


def _points() -> Iterable[Point]:
    names: dict[str, Any] = {"head_dim_v": 512, "contenders": CONTENDERS}
    for passed in BARS:
        for is_causal in (False, True):
            for s in (4096, 16384):
                yield point(
                    "wide", 512, s, heads=(8, 8), is_causal=is_causal, pass_name=passed, **names
                )
        yield point("wide", 512, 4096, heads=(8, 1), is_causal=True, pass_name=passed, **names)
    yield point("wide", 64, 4096, heads=(8, 8), **names)
    for heads in (16, 32, 64, 128):  # 512 rows of one sequence, behind which there are others
        long = {"heads": (heads, 1), "batch": 1, "seqlen_k": KEYS_OF_PREFILL, **names}
        yield dataclasses.replace(x := point("wide", 576, 512, **long), name=f"{x.name}-of-8192")
    yield point("wide", 576, 4096, heads=(16, 1), batch=1, is_causal=True, **names)


POINTS = list(_points())


def points(patterns: Iterable[str] = ("*",)) -> list[Point]:
    return [p for p in POINTS if any(fnmatch.fnmatchcase(p.name, x) for x in patterns)]


def measure(point: Point, rounds: int, between: Callable[[], None], matmul: Call) -> dict[str, Any]:
    calls, records = prepare(point)
    times = in_rounds({**calls, "matmul": matmul}, rounds, between)
    ms = {name: statistics.median(x) for name, x in times.items()}
    return {
        **dataclasses.asdict(point),
        "ms": ms,
        "times_ms": times,
        "tflops": {name: point.flops() / ms[name] / 1e9 for name in calls},
        "matmul_tflops": matmul_tflops(ms["matmul"]),
        "refused": {name: x["refused"] for name, x in records.items() if "refused" in x},
    }


def main(chosen: list[Point], rounds: int, file: Path | None) -> dict[str, Any]:
    between, matmul = flusher(), matmul_call()
    report: dict[str, Any] = {"suite": "wide", "environment": environment()}
    report |= {"rounds": rounds, "begin": gpu_state(between), "points": []}
    for x in chosen:
        report["points"].append(measure(x, rounds, between, matmul))
        print(markdown({"points": report["points"][-1:]}), flush=True)
        if file is not None:
            file.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def _row(found: dict[str, Any]) -> str:
    share, bar = found["tflops"]["fa3"] / found["matmul_tflops"], BARS[found["pass_name"]]
    heads = f"{found['num_heads_q']}/{found['num_heads_k']}"
    keys = f" on {found['seqlen_k']}" if found["seqlen_k"] else ""
    mask = "causal" if found["is_causal"] else "full"
    shape = f"{found['batch']} × {found['seqlen']}{keys}, {heads}, ({found['head_dim']}, {found['head_dim_v']})"
    cudnn = found["tflops"].get("cudnn")
    cells = [
        "forward" if found["pass_name"] == "fwd" else "backward",
        f"{shape}, {mask}",
        f"{found['ms']['fa3']:.3f}",
        f"{found['tflops']['fa3']:.0f}",
        f"{share:.3f} of {found['matmul_tflops']:.0f}",
        f"{bar:.2f}{'' if share >= bar else ', missed'}",
        "refuses" if cudnn is None else f"{found['tflops']['fa3'] / cudnn:.2f} times as fast",
    ]
    return f"| {' | '.join(cells)} |"


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "| | B × T, heads, head dims | ms | TFLOP/s | of the matmul | bar | cuDNN |",
        "|---" * 7 + "|",
        *map(_row, report["points"]),
    ]
    return "\n".join(lines) + "\n"
