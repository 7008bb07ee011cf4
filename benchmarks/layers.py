"""`python -m benchmarks.layers`: the attention of one layer in tokamax, MaxText and Levanter, by what the
project uses by default on this GPU and by its adapter in jax_fa3.integrations.

Of the projects those that are installed; tokamax is enough for MaxText too, whose default is a call of it.
Llama 3 8B's heads (32 and 8 of 128), 2 x 4096 tokens, bf16; device time in rounds.
"""

import argparse
import functools
import importlib.metadata
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa3

from . import report as reports
from .__main__ import NO_GPU, why_not_here
from .timing import Call, device_time, environment, flusher, gpu_state, in_rounds, ratio

PAGE = Path(__file__).resolve().parent.parent / "docs" / "integrations.md"
SIZES = 2, 4096, 32, 8, 128  # [B, T, N, K, H]
CAP_SIZES = 2, 4096, 16, 8, 256  # Gemma 2's
OURS, DEFAULT = "jax_fa3", "default"
FAR = 0.02  # of the norm of out: no two right results in bf16 differ by more

Layer = tuple[str, tuple[int, ...], dict[str, Callable[..., Any]]]


def _documents(length: int) -> jax.Array:
    """Ids [T] of four documents, from 1 on: 0 is padding."""
    ends = np.cumsum([length // 4, length // 2, length // 8])
    return jnp.asarray(1 + np.searchsorted(ends, np.arange(length), side="right"))


def tokamax_layers(implementation: Any) -> Iterator[Layer]:
    tokamax: Any = importlib.import_module("tokamax")
    adapter: Any = importlib.import_module("jax_fa3.integrations.tokamax")
    cases: tuple[tuple[str, Any, dict[str, Any]], ...] = (
        ("causal", SIZES, {}),
        ("causal, window of 1024", SIZES, {"local_window_size": (1023, 0)}),
        ("causal, soft cap, head dim 256", CAP_SIZES, {"logits_soft_cap": 50.0}),
    )
    for name, sizes, options in cases:
        call = functools.partial(tokamax.dot_product_attention, is_causal=True, **options)
        ours = functools.partial(call, implementation=[adapter.Attention(implementation)])
        yield f"tokamax, {name}", sizes, {OURS: ours, DEFAULT: call}


def maxtext_layers(implementation: Any) -> Iterator[Layer]:
    """What its AttentionOp calls on a GPU with attention=autoselected: tokamax's Triton kernel, documents
    as a dense mask. (MaxText scales query before.)"""
    base: Any = importlib.import_module("tokamax._src.ops.attention.base")
    triton: Any = importlib.import_module("tokamax._src.ops.attention.pallas_triton")
    kernel = triton.PallasTritonFlashAttention()

    for name in ("causal", "causal, packed"):

        def default(q: Any, k: Any, v: Any, packed: bool = "packed" in name) -> Any:
            mask = base.Mask(is_causal=True)
            if packed:
                ids = _documents(q.shape[1])
                mask = mask & base.Mask((ids[:, None] == ids)[None, None].repeat(q.shape[0], 0))
            return kernel(q, k, v, logits_scale=1.0, mask=mask)

        def ours(q: Any, k: Any, v: Any, packed: bool = "packed" in name) -> Any:
            ids = jnp.tile(_documents(q.shape[1]), (q.shape[0], 1))
            given: Any = {"query_segment_ids": ids, "key_value_segment_ids": ids}
            masks = given | {"padding_segment_id": 0} if packed else {}
            return jax_fa3.dot_product_attention(
                q, k, v, is_causal=True, scale=1.0, implementation=implementation, **masks
            )

        yield f"MaxText, {name}", SIZES, {OURS: _scaled(ours), DEFAULT: _scaled(default)}


def _scaled(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda q, k, v: call(q * q.shape[-1] ** -0.5, k, v)


def levanter_layers(implementation: Any) -> Iterator[Layer]:
    """Its default without TransformerEngine, which it would call if it were there."""
    levanter: Any = importlib.import_module("levanter.layers.attention")
    hax: Any = importlib.import_module("haliax")
    adapter: Any = importlib.import_module("jax_fa3.integrations.levanter")
    original = levanter._te_flash_attention

    def call(q: Any, k: Any, v: Any, ours: bool) -> Any:
        b, t, n, h = q.shape
        kv = k.shape[2]
        B, Q, S, K, G, D = hax.make_axes(b=b, q=t, k=t, kv=kv, g=n // kv, d=h)
        query = hax.named(q.reshape(b, t, kv, n // kv, h), (B, Q, K, G, D))
        key, value = (hax.named(x, (B, S, K, D)) for x in (k, v))
        options = {"attn_backend": levanter.AttentionBackend("nvte")} if ours else {}
        levanter._te_flash_attention = original
        if ours:
            adapter.install(implementation=implementation)
        mask = levanter.AttentionMask.causal()
        out = levanter.dot_product_attention(Q, S, D, query, key, value, mask=mask, **options)
        return out.rearrange((B, Q, K, G, D)).array.reshape(b, t, n, h)

    cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    contenders = {OURS: functools.partial(call, ours=True)}
    contenders |= {DEFAULT: functools.partial(call, ours=False)}
    contenders |= {"cuDNN by jax.nn": cudnn} if implementation == "fa3" else {}
    yield "Levanter, causal", SIZES, contenders


PROJECTS = {"tokamax": tokamax_layers, "MaxText": maxtext_layers, "Levanter": levanter_layers}


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
    """One record of forward, and one of forward and backward."""
    name, (b, t, n, k, h), contenders = layer
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(b, t, heads, h) for heads in (n, k, k)]
    arrays = [jax.random.normal(*x, jnp.bfloat16) for x in zip(keys, shapes, strict=True)]
    for title, wrap in (("forward", lambda x: x), ("forward and backward", _with_gradients)):
        calls = {who: Call(jax.jit(wrap(call)), tuple(arrays)) for who, call in contenders.items()}
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


def table(report: dict[str, Any]) -> str:
    lines = ["| one layer's attention | pass | by its default | by jax_fa3 | times as fast |"]
    lines.append("|---|---|---|---|---|")
    ours = {(x["case"], x["pass"]): x["ms"] for x in report["results"] if x["by"] == OURS}
    for x in report["results"]:
        if x["by"] != OURS:
            case = x["case"] + (f" ({x['by']})" if x["by"] != DEFAULT else "")
            mine = ours[x["case"], x["pass"]]
            cells = case, x["pass"], f"{x['ms']:.2f} ms", f"{mine:.2f} ms", f"{x['faster']:.2f}"
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
        report["environment"]["versions"] |= _versions("tokamax", "marin-levanter")
        report["results"] = []
        for project in args.projects.split(","):
            for layer in PROJECTS[project]("fa3"):
                report["results"] += measure(layer, args.rounds, between)
                if args.json:
                    args.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(table(report), end="")
    if args.write_docs:
        text = f"{reports.conditions(report)}.\n\n{table(report)}"
        reports.write_section(PAGE, "benchmark-layers", text)


if __name__ == "__main__":
    main()
