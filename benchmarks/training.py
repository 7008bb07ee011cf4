"""`python -m benchmarks.training`: whole training steps of examples/train_transformer.py.

Speed: one step of each contender in turn, wall time, the same plain causal model and batch with each
implementation, and with packed documents by this library. `--mesh 2x4` splits batches over 2 GPUs and
heads over 4; with `--heads 8 --kv-heads 2` over more of them than there are key/value heads. `--curves`
trains one model after the other instead, on the same batches from the same parameters, and draws the
losses in one plot.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import train_transformer as example  # pyright: ignore[reportMissingImports]

from . import report as reports
from . import training_mesh
from .__main__ import NO_GPU, PAGE, why_not_here

Contender = tuple[str, Any]  # its name and its example.Config


def contenders(size: str, implementations: list[str], **changes: Any) -> list[Contender]:
    """The plain model of each implementation, and the packed one of the first that has such a mask."""
    config = dataclasses.replace(example.SIZES[size], packed=False, **changes)
    plain = [(name, dataclasses.replace(config, implementation=name)) for name in implementations]
    packed = [(f"{name}, packed", dataclasses.replace(x, packed=True)) for name, x in plain]
    return plain + [(name, x) for name, x in packed if x.implementation != "cudnn"][:1]


def time_steps(models: list[Contender], rounds: int, mesh: Any = None) -> dict[str, dict[str, Any]]:
    """Seconds of each round's step, and the operations of one, after a step to compile and one more."""
    text = example.Text(models[0][1])
    states = {name: example.initialize(config) for name, config in models}
    if mesh is not None:
        states = {name: training_mesh.put_state(mesh, x) for name, x in states.items()}
    results: dict[str, dict[str, Any]] = {name: {"seconds": []} for name, _ in models}
    for step in range(-2, rounds):
        for name, config in models:
            batch: Any = text.batch(config, step + 2)
            batch = training_mesh.put_batch(mesh, batch) if mesh else jax.device_put(batch)
            jax.block_until_ready((batch, states[name]))
            start = time.perf_counter()
            states[name], loss, flops = example.train_step(config, states[name], *batch)
            jax.block_until_ready((loss, states[name]))
            if step < 0:
                print(f"{name}: {time.perf_counter() - start:.1f} s before round 0", flush=True)
            else:
                results[name]["seconds"].append(time.perf_counter() - start)
                results[name] |= {"flops": float(flops), "loss": float(loss)}
    return results


def table(models: list[Contender], results: dict[str, dict[str, Any]]) -> str:
    """Markdown: tokens/s, MFU, and the median over the rounds of the speed relative to the last
    plain contender's (cuDNN, in the default order)."""
    baseline = [name for name, config in models if not config.packed][-1]
    lines = [f"| | tokens/s | MFU | speed of {baseline} = 1 |", "|---|---|---|---|"]
    for name, config in models:
        seconds = results[name]["seconds"]
        middle = statistics.median(seconds)
        peak = example.peak_flops()
        mfu = f"{results[name]['flops'] / middle / peak:.1%}" if peak else "-"
        pairs = zip(results[baseline]["seconds"], seconds, strict=True)
        ratio = statistics.median(theirs / ours for theirs, ours in pairs)
        lines.append(
            f"| {name} | {config.rows * config.length / middle:,.0f} | {mfu} | {ratio:.3f} |"
        )
    return "\n".join(lines)


def curves(models: list[Contender]) -> dict[str, list[float]]:
    """Every step's loss."""
    losses = {}
    for name, config in models:
        print(name)
        text = example.Text(config)
        every = max(1, config.steps // 20)
        _, losses[name] = example.train(config, example.initialize(config), text, every)
    return losses


def plot(losses: dict[str, list[float]], file: Path) -> None:
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, values) in enumerate(losses.items()):
        axes.plot(values, label=name, linestyle=("-", "--", ":")[i % 3])
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.savefig(file, dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=example.SIZES, default="350m")
    parser.add_argument(
        "--implementations", help="comma-separated; default fa3,cudnn, with --curves fa3,fp8,xla"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="with --curves (matplotlib)")
    parser.add_argument(
        "--write-docs", action="store_true", help="put the table of speeds into docs/benchmarks.md"
    )
    parser.add_argument("--mesh", help="GPUs for batches x GPUs for heads, such as 2x4")
    numbers = ("steps", "length", "rows", "heads", "kv_heads")
    for name in numbers:
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, help="instead of the size's own")
    args = parser.parse_args(argv)
    changes = {x: getattr(args, x) for x in numbers if getattr(args, x)}
    default = "fa3,fp8,xla" if args.curves else "fa3,cudnn"
    names = str(args.implementations or default).split(",")
    if {"fa3", "cudnn"} & set(names) and (reason := why_not_here()):
        parser.exit(NO_GPU, f"{reason}\n")
    models = contenders(args.size, names, **changes)
    mesh = training_mesh.make_mesh(args.mesh) if args.mesh else None
    if mesh:
        example.ATTENTION["cudnn"] = training_mesh.cudnn(mesh.shape["model"])
    report: dict[str, Any] = {
        "mesh": args.mesh,
        "gpu": jax.devices()[0].device_kind,
        "size": args.size,
        "versions": {"jax": jax.__version__, "jax_fa3": example.jax_fa3.__version__},
    }
    if args.curves:
        # Packed, as the example is by default.
        packed = [(n, dataclasses.replace(c, packed=True)) for n, c in models if not c.packed]
        report["losses"] = curves(packed)
        for name, losses in report["losses"].items():
            print(f"{name}: mean loss of the last 50 steps {statistics.mean(losses[-50:]):.4f}")
        if args.plot:
            plot(report["losses"], args.plot)
    else:
        report["steps"] = time_steps(models, args.rounds, mesh)
        text = table(models, report["steps"])
        on = f"mesh {args.mesh}, " if mesh else ""
        print(f"{report['gpu']}, {on}{args.size}: {models[0][1]}\n\n{text}")
        if args.write_docs:
            reports.write_section(PAGE, "benchmark-training", f"{text}\n")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
