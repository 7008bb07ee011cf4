"""The FlashAttention-3 paper's plots, TFLOP/s against sequence length per head dim and mask; and of the
suite of models each row's ratio to the better rival."""

from pathlib import Path
from typing import Any

from . import models_report, records
from .decode_points import POINTS, DecodePoint

NAMES = {"fwd": "forward", "bwd": "backward", "fwd+bwd": "both", "fp8": "FP8 forward"}
COLOURS = {
    "fa3": "C3",
    "cudnn": "C0",
    "pallas": "C1",
    "flash-attn3-jax": "C2",
    "dew": "C5",
    "fa3 fp8": "C4",
    "cudnn fp8": "C9",
}


def plot(report: dict[str, Any], folder: Path) -> list[Path]:
    """Writes one PNG per pass of the suites "paper", "quick" and "fp8", the preparation left out, and
    models.png of the suite "models".

    Raises ImportError without matplotlib.
    """
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    folder.mkdir(parents=True, exist_ok=True)
    grids = "paper", "quick", "fp8"
    grid = [r for r in report["points"] if r["suite"] in grids and r["pass_name"] in NAMES]
    written = []
    for pass_name in dict.fromkeys(r["pass_name"] for r in grid):
        results = [r for r in grid if r["pass_name"] == pass_name]
        masks = list(dict.fromkeys(r["mask"] for r in results))
        dims = sorted({r["head_dim"] for r in results})
        size = (4.5 * len(dims), 3.2 * len(masks))
        figure, axes = plt.subplots(
            len(masks), len(dims), figsize=size, squeeze=False, layout="constrained"
        )
        for row, mask in enumerate(masks):
            for column, dim in enumerate(dims):
                chosen = [r for r in results if r["mask"] == mask and r["head_dim"] == dim]
                _panel(axes[row][column], sorted(chosen, key=lambda r: r["seqlen"]))
                axes[row][column].set_title(f"head dim {dim}, {mask}")
        figure.legend(*_legend(axes), loc="outside lower center", ncols=4)
        figure.suptitle(f"{NAMES[pass_name]}, {report['environment']['gpu']}")
        path = folder / f"{NAMES[pass_name].lower().replace(' ', '_')}.png"
        figure.savefig(path, dpi=150)
        plt.close(figure)
        written.append(path)
    models = [r for r in report["points"] if r["suite"] == "models"]
    if models:
        path = folder / "models.png"
        figure = plt.figure(figsize=(15, 2 + 0.1 * len(models)), layout="constrained")
        _models(figure, models)
        figure.suptitle(
            f"Times as fast as the better of cuDNN and dew, {report['environment']['gpu']}"
        )
        figure.savefig(path, dpi=150)
        plt.close(figure)
        written.append(path)
    return written


def plot_decode(report: dict[str, Any], folder: Path) -> list[Path]:
    """Writes decode.png: what share of a device copy's bandwidth a token's attention has, by the number
    of sequences and their length.

    Raises ImportError without matplotlib.
    """
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    plain = {p.name: p for p in POINTS if p.bar and p == DecodePoint(p.batch, p.length, bar=p.bar)}
    results = [r for r in report["points"] if r["name"] in plain]
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    names = "fa3", "cudnn"
    for i, name in enumerate(names):
        heights = [r[name]["of_copy"] if name in r else 0 for r in results]
        places = [x + (i - 0.5) * 0.4 for x in range(len(results))]
        axis.bar(places, heights, 0.4, label=name, color=COLOURS[name])
    axis.axhline(1, color="black", linewidth=0.8)
    shapes = [plain[r["name"]] for r in results]
    axis.set_xticks(range(len(results)), [f"{p.batch} × {p.length}" for p in shapes])
    axis.set_xlabel("sequences × length")
    axis.set_ylabel(f"of a copy's {report['copy'] / 1e12:.2f} TB/s")
    axis.legend()
    axis.set_title(f"One token on a KV cache, 32/8 heads × 128, {report['environment']['gpu']}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "decode.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return [path]


def _models(figure: Any, results: list[dict[str, Any]]) -> None:
    """Forward and backward side by side, the best row on top; red: under its bar."""
    for axis, pass_name in zip(figure.subplots(1, 2), ("fwd", "bwd"), strict=True):
        rows = [
            (best, f"{r['model']}: {models_report.shape(r)}", best < models_report.bar(r))
            for r in results
            if r["pass_name"] == pass_name and (best := records.of_the_best(r)) is not None
        ]
        rows.sort()
        colours = ["C3" if missed else "C2" for _, _, missed in rows]
        axis.barh(range(len(rows)), [best for best, _, _ in rows], color=colours)
        axis.set_yticks(range(len(rows)), [name for _, name, _ in rows], fontsize=6)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.margins(y=0.01)
        axis.set_title(NAMES[pass_name])


def _legend(axes: Any) -> tuple[list[Any], list[str]]:
    """Every contender once: not everybody runs every head dim."""
    entries = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    return list(entries.values()), list(entries)


def _panel(axis: Any, results: list[dict[str, Any]]) -> None:
    """Bars side by side, one group per length, as in the paper's figure 5."""
    ran = (name for r in results for name, x in r["results"].items() if "tflops" in x)
    names = list(dict.fromkeys(ran))
    width = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        heights = [r["results"].get(name, {}).get("tflops", 0) for r in results]
        places = [x + (i - (len(names) - 1) / 2) * width for x in range(len(results))]
        axis.bar(places, heights, width, label=name, color=COLOURS.get(name))
    axis.set_xticks(range(len(results)), [str(r["seqlen"]) for r in results])
    axis.set_xlabel("sequence length")
    axis.set_ylabel("TFLOP/s")
