"""What `python -m benchmarks` takes."""

import argparse
import math
from collections.abc import Container
from pathlib import Path

from .suites import SUITES

NO_POINT, NO_GPU, WRONG = 1, 2, 3  # exit codes


def parse(
    argv: list[str] | None, description: str | None, alone: Container[str]
) -> argparse.Namespace:
    """alone: suites that are not of points that --suite can name together."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Exit codes: {NO_GPU} without a Hopper GPU, {WRONG} where this library's result is wrong.",
    )
    add = parser.add_argument
    add(
        "--suite",
        default="paper",
        help=f"comma-separated: {', '.join(SUITES)}, or all (default: paper); or one of these alone: "
        "fp8-error, decode, forward-mode, wide; on several GPUs: scaling, ring",
    )
    add(
        "--points",
        default="*",
        help="only points with these names, comma-separated, * and ? allowed",
    )
    add(
        "--quick",
        action="store_true",
        help="8 points against cuDNN and dew-flash-attn, in at most 90 s",
    )
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
        "--resume",
        action="store_true",
        help="keep what the JSON file has, measure the other points and add them",
    )
    add(
        "--minutes",
        type=float,
        default=math.inf,
        help="begin no point after so many; --resume goes on",
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
        "--write-docs",
        action="store_true",
        help="put the tables into docs/benchmarks.md, between its markers",
    )
    args = parser.parse_args(argv)
    suites = [s for s in SUITES if s != "quick"] if args.suite == "all" else args.suite.split(",")
    unknown = [s for s in suites if s not in SUITES]
    if unknown and args.suite not in alone:
        parser.error(f"--suite: unknown {', '.join(unknown)}; there are {', '.join(SUITES)}")
    args.suites = ["quick"] if args.quick else suites
    if args.resume and not args.json:
        parser.error("--resume: expected --json FILE, found none")
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, found {args.rounds}")
    return args
