"""`python -m benchmarks --suite forward-mode`: tangents beside the forward and beside XLA's jvp of dense
attention (`jax.nn`, implementation="xla"), and a training step of MeanFlow with either."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jax_fa3

from . import mean_flow
from .check import WrongResult
from .timing import Call, environment, flusher, gpu_state, in_rounds

BATCH, WIDTH = 2, 2048  # heads times head dim
TOLERANCE = 0.03  # of the largest number
XLA = "XLA"

ours: Any = functools.partial(jax_fa3.dot_product_attention, implementation="fa3")
dense: Any = functools.partial(jax.nn.dot_product_attention, implementation="xla")


@dataclasses.dataclass(frozen=True)
class Tangents:
    head_dim: int
    is_causal: bool
    tokens: int = 4096

    @property
    def name(self) -> str:
        return f"d{self.head_dim}-{'causal' if self.is_causal else 'full'}-s{self.tokens}"

    def shape(self, times: int = 1) -> tuple[int, ...]:
        return BATCH, times * self.tokens, WIDTH // self.head_dim, self.head_dim

    def calls(self) -> dict[str, Call]:
        keys = jax.random.split(jax.random.key(0), 6)
        arrays = [jax.random.normal(key, self.shape(), jnp.bfloat16) for key in keys]
        attend = functools.partial(ours, is_causal=self.is_causal)
        linear = jax.linearize(attend, *arrays[:3])[1]
        return {
            "forward": Call(jax.jit(attend), tuple(arrays[:3])),
            "tangent": Call(jax.jit(lambda linear, *x: linear(*x)), (linear, *arrays[3:])),
            "jvp": Call(self.pushed(ours), tuple(arrays)),
            XLA: Call(self.pushed(dense), tuple(arrays)),
        }

    def pushed(self, attention: Any) -> Any:
        attend = functools.partial(attention, is_causal=self.is_causal)
        return jax.jit(lambda *x: jax.jvp(attend, x[:3], x[3:]))

    def results(self, calls: dict[str, Call]) -> tuple[Any, Any]:
        return (*calls["jvp"](), calls["tangent"]()), (found := calls[XLA]()) + found[1:]

    def megabytes(self) -> dict[str, list[float]]:
        """That the jvp takes beside its arguments and results, at once and twice the length."""
        return {
            name: [_megabytes(self.pushed(f), 6 * [self.shape(times)]) for times in (1, 2)]
            for name, f in (("jvp", ours), (XLA, dense))
        }


@dataclasses.dataclass(frozen=True)
class Step:
    """Of MeanFlow."""

    sizes: mean_flow.Sizes

    @property
    def name(self) -> str:
        return f"mean-flow-s{self.sizes.tokens}"

    def calls(self) -> dict[str, Call]:
        arguments = mean_flow.inputs(self.sizes)
        both = {"step": ours, XLA: dense}
        return {
            name: Call(mean_flow.step(f, self.sizes.heads), arguments) for name, f in both.items()
        }

    def results(self, calls: dict[str, Call]) -> tuple[Any, Any]:
        return calls["step"](), calls[XLA]()

    def megabytes(self) -> dict[str, list[float]]:
        return {}


Point = Tangents | Step
POINTS: list[Point] = [Step(mean_flow.Sizes())]
POINTS += [Tangents(h, c) for h in (64, 128, 256) for c in (False, True)]


def points(patterns: Iterable[str] = ("*",)) -> list[Point]:
    return [p for p in POINTS if any(fnmatch.fnmatchcase(p.name, x) for x in patterns)]


def _megabytes(function: Any, shapes: Iterable[tuple[int, ...]]) -> float:
    structs = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in shapes]
    return function.lower(*structs).compile().memory_analysis().temp_size_in_bytes / 1e6


def check(point: Point, calls: dict[str, Call]) -> None:
    found, exact = map(jax.tree.leaves, point.results(calls))
    for x, y in zip(found, exact, strict=True):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        error = float(jnp.abs(x - y).max() / jnp.abs(y).max())
        if not error <= TOLERANCE:
            raise WrongResult(f"{point.name}: off by {error:.3g} of the largest, not {TOLERANCE}")


def measure(point: Point, rounds: int, between: Callable[[], None]) -> dict[str, Any]:
    calls = point.calls()
    check(point, calls)
    times = in_rounds(calls, rounds, between)
    ms = {name: statistics.median(x) for name, x in times.items()}
    return {"name": point.name, "ms": ms, "times_ms": times, "megabytes": point.megabytes()}


def main(chosen: list[Point], rounds: int, file: Path | None) -> dict[str, Any]:
    between = flusher()
    report: dict[str, Any] = {"suite": "forward-mode", "environment": environment()}
    report |= {"rounds": rounds, "begin": gpu_state(between), "points": []}
    for point in chosen:
        report["points"].append(measure(point, rounds, between))
        print(markdown({"points": report["points"][-1:]}), flush=True)
        if file is not None:
            file.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def _row(title: str, cells: Iterable[str]) -> str:
    return f"| {title} | {' | '.join(cells)} |"


def _tangents(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Milliseconds, in brackets over the forward's, and temporary memory at once and twice the length:",
        "",
        "| | forward | tangent | both (`jax.jvp`) | XLA's jvp | MB, `jax.jvp` | MB, XLA's |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        ms, megabytes = row["ms"], row["megabytes"]
        cells = [f"{ms['forward']:.3f}"]
        cells += [f"{ms[x]:.3f} ({ms[x] / ms['forward']:.2f})" for x in ("tangent", "jvp", XLA)]
        cells += [", ".join(f"{n:,.1f}" for n in megabytes[x]) for x in ("jvp", XLA)]
        lines.append(_row(row["name"], cells))
    return lines


def _steps(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| milliseconds | kernels | XLA | times as fast |", "|---|---|---|---|"]
    for row in rows:
        ms = row["ms"]
        cells = f"{ms['step']:.1f}", f"{ms[XLA]:.1f}", f"{ms[XLA] / ms['step']:.2f}"
        lines.append(_row(row["name"], cells))
    return lines


def markdown(report: dict[str, Any]) -> str:
    blocks = []
    for name, table in ("jvp", _tangents), ("step", _steps):
        rows = [row for row in report["points"] if name in row["ms"]]
        blocks += ["\n".join(table(rows))] if rows else []
    return "\n\n".join(blocks) + "\n"
