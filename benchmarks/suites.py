"""What is measured: the points of the tables. Nothing here needs a GPU."""

import fnmatch
from collections.abc import Iterable

from . import features
from .fp8 import MEANS, TRANSPOSED
from .models import models
from .points import RIVALS, TOKENS, Point, point

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)

# Seven documents of mixed lengths in one row of 16,384 tokens.
DOCUMENTS = (309, 4015, 1024, 2750, 3500, 777, 4009)


def _paper(pass_name: str, *contenders: str) -> list[Point]:
    return [
        point(
            "paper",
            head_dim,
            seqlen,
            is_causal=is_causal,
            pass_name=pass_name,
            contenders=("fa3", *contenders),
        )
        for head_dim in (64, 128, 256)
        for is_causal in (False, True)
        for seqlen in LENGTHS
    ]


def _all_passes() -> list[Point]:
    backward = _paper("bwd", "cudnn", "flash-attn3-jax", "dew")
    return [*_paper("fwd", *RIVALS), *backward, *_paper("fwd+bwd", "cudnn", "dew")]


def _quick() -> list[Point]:
    wanted = [(128, False, 1024), (128, False, 16384), (128, True, 1024), (128, True, 16384)]
    wanted += [(64, False, 2048), (64, True, 16384), (256, False, 2048), (256, True, 16384)]
    names = ("fa3", "cudnn", "dew")
    return [point("quick", d, s, is_causal=c, contenders=names) for d, c, s in wanted]


def _masks() -> list[Point]:
    """That masks are free: each point's baseline is this library with a cheaper way to say as much."""
    arrays = ("fa3 arrays", "fa3", "cudnn", "dew")
    packed = {
        "documents": DOCUMENTS,
        "contenders": ("fa3", "fa3 full", "dew"),
        "baseline": "fa3 full",
    }
    return [
        point("masks", 128, 8192, is_causal=True, contenders=arrays, baseline="fa3"),
        point("masks", 128, TOKENS, **packed),
        point("masks", 128, TOKENS, is_causal=True, **packed),
        point(
            "masks",
            128,
            TOKENS,
            documents=DOCUMENTS,
            pass_name="intervals",
            contenders=("fa3", "xla"),
            baseline="xla",
        ),
    ]


def _gqa() -> list[Point]:
    return [
        point("gqa", d, s, heads=heads, is_causal=is_causal, pass_name=pass_name)
        for pass_name in ("fwd", "bwd")
        for d, s, heads in ((128, 8192, (32, 8)), (128, 2048, (32, 8)), (128, 8192, (16, 1)))
        for is_causal in (False, True)
    ]


def _deterministic() -> list[Point]:
    """What bit-equal gradients cost: against those that are summed in any order."""
    names = {"contenders": ("fa3 deterministic", "fa3", "cudnn"), "baseline": "fa3"}
    return [
        point("deterministic", d, s, is_causal=is_causal, pass_name="bwd", **names)
        for d in (64, 128, 256)
        for is_causal in (False, True)
        for s in (4096, 16384)
    ]


def _window() -> list[Point]:
    return [
        point("window", 128, 8192, is_causal=True, window=1024),
        point("window", 128, 16384, is_causal=True, window=4096),
        point("window", 64, 8192, is_causal=True, window=128, heads=(64, 8), batch=8),
    ]


def _fp16() -> list[Point]:
    return [
        point("fp16", d, s, is_causal=is_causal, dtype="float16")
        for d in (64, 128, 256)
        for is_causal in (False, True)
        for s in (2048, 16384)
    ]


def _dims() -> list[Point]:
    return [
        point("dims", d, s, head_dim_v=dv, heads=(16, 16), is_causal=is_causal)
        for d, dv in ((96, 96), (192, 192), (192, 128))
        for is_causal in (False, True)
        for s in (2048, 8192)
    ]


def _fp8() -> list[Point]:
    """FP8 in the paper's shapes; and what the preparation takes of a copy's bandwidth."""
    names = "fa3 fp8", TRANSPOSED, "cudnn fp8", "fa3"
    forward = {"contenders": names, "baseline": "cudnn fp8"}
    prepare = {"contenders": ("fa3 fp8", MEANS, "copy"), "baseline": "copy"}
    return [
        *(
            point("fp8", d, s, is_causal=is_causal, pass_name="fp8", **forward)
            for d in (64, 128, 256)
            for is_causal in (False, True)
            for s in LENGTHS
        ),
        *(
            point("fp8", d, s, pass_name="prepare", **prepare)
            for d in (64, 128, 256)
            for s in LENGTHS
        ),
    ]


SUITES = {
    "paper": _all_passes,
    "quick": _quick,
    "masks": _masks,
    "gqa": _gqa,
    "deterministic": _deterministic,
    "window": _window,
    "fp16": _fp16,
    "dims": _dims,
    "fp8": _fp8,
    "models": models,
    features.SUITE: features.points,
}


def select(suites: Iterable[str], patterns: Iterable[str] = ("*",)) -> list[Point]:
    """The points of the suites whose name matches one of the patterns (as in a shell)."""
    return [
        p
        for suite in suites
        for p in SUITES[suite]()
        if any(fnmatch.fnmatch(p.name, pattern) for pattern in patterns)
    ]
