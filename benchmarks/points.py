"""What is measured: the points of the tables, as plain data. Nothing here needs JAX or a GPU."""

import dataclasses
import fnmatch
from collections.abc import Iterable

import numpy as np

TOKENS = 16384  # tokens of one call, and
WIDTH = 2048  # heads * head_dim: the shapes of the FlashAttention-3 paper (arXiv 2407.08608, section 4.1)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
RIVALS = ("cudnn", "pallas", "flash-attn3-jax")

# Seven documents of mixed lengths in one row of 16,384 tokens.
DOCUMENTS = (309, 4015, 1024, 2750, 3500, 777, 4009)


@dataclasses.dataclass(frozen=True)
class Point:
    """One problem and who runs it; batch, lengths and head counts as in the public API.

    `window` is the number of keys that a row sees to its left besides its own (with is_causal);
    `documents` are the lengths of the documents packed into each row, None for one sequence.
    `contenders[0]` is the one that the figure is about, `baseline` the one it is divided by.
    Passes: "fwd"; "bwd", the gradients alone, from what the forward left behind; "fwd+bwd"; and
    "intervals", the conversion of segment ids to key intervals alone.
    """

    suite: str
    name: str
    batch: int
    seqlen: int
    num_heads_q: int
    num_heads_k: int
    head_dim: int
    head_dim_v: int
    dtype: str = "bfloat16"
    is_causal: bool = False
    window: int | None = None
    documents: tuple[int, ...] | None = None
    pass_name: str = "fwd"
    contenders: tuple[str, ...] = ("fa3", *RIVALS)
    baseline: str = "cudnn"

    @property
    def mask(self) -> str:
        parts = [
            "packed" if self.documents else "",
            "causal" if self.is_causal else "",
            f"window {self.window}" if self.window is not None else "",
        ]
        return " ".join(filter(None, parts)) or "full"

    def segment_ids(self) -> np.ndarray:
        """int32 [seqlen]: the document of each position."""
        documents = self.documents or (self.seqlen,)
        return np.repeat(np.arange(len(documents), dtype=np.int32), documents)

    def intervals(self) -> tuple[np.ndarray, np.ndarray]:
        """begin, end, int32 [seqlen]: row i sees the keys in [begin[i], end[i])."""
        documents = np.asarray(self.documents or (self.seqlen,), np.int32)
        ends = np.cumsum(documents, dtype=np.int32)
        row = np.arange(self.seqlen, dtype=np.int32)
        begin, end = np.repeat(ends - documents, documents), np.repeat(ends, documents)
        if self.is_causal:
            end = np.minimum(end, row + 1)
        if self.window is not None:
            begin = np.maximum(begin, row - self.window)
        return begin, end

    def flops(self) -> float:
        """Of one call: 4*b*h*sq*sk*d for the full mask, half of it for the plain causal one (as the
        FlashAttention papers count), and the pairs that are really seen for every other mask; the
        backward has 2.5 times as many."""
        if self.pass_name == "intervals":
            return 0.0
        begin, end = self.intervals()
        pairs = float(np.sum(end.astype(np.int64) - begin))
        if self.mask == "causal":
            pairs = self.seqlen**2 / 2
        forwards = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}[self.pass_name]
        per_pair = 2 * (self.head_dim + self.head_dim_v) * forwards
        return self.batch * self.num_heads_q * pairs * per_pair

    def visible_share(self, block_m: int, block_n: int) -> float:
        """Blocks of scores that hold a visible pair, as a share of all blocks."""
        begin, end = self.intervals()
        starts = np.arange(0, self.seqlen, block_m)
        first = np.minimum.reduceat(begin, starts) // block_n
        last = -(-np.maximum.reduceat(end, starts) // block_n)
        return float(np.sum(last - first)) / (len(starts) * -(-self.seqlen // block_n))


def point(suite: str, head_dim: int, seqlen: int, *, heads=None, **fields) -> Point:
    """A Point with the paper's batch and head count, unless said otherwise."""
    heads_q, heads_k = heads or (WIDTH // head_dim,) * 2
    fields = {"batch": TOKENS // seqlen, "head_dim_v": head_dim, **fields}
    made = Point(
        suite,
        "",
        seqlen=seqlen,
        num_heads_q=heads_q,
        num_heads_k=heads_k,
        head_dim=head_dim,
        **fields,
    )
    parts = [
        made.pass_name,
        f"d{head_dim}" + (f"-{made.head_dim_v}" if made.head_dim_v != head_dim else ""),
        made.mask.replace(" ", "-"),
        f"s{seqlen}",
        f"h{heads_q}-{heads_k}" if heads_q != heads_k else "",
        "fp16" if made.dtype == "float16" else "",
        made.contenders[0].removeprefix("fa3").strip(),  # arrays, deterministic
    ]
    return dataclasses.replace(made, name="-".join(filter(None, parts)))


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
    backward = _paper("bwd", "cudnn", "flash-attn3-jax")
    return [*_paper("fwd", *RIVALS), *backward, *_paper("fwd+bwd", "cudnn")]


def _quick() -> list[Point]:
    wanted = [(128, False, 1024), (128, False, 16384), (128, True, 1024), (128, True, 16384)]
    wanted += [(64, False, 2048), (64, True, 16384), (256, False, 2048), (256, True, 16384)]
    return [point("quick", d, s, is_causal=c, contenders=("fa3", "cudnn")) for d, c, s in wanted]


def _masks() -> list[Point]:
    """That masks are free: each point's baseline is this library with a cheaper way to say as much."""
    arrays = ("fa3 arrays", "fa3", "cudnn")
    packed = {"documents": DOCUMENTS, "contenders": ("fa3", "fa3 full"), "baseline": "fa3 full"}
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


SUITES = {
    "paper": _all_passes,
    "quick": _quick,
    "masks": _masks,
    "gqa": _gqa,
    "deterministic": _deterministic,
    "window": _window,
    "fp16": _fp16,
    "dims": _dims,
}


def select(suites: Iterable[str], patterns: Iterable[str] = ("*",)) -> list[Point]:
    """The points of the suites whose name matches one of the patterns (as in a shell)."""
    return [
        p
        for suite in suites
        for p in SUITES[suite]()
        if any(fnmatch.fnmatch(p.name, pattern) for pattern in patterns)
    ]
