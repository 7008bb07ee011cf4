"""`python -m benchmarks`: times this library and its rivals side by side on one Hopper GPU.

Rounds: one call of each contender in turn, with the L2 flushed and a pause between calls; device
time; the figure is the median over the rounds of each round's ratio to cuDNN through jax.nn. Before
a point is timed, a slice of every contender's result is compared with fp32 maths.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from . import report as reports
from .points import Point
from .suites import SUITES, select

README = Path(__file__).resolve().parent.parent / "README.md"
NO_GPU, WRONG = 2, 3  # exit codes


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Exit codes: {NO_GPU} without a Hopper GPU, {WRONG} where this library's result is wrong.",
    )
    add = parser.add_argument
    add(
        "--suite",
        default="paper",
        help=f"comma-separated: {', '.join(SUITES)}, or all (default: paper); or one of these alone, on "
        "several GPUs: scaling, ring",
    )
    add(
        "--points",
        default="*",
        help="only points with these names, comma-separated, * and ? allowed",
    )
    add("--quick", action="store_true", help="8 points against cuDNN alone, in at most 90 s")
    add("--contenders", help="only these, comma-separated, beside fa3 and the baseline")
    add("--rounds", type=int, default=20, help="default 20; fewer are for trying things out")
    add("--list", action="store_true", help="print the points' names and stop")
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="write everything that was measured, after each point",
    )
    add(
        "--plot", type=Path, metavar="DIR", help="draw TFLOP/s against sequence length (matplotlib)"
    )
    add(
        "--table",
        metavar="FILES",
        help="measure nothing: print the tables of these JSON files, comma-separated",
    )
    add(
        "--write-readme",
        action="store_true",
        help="put the tables into README.md, between its markers",
    )
    args = parser.parse_args(argv)
    suites = [s for s in SUITES if s != "quick"] if args.suite == "all" else args.suite.split(",")
    unknown = [s for s in suites if s not in SUITES and suites not in (["scaling"], ["ring"])]
    if unknown:
        parser.error(f"--suite: unknown {', '.join(unknown)}; there are {', '.join(SUITES)}")
    args.suites = ["quick"] if args.quick else suites
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, found {args.rounds}")
    return args


def _why_not_here() -> str | None:
    import jax

    try:
        device = jax.devices("gpu")[0]
    except RuntimeError:
        return "no GPU: the benchmark needs an NVIDIA Hopper GPU and jax[cuda13]"
    capability = getattr(device, "compute_capability", "unknown")
    if str(capability) != "9.0":
        return f"{device.device_kind} has compute capability {capability}: the kernels need 9.0 (Hopper)"
    return None


def _only(point: Point, wanted: str | None) -> Point:
    if wanted is None:
        return point
    keep = {point.contenders[0], point.baseline, *wanted.split(",")}
    return dataclasses.replace(point, contenders=tuple(c for c in point.contenders if c in keep))


def _measure(points: list[Point], rounds: int, file: Path | None) -> dict[str, Any]:
    from .run import measure
    from .timing import environment, flusher, gpu_state

    started = time.monotonic()
    between = flusher()
    names = list(dict.fromkeys(name for p in points for name in (*p.contenders, p.baseline)))
    report = {
        "environment": environment(),
        "rounds": rounds,
        "begin": gpu_state(between),
        "points": [],
    }

    def save() -> None:
        report["wall_s"] = time.monotonic() - started
        if file:
            file.write_text(json.dumps(report, indent=1), encoding="utf-8")

    print(reports.header(names), flush=True)
    for point in points:
        result = measure(point, rounds, between)
        print("\n".join([reports.line(result, names), *reports.refusals(result)]), flush=True)
        report["points"].append(result)
        save()
    report["end"] = gpu_state(between)
    save()
    return report


def _scaling(rounds: int, file: Path | None) -> int:
    reason = _why_not_here()
    if reason:
        print(reason, file=sys.stderr)
        return NO_GPU
    import jax

    from . import scaling
    from .timing import environment, flusher

    devices = jax.local_devices(backend="gpu")
    if len(devices) < min(scaling.COUNTS):
        print(f"{len(devices)} GPU: scaling needs {min(scaling.COUNTS)}", file=sys.stderr)
        return NO_GPU
    results = []
    for result in scaling.measure(devices, rounds, flusher()):
        results.append(result)
        print(
            result["gpus"], result["pass"], result["split"], f"{result['of_ideal']:.3f}", flush=True
        )
        if file:
            report = {"environment": environment(), "rounds": rounds, "scaling": results}
            file.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"\n{scaling.markdown(results)}", end="")
    return 0


def _ring(args: argparse.Namespace) -> int:
    from . import ring
    from .check import WrongResult

    points = ring.points(args.points.split(","))
    if args.list:
        print("\n".join(p.name for p in points))
        return 0
    if args.table:
        print(ring.markdown(json.loads(Path(args.table).read_text(encoding="utf-8"))), end="")
        return 0
    reason = _why_not_here()
    if reason:
        print(reason, file=sys.stderr)
        return NO_GPU
    try:
        ring.main(points, args.rounds, args.json)
    except WrongResult as error:
        print(f"wrong result: {error}", file=sys.stderr)
        return WRONG
    return 0


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    if args.suites == ["scaling"]:
        return _scaling(args.rounds, args.json)
    if args.suites == ["ring"]:
        return _ring(args)
    points = [_only(p, args.contenders) for p in select(args.suites, args.points.split(","))]
    if args.list:
        print("\n".join(f"{p.suite:<8}{p.name}" for p in points))
        return 0
    if args.table:
        files = [Path(name) for name in args.table.split(",")]
        report = reports.joined([json.loads(x.read_text(encoding="utf-8")) for x in files])
        print(reports.markdown(report), end="")
    else:
        if not points:
            print(f"no point is called {args.points}: see --list", file=sys.stderr)
            return 1
        reason = _why_not_here()
        if reason:
            print(reason, file=sys.stderr)
            return NO_GPU
        from .check import WrongResult

        try:
            report = _measure(points, args.rounds, args.json)
        except WrongResult as error:
            print(f"wrong result: {error}", file=sys.stderr)
            return WRONG
        print(f"\n{reports.markdown(report)}\n{report['wall_s']:.0f} s")
    if args.write_readme:
        reports.write_readme(README, report)
    if args.plot:
        from .plot import plot

        print("\n".join(str(path) for path in plot(report, args.plot)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
