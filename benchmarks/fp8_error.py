"""`python -m benchmarks --suite fp8-error`: how far FP8 attention is from the truth, as in table 3 of
the FlashAttention-3 paper (arXiv 2407.08608, section 4.3).

Root mean square error against fp64 maths of the same fp16 inputs, the mean over seeds. The paper's
inputs are N(0, 1) + N(0, 100) * Bernoulli(0.001): every number is normally distributed with standard
deviation 1, and one in a thousand has another normal number added, of standard deviation 10. It does
not say their shape. Other inputs (fp8_inputs.py) are like those of trained models: values with means,
keys with constant channels, attention sinks; there cuDNN's FP8 is measured, too.
"""

import dataclasses
import fnmatch
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

import jax_fa3
from jax_fa3 import fp8

from .check import WrongResult
from .fp8 import cudnn_fp8, cudnn_parameters, quantized
from .fp8_inputs import TITLES, VALUES, draw
from .timing import environment

HEAD_DIMS = (64, 128, 256)
VALUE_HEAD_DIMS = (64, 128, 192, 256)
VALUE_LENGTHS = (8192, 131072)
LENGTHS = (1024, 8192, 32768, 131072)
SCORES = 2**26  # of a head that are computed: of long sequences only the first queries attend
SCORES_AT_ONCE = 2**23


@dataclasses.dataclass(frozen=True)
class ErrorPoint:
    """Full attention of one batch entry; `seqlen`, a power of two, is the number of keys."""

    inputs: str  # of fp8_inputs.KINDS
    head_dim: int
    seqlen: int
    heads: int = 16
    seeds: int = 8
    implementation: Literal["fa3", "xla"] = "fa3"

    @property
    def name(self) -> str:
        return f"{self.inputs}-d{self.head_dim}-s{self.seqlen}"

    @property
    def rows(self) -> int:
        return min(self.seqlen, SCORES // self.seqlen)


def points(patterns: Iterable[str] = ("*",)) -> list[ErrorPoint]:
    grid = itertools.product
    paper = [ErrorPoint(*x) for x in grid(("outliers", "spread"), HEAD_DIMS, LENGTHS)]
    few = functools.partial(ErrorPoint, heads=4, seeds=2)
    made = paper + [few(*x) for x in grid(VALUES, VALUE_HEAD_DIMS, VALUE_LENGTHS)]
    return [p for p in made if any(fnmatch.fnmatch(p.name, pattern) for pattern in patterns)]


def _standard(query: jax.Array, key: jax.Array, value: jax.Array, dtype: Any) -> jax.Array:
    """Attention whose scores, probabilities and output are arrays of `dtype`, a block of rows of one
    head at a time. Matmuls and softmax compute in fp32, or in fp64 where that is the dtype."""
    wide = jnp.promote_types(dtype, jnp.float32)
    matmul = partial(jnp.matmul, precision="highest", preferred_element_type=wide)

    def narrowed(x):
        # The barrier keeps XLA from dropping both conversions.
        return lax.optimization_barrier(x.astype(dtype))

    def head(qkv):
        q, k, v = (x.astype(dtype) for x in qkv)

        def block(rows):
            scores = narrowed(matmul(rows, k.T) * query.shape[-1] ** -0.5)
            probabilities = narrowed(jax.nn.softmax(scores.astype(wide), axis=-1))
            return matmul(probabilities, v).astype(dtype)

        size = min(len(q), SCORES_AT_ONCE // len(k))
        return lax.map(block, q.reshape(-1, size, q.shape[-1])).reshape(q.shape)

    by_head = (x[0].swapaxes(0, 1) for x in (query, key, value))
    return lax.map(head, tuple(by_head)).swapaxes(0, 1)[None]


# cuBLAS it shall be: searching Triton's tilings would take longer than all the rest.
_jit = partial(jax.jit, compiler_options={"xla_gpu_enable_triton_gemm": False})
_in_fp64 = _jit(partial(_standard, dtype=jnp.float64))

# Name in the table, figure of the paper's table, and who computes it.
VARIANTS: dict[str, tuple[float | None, Callable[..., jax.Array]]] = {
    "fp16": (1.9e-4, jax_fa3.dot_product_attention),
    "fp16, standard attention": (
        3.2e-4,
        lambda *qkv, implementation: _standard(*qkv, dtype=jnp.float16),
    ),
    "FP8": (9.1e-3, fp8.dot_product_attention),
    "FP8, a scale per head": (None, partial(fp8.dot_product_attention, quantization="head")),
    "FP8, a scale per array": (9.3e-3, partial(fp8.dot_product_attention, quantization="tensor")),
    "FP8, not incoherent": (2.4e-2, partial(fp8.dot_product_attention, incoherent_key=None)),
    "FP8, neither (baseline)": (
        2.4e-2,
        partial(fp8.dot_product_attention, quantization="tensor", incoherent_key=None),
    ),
}


def _one_scale(
    query: jax.Array, key: jax.Array, value: jax.Array, *, implementation: str
) -> jax.Array:
    """Of arrays that are e4m3 already, by this library and others: a scale for each."""
    arrays = quantized((query, key, value))
    if implementation == "cudnn":
        q8, k8, v8, *_ = arrays
        out = cudnn_fp8(q8, k8, v8, cudnn_parameters(arrays))
        return out.astype(jnp.float32) * arrays[5][0, 0, 0]
    call: Any = fp8.quantized_dot_product_attention
    return call(*arrays, dtype=jnp.float16, implementation=implementation)


VALUE_VARIANTS: dict[str, tuple[float | None, Callable[..., jax.Array]]] = {
    "fp16": VARIANTS["fp16"],
    "FP8": VARIANTS["FP8"],
    "FP8, means left": (None, partial(fp8.dot_product_attention, smooth_k=False, smooth_v=False)),
    "FP8, e4m3 already": (None, _one_scale),
    "cuDNN's FP8": (None, lambda *qkv, implementation: _one_scale(*qkv, implementation="cudnn")),
}


def variants_of(p: ErrorPoint) -> dict[str, tuple[float | None, Callable[..., jax.Array]]]:
    if p.inputs not in VALUES:
        return VARIANTS
    here = p.implementation == "fa3"  # on a Hopper GPU
    return {name: x for name, x in VALUE_VARIANTS.items() if here or "cuDNN" not in name}


@functools.cache
def _jitted(name: str, implementation: str) -> Callable[..., jax.Array]:
    function = (VARIANTS | VALUE_VARIANTS)[name][1]
    return _jit(partial(function, implementation=implementation))


@jax.jit
def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float64))))


def measure(p: ErrorPoint) -> dict[str, Any]:
    """Errors of all variants. Raises WrongResult where one is not finite."""
    variants = variants_of(p)
    errors: dict[str, list[float]] = {name: [] for name in variants}
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    sizes = []
    for seed in range(p.seeds):
        qkv = draw(seed, p.inputs, p.rows, p.seqlen, p.heads, p.head_dim)
        outs = {name: _jitted(name, p.implementation)(*qkv) for name in variants}
        with jax.enable_x64(True):
            truth = _in_fp64(*qkv)
            sizes.append(float(_rms(truth)))
            for name, out in outs.items():
                error = float(_rms(out - truth))
                if not error < float("inf"):  # a NaN fails too
                    raise WrongResult(f"{p.name}, {name}: the error is {error}")
                errors[name].append(error)
                ratios[name].append(float(out.astype(jnp.float64).sum() / truth.sum()))
    return {
        **dataclasses.asdict(p),
        "name": p.name,
        "rows": p.rows,
        "rms": statistics.mean(sizes),
        "rmse": {name: statistics.mean(found) for name, found in errors.items()},
        "rmse_by_seed": errors,
        # Of the sums of all numbers: what is lost of values with a mean.
        "found_over_true": {name: statistics.mean(found) for name, found in ratios.items()},
    }


def _paper_table(result: dict[str, Any]) -> Iterator[str]:
    yield "| | RMSE | in the paper |"
    yield "|---|---|---|"
    for name, (paper, _) in VARIANTS.items():
        theirs = "–" if paper is None else f"{paper:.1e}"
        yield f"| {name} | {result['rmse'][name]:.2e} | {theirs} |"
    yield f"| baseline over FP8 | {_gain(result):.2f} | {2.4e-2 / 9.1e-3:.2f} |"


def _gain(result: dict[str, Any]) -> float:
    return result["rmse"]["FP8, neither (baseline)"] / result["rmse"]["FP8"]


def _lengths_table(results: list[dict[str, Any]]) -> Iterator[str]:
    titles = ["head dim", "keys", "RMS of the output", *VARIANTS, "baseline over FP8"]
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    for r in results:
        errors = [f"{x:.2e}" for x in (r["rms"], *r["rmse"].values())]
        yield f"| {r['head_dim']} | {r['seqlen']} | {' | '.join(errors)} | {_gain(r):.2f} |"


def _values_table(results: list[dict[str, Any]]) -> Iterator[str]:
    names = [name for name in VALUE_VARIANTS if name in results[0]["rmse"]]
    mean = results[0]["inputs"] in ("mean0.5", "mean1", "mean2")  # else sums are near 0
    titles = ["head dim", "keys", "RMS of the output", *names]
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    for r in results:
        cells = [f"{r['rmse'][x]:.2e}" for x in names]
        if mean:
            cells = [
                f"{x}; {r['found_over_true'][y]:.3f}" for x, y in zip(cells, names, strict=True)
            ]
        yield f"| {r['head_dim']} | {r['seqlen']} | {r['rms']:.2e} | {' | '.join(cells)} |"


def markdown(report: dict[str, Any]) -> str:
    """The paper's table where its point was measured; then each kind of inputs by head dim, length."""
    results = report["points"]
    blocks = []
    for r in results:
        if (r["inputs"], r["head_dim"], r["seqlen"]) == ("outliers", 128, 8192):
            intro = f"Inputs with outliers, head dim 128, 8,192 keys, mean of {r['seeds']} seeds:"
            blocks.append([intro, "", *_paper_table(r)])
    for kind, intro in TITLES.items():
        chosen = [r for r in results if r["inputs"] == kind]
        if chosen:
            table = _values_table if kind in VALUES else _lengths_table
            blocks.append([intro, "", *table(chosen)])
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def main(selected: list[ErrorPoint], file: Path | None) -> dict[str, Any]:
    """Measures, prints and writes the JSON after each point."""
    report: dict[str, Any] = {"suite": "fp8-error", "environment": environment(), "points": []}
    for p in selected:
        result = measure(p)
        shown = ", ".join(f"{name} {error:.2e}" for name, error in result["rmse"].items())
        print(f"{p.name}: {shown}", flush=True)
        report["points"].append(result)
        if file:
            file.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report
