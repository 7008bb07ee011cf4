"""`python -m benchmarks.layers`: the attention of one layer in the projects of layer_projects.py and
layer_whole.py, by what each uses by default on this GPU and by its adapter in jax_fa3.integrations.

Of the projects those that are named; tokamax is enough for MaxText too, whose default is a call of it.
Llama 3 8B's heads (32 and 8 of 128) but where another model is named, 2 x 4096 tokens, bf16; device time
in rounds. EasyDeL sets XLA_FLAGS where it is imported, which is after XLA has read them here.
"""

import argparse
import importlib.metadata
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from . import layer_projects, layer_whole
from . import report as reports
from .__main__ import NO_GPU, why_not_here
from .layer_projects import DEFAULT, OURS, Layer
from .timing import Call, device_time, environment, flusher, gpu_state, in_rounds, ratio

PAGE = Path(__file__).resolve().parent.parent / "docs" / "integrations.md"
PROJECTS = layer_projects.PROJECTS | layer_whole.PROJECTS
DISTRIBUTIONS = (
    *("tokamax", "maxtext", "marin-levanter", "easydel", "ejkernel", "flax", "equinox"),
    *("gemma", "google-tunix"),
)
HEAD = (
    "| one layer's attention | pass | by its default | by jax_fa3 | times as fast |",
    "|---|---|---|---|---|",
)
FAR = 0.02  # of the norm of out: no two right results in bf16 differ by more


def _versions(*distributions: str) -> dict[str, str]:
    found = importlib.metadata.distributions
    return {x: y.version for x in distributions for y in found(name=x)}


def _with_gradients(call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arrays: Any) -> Any:
        out, pullback = jax.vjp(call, *arrays)
        return out, pullback(out)

    return run


def measure(
    layer: Layer, rounds: int, between: Callable[[], None], timer: Any = device_time
) -> Iterator[dict[str, Any]]:
    """Records of forward, and of forward and backward."""
    name, arrays, contenders = layer
    passes = {"forward": lambda x: x, "forward and backward": _with_gradients}
    # Traced one after the other, for some projects are patched meanwhile; compiled side by side.
    lowered = {
        (title, who): jax.jit(wrap(call)).lower(*arrays)
        for title, wrap in passes.items()
        for who, call in contenders.items()
    }
    with ThreadPoolExecutor() as pool:
        compiled = dict(
            zip(lowered, pool.map(lambda x: x.compile(), lowered.values()), strict=True)
        )
    for title in passes:
        calls = {who: Call(compiled[title, who], arrays) for who in contenders}
        outs = {
            who: np.asarray(jax.tree.leaves(call())[0], np.float32) for who, call in calls.items()
        }
        for who, out in outs.items():
            error = np.linalg.norm(out - outs[OURS]) / np.linalg.norm(out)
            if not error <= FAR:
                raise ValueError(f"{name}, {title}: {who} and {OURS} differ by {error:.1%}")
        times = in_rounds(calls, rounds, between, timer)
        for who, ms in times.items():
            record = {"case": name, "pass": title, "by": who, "ms": statistics.median(ms)}
            yield record | {"faster": ratio(ms, times[OURS]), "times_ms": ms}


def _rows(results: Sequence[dict[str, Any]]) -> list[str]:
    ours = {(x["case"], x["pass"]): x["ms"] for x in results if x["by"] == OURS}
    lines = []
    for x in results:
        if x["by"] != OURS:
            case = x["case"] + (f" ({x['by']})" if x["by"] != DEFAULT else "")
            mine = ours[x["case"], x["pass"]]
            cells = case, x["pass"], f"{x['ms']:.2f} ms", f"{mine:.2f} ms", f"{x['faster']:.2f}"
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def table(report: dict[str, Any]) -> str:
    return "\n".join([*HEAD, *_rows(report["results"])]) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--projects", default=",".join(PROJECTS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="measure nothing: print its table"
    )
    parser.add_argument(
        "--write-docs", action="store_true", help="put the table into docs/integrations.md"
    )
    args = parser.parse_args(argv)
    if args.table:
        report = json.loads(args.table.read_text(encoding="utf-8"))
    elif reason := why_not_here():
        parser.exit(NO_GPU, f"{reason}\n")
    else:
        between = flusher()
        report = {"environment": environment(), "rounds": args.rounds, "begin": gpu_state(between)}
        report["environment"]["versions"] |= _versions(*DISTRIBUTIONS)
        report["results"] = []
        print(*HEAD, sep="\n")
        for project in args.projects.split(","):
            for layer in PROJECTS[project]("fa3"):
                found = [*measure(layer, args.rounds, between)]
                print(*_rows(found), sep="\n", flush=True)
                report["results"] += found
                if args.json:
                    args.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    if args.table:
        print(table(report), end="")
    if args.write_docs:
        text = f"{reports.conditions(report)}.\n\n{table(report)}"
        reports.write_section(PAGE, "benchmark-layers", text)


if __name__ == "__main__":
    main()
