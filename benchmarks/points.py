"""One point of the tables, as plain data: its shape, mask and FLOPs. Nothing here needs JAX or a GPU."""

import dataclasses

import numpy as np

TOKENS = 16384  # tokens of one call, and
WIDTH = 2048  # heads * head_dim: the shapes of the FlashAttention-3 paper (arXiv 2407.08608, section 4.1)
BLOCK = 128  # rows and keys of Point.blocks
RIVALS = ("cudnn", "pallas", "flash-attn3-jax", "dew")


@dataclasses.dataclass(frozen=True)
class Point:
    """One problem and who runs it; batch, lengths and head counts as in the public API.

    `model` says whose shape it is, where it is somebody's. `seqlen_k` None: as many keys as queries.
    `window` is the number of keys that a row sees to its left besides its own (with is_causal);
    `documents` are the lengths of the documents packed into each row, None for one sequence.
    `blocks`: of all blocks of 128 rows and keys every second one is seen, by the draw; `first_keys`: so
    many are seen by every row besides, as far as they are not behind it.
    `contenders[0]` is the one that the figure is about, `baseline` the one it is divided by.
    Passes: "fwd"; "bwd", the gradients alone, from what the forward left behind; "fwd+bwd";
    "intervals", the conversion of segment ids to key intervals alone; "fp8", the forward on inputs
    that are e4m3 already; and "prepare", which makes such inputs.
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
    blocks: bool = False
    first_keys: int = 0
    seqlen_k: int | None = None
    model: str = ""
    pass_name: str = "fwd"
    contenders: tuple[str, ...] = ("fa3", *RIVALS)
    baseline: str = "cudnn"

    @property
    def keys(self) -> int:
        return self.seqlen if self.seqlen_k is None else self.seqlen_k

    @property
    def mask(self) -> str:
        parts = [
            "packed" if self.documents else "",
            "causal" if self.is_causal else "",
            f"window {self.window}" if self.window is not None else "",
            "blocks" if self.blocks else "",
            f"first {self.first_keys}" if self.first_keys else "",
        ]
        return " ".join(filter(None, parts)) or "full"

    def segment_ids(self) -> np.ndarray:
        """int32 [seqlen]: the document of each position."""
        documents = self.documents or (self.seqlen,)
        return np.repeat(np.arange(len(documents), dtype=np.int32), documents)

    def intervals(self) -> tuple[np.ndarray, np.ndarray]:
        """begin, end, int32 [seqlen]: row i sees the keys in [begin[i], end[i])."""
        row = np.arange(self.seqlen, dtype=np.int32)
        if self.documents:
            lengths = np.asarray(self.documents, np.int32)
            ends = np.cumsum(lengths, dtype=np.int32)
            begin, end = np.repeat(ends - lengths, lengths), np.repeat(ends, lengths)
        else:
            begin, end = np.zeros_like(row), np.full_like(row, self.keys)
        if self.is_causal:
            end = np.minimum(end, row + 1)
        if self.window is not None:
            begin = np.maximum(begin, row - self.window)
        return begin, end

    def visible(self, rows: slice) -> np.ndarray:
        """bool [rows, keys]: which keys these rows see."""
        begin, end = (x[rows, None] for x in self.intervals())
        key = np.arange(self.keys)
        visible = (key >= begin) & (key < end)
        if self.first_keys:
            visible |= (key < self.first_keys) & (key < end)
        if self.blocks:
            shape = -(-self.seqlen // BLOCK), -(-self.keys // BLOCK)
            drawn = np.random.default_rng(0).permutation(np.arange(shape[0] * shape[1]) % 2 == 0)
            row = np.arange(self.seqlen)[rows]
            visible &= drawn.reshape(shape)[row[:, None] // BLOCK, key // BLOCK]
        return visible

    def flops(self) -> float:
        """Of one call: 4*b*h*sq*sk*d for the full mask, half of it for the plain causal one (as the
        FlashAttention papers count), and the pairs that are really seen for every other mask; the
        backward has 2.5 times as many."""
        if self.pass_name in ("intervals", "prepare"):
            return 0.0
        begin, end = self.intervals()
        pairs = float(np.sum(end.astype(np.int64) - begin))
        if self.blocks or self.first_keys:
            pairs = float(np.count_nonzero(self.visible(slice(None))))
        if self.mask == "causal" and self.keys == self.seqlen:
            pairs = self.seqlen**2 / 2
        forwards = {"fwd": 1.0, "fp8": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}[self.pass_name]
        per_pair = 2 * (self.head_dim + self.head_dim_v) * forwards
        return self.batch * self.num_heads_q * pairs * per_pair

    def moved_bytes(self) -> int:
        """Of the pass "prepare", else 0: query, key and value read once in 16 bits and written once
        in 8. Their scales, 4 bytes for 128 rows of a head, do not count."""
        if self.pass_name != "prepare":
            return 0
        numbers = self.seqlen * self.num_heads_q * self.head_dim
        numbers += self.keys * self.num_heads_k * (self.head_dim + self.head_dim_v)
        return 3 * self.batch * numbers

    def visible_share(self, block_m: int, block_n: int) -> float:
        """Blocks of scores that hold a visible pair, as a share of all blocks."""
        begin, end = self.intervals()
        starts = np.arange(0, self.seqlen, block_m)
        first = np.minimum.reduceat(begin, starts) // block_n
        last = -(-np.maximum.reduceat(end, starts) // block_n)
        return float(np.sum(last - first)) / (len(starts) * -(-self.keys // block_n))


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
        made.contenders[0].removeprefix("fa3").strip(),  # arrays, deterministic, fp8
    ]
    return dataclasses.replace(made, name="-".join(filter(None, dict.fromkeys(parts))))
