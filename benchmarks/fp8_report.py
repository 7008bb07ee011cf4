"""The tables of the suite "fp8"."""

from typing import Any

from . import records
from .fp8 import MEANS, TRANSPOSED
from .grid import by_length, grid


def tables(results: list[dict[str, Any]], shapes: str) -> list[str]:
    contenders = {name for r in results for name in r["results"]}
    also = "; and as cuDNN's FP8 where `quantize` has written value transposed"
    intro = (
        "TFLOP/s of the attention alone, on inputs that are e4m3 already; in brackets times as fast as "
        "cuDNN's FP8 (JAX's private API), and as this library in bf16"
        f"{also if TRANSPOSED in contenders else ''}; {shapes}:"
    )
    forward = [r for r in results if r["pass_name"] == "fp8"]
    blocks = [[intro, "", *grid(forward, beside="fa3", also=TRANSPOSED)]] if forward else []
    also = "; and that share where means of keys and values are found and taken out, too"
    intro = (
        "Preparation: Hadamard transform and quantization of query and key, quantization of value. "
        "GB/s of 16-bit numbers read and e4m3 numbers written, in brackets as a share of what a copy "
        f"of as many bytes reaches{also if MEANS in contenders else ''}:"
    )
    if len(results) > len(forward):
        blocks.append([intro, "", *_preparation(results)])
    return ["\n".join(block) for block in blocks]


def _preparation(results: list[dict[str, Any]]) -> list[str]:
    """GB/s and ratio to the copy; the time as a share of the attention's on what was prepared."""
    ms = {
        (r["head_dim"], r["seqlen"], r["mask"]): records.ours(r).get("ms")
        for r in results
        if r["pass_name"] == "fp8"
    }
    rows: dict[str, dict[int, str]] = {}
    for result in (r for r in results if r["pass_name"] == "prepare"):
        record = records.ours(result)
        dim, length = result["head_dim"], result["seqlen"]
        speed = rows.setdefault(f"preparation, head dim {dim}, GB/s", {})
        share = rows.setdefault(f"its time of the attention's, head dim {dim}, full / causal", {})
        if "ms" in record:
            attention = [ms.get((dim, length, mask)) for mask in ("full", "causal")]
            ratios = record["ratio"], result["results"].get(MEANS, {}).get("ratio")
            shown = "; ".join(f"{x:.2f}" for x in ratios if x is not None)
            speed[length] = f"{record['gb_per_s']:.0f}" + (f" ({shown})" if shown else "")
            share[length] = " / ".join(f"{record['ms'] / x:.0%}" if x else "–" for x in attention)
    return by_length(rows)
