"""`python -m benchmarks`: times this library and its rivals side by side on one Hopper GPU.

Rounds: one call of each contender in turn, with the L2 flushed and a pause between calls; device
time; the figure is the median over the rounds of each round's ratio to cuDNN through jax.nn. Before
a point is timed, a slice of every contender's result is compared with fp32 maths.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from . import report as reports
from .arguments import NO_GPU, NO_POINT, WRONG, parse
from .points import Point
from .suites import select

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"


def why_not_here() -> str | None:
    import jax

    try:
        device = jax.devices("gpu")[0]
    except RuntimeError:
        return "no GPU: the benchmark needs an NVIDIA Hopper GPU, and jax[cuda13] or jax[cuda12]"
    capability = getattr(device, "compute_capability", "unknown")
    if str(capability) != "9.0":
        return f"{device.device_kind} has compute capability {capability}: the kernels need 9.0 (Hopper)"
    return None


class _Stop(Exception):
    """Nothing can be measured, or goes on being measured: exit code and reason."""


@contextlib.contextmanager
def _measuring() -> Iterator[None]:
    reason = why_not_here()
    if reason:
        raise _Stop(NO_GPU, reason)
    from .check import WrongResult

    try:
        yield
    except WrongResult as error:
        raise _Stop(WRONG, f"wrong result: {error}") from error


def _only(point: Point, wanted: str | None) -> Point:
    if wanted is None:
        return point
    keep = {point.contenders[0], point.baseline, *wanted.split(",")}
    return dataclasses.replace(point, contenders=tuple(c for c in point.contenders if c in keep))


def _scaling(args: argparse.Namespace) -> None:
    from . import scaling

    if args.table:
        report = json.loads(Path(args.table).read_text(encoding="utf-8"))
        print(scaling.markdown(report["scaling"]), end="")
    else:
        with _measuring():
            import jax

            devices = jax.local_devices(backend="gpu")
            if len(devices) < min(scaling.COUNTS):
                raise _Stop(NO_GPU, f"{len(devices)} GPU: scaling needs {min(scaling.COUNTS)}")
            report = scaling.main(devices, args.rounds, args.json)
    if args.write_docs:
        text = f"{reports.conditions(report)}.\n\n{scaling.markdown(report['scaling'])}"
        reports.write_section(PAGE, "benchmark-scaling", text)


def _report(args: argparse.Namespace, points: Iterable[Any], measure: Callable[[], Any]) -> Any:
    """What measure() gives, or the file that --table names; None if --list wants just the points' names."""
    if args.list:
        print("\n".join(p.name for p in points))
        return None
    if args.table:
        return json.loads(Path(args.table).read_text(encoding="utf-8"))
    with _measuring():
        return measure()


def _ring(args: argparse.Namespace) -> None:
    from . import ring, ring_tables

    points = ring.points(args.points.split(","))
    wanted = args.contenders.split(",") if args.contenders else ring.STRATEGIES
    report = _report(args, points, lambda: ring.main(points, args.rounds, args.json, wanted))
    if args.table and report is not None:
        print(ring_tables.markdown(report), end="")
    if args.write_docs and report is not None:
        text = f"{ring_tables.setting(report)}.\n\n{ring_tables.grid(report)}"
        reports.write_section(PAGE, "benchmark-ring", text)


def _fp8_error(args: argparse.Namespace) -> None:
    from . import fp8_error

    points = fp8_error.points(args.points.split(","))
    report = _report(args, points, lambda: fp8_error.main(points, args.json))
    if report is None:
        return
    text = fp8_error.markdown(report)
    print(text, end="")
    if args.write_docs:
        reports.write_section(PAGE, "benchmark-fp8-error", text)


def _decode(args: argparse.Namespace) -> None:
    from . import decode, decode_points

    points = decode_points.points(args.points.split(","))
    report = _report(args, points, lambda: decode.main(points, args.rounds, args.json))
    if report is not None:
        print(decode.markdown(report), end="")
        if args.write_docs:
            text = f"{reports.conditions(report)}.\n\n{decode.markdown(report)}"
            reports.write_section(PAGE, "benchmark-decode", text)
        if args.plot:
            from .plot import plot_decode

            print("\n".join(str(path) for path in plot_decode(report, args.plot)))


def _by_itself(name: str, args: argparse.Namespace) -> None:
    """A suite whose module has points(), main() and markdown(), and prints as it goes."""
    suite = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    points = suite.points(args.points.split(","))
    report = _report(args, points, lambda: suite.main(points, args.rounds, args.json))
    if args.table and report is not None:
        print(suite.markdown(report), end="")
    if args.write_docs and report is not None:
        text = f"{reports.conditions(report)}.\n\n{suite.markdown(report)}"
        reports.write_section(PAGE, f"benchmark-{name}", text)


ALONE = {
    "scaling": _scaling,
    "ring": _ring,
    "fp8-error": _fp8_error,
    "decode": _decode,
    "forward-mode": functools.partial(_by_itself, "forward-mode"),
    "wide": functools.partial(_by_itself, "wide"),
}


def _suites(args: argparse.Namespace) -> None:
    points = [_only(p, args.contenders) for p in select(args.suites, args.points.split(","))]
    if args.list:
        print("\n".join(f"{p.suite:<14}{p.name}" for p in points))
        return
    if args.table:
        files = [Path(name) for name in args.table.split(",")]
        report = reports.joined([json.loads(x.read_text(encoding="utf-8")) for x in files])
        print(reports.markdown(report), end="")
    else:
        if not points:
            raise _Stop(NO_POINT, f"no point is called {args.points}: see --list")
        with _measuring():
            from .run import measure_all

            report = measure_all(points, args.rounds, args.json, args.resume, args.minutes)
        print(f"\n{reports.markdown(report)}", end="")
    if args.write_docs:
        reports.write_page(PAGE, report)
    if args.plot:
        from .plot import plot

        print("\n".join(str(path) for path in plot(report, args.plot)))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv, __doc__, ALONE)
    run = _suites if args.quick else ALONE.get(args.suite, _suites)
    try:
        run(args)
    except _Stop as stop:
        code, reason = stop.args
        print(reason, file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
