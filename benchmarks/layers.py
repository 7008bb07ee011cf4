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
    """Of those that are there; of several the first on the path, which is the one that is imported."""
    found = ((x, next(iter(importlib.metadata.distributions(name=x)), None)) for x in distributions)
    return {x: y.version for x, y in found if y is not None}


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


def sections(report: dict[str, Any]) -> dict[str, str]:
    """What the page says between its markers: the table, and a line in each project's section."""
    runs = ". Then: ".join(map(reports.conditions, (report, *report.get("others", ()))))
    texts = {"benchmark-layers": f"{runs}.\n\n{table(report)}"}
    begin = (
        f"One layer's attention on an {report['environment']['gpu']}, times as fast as by default,"
    )
    for project in PROJECTS:
        found: dict[str, list[str]] = {}
        for x in report["results"]:
            if x["case"].startswith(project) and x["by"] != OURS:
                case = _case(x).partition(", ")[2]
                found.setdefault(case, []).append(f"{x['faster']:.2f}")
        if found:
            each = "; ".join(f"{case}: {' and '.join(ratios)}" for case, ratios in found.items())
            text = f"{begin} forward, and forward and backward: {each}.\n"
            texts[f"benchmark-layer-{project}"] = text
    return texts


def _joined(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of several runs: the conditions of each, and their results."""
    if len(runs) == 1:
        return runs[0]
    others = [{k: v for k, v in run.items() if k != "results"} for run in runs[1:]]
    return runs[0] | {"others": others, "results": [x for run in runs for x in run["results"]]}


def _case(record: dict[str, Any]) -> str:
    return record["case"] + (f" ({record['by']})" if record["by"] != DEFAULT else "")


def _rows(results: Sequence[dict[str, Any]]) -> list[str]:
    ours = {(x["case"], x["pass"]): x["ms"] for x in results if x["by"] == OURS}
    lines = []
    for x in results:
        if x["by"] != OURS:
            mine = ours[x["case"], x["pass"]]
            cells = _case(x), x["pass"], f"{x['ms']:.2f} ms", f"{mine:.2f} ms", f"{x['faster']:.2f}"
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
        "--table", type=Path, nargs="+", metavar="FILE", help="measure nothing: print their table"
    )
    parser.add_argument(
        "--write-docs", action="store_true", help="put the results into docs/integrations.md"
    )
    args = parser.parse_args(argv)
    if args.table:
        report = _joined([json.loads(x.read_text(encoding="utf-8")) for x in args.table])
        if args.json:
            args.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
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
        for section, text in sections(report).items():
            reports.write_section(PAGE, section, text)


if __name__ == "__main__":
    main()
