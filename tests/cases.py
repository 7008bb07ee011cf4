"""One table of attention problems, for tests and for whoever wants the corner cases."""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from masks import (
    MARK,
    chunked,
    documents,
    ints,
    key_lengths,
    nearly_marked,
    packed,
    prefix_lm,
    scattered,
)


@dataclasses.dataclass(frozen=True, eq=False)  # equal if the same object, so it has a hash
class Case:
    """One problem: sizes, the public function's mask arguments, and its own random inputs."""

    name: str
    T: int = 200
    S: int = 260
    N: int = 4
    K: int = 2
    H: int = 64
    V: int = 0  # 0: as H
    B: int = 2
    mask: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scale: float | None = None
    logits_soft_cap: float | None = None
    sinks: tuple[float, ...] | None = None  # N
    planted: bool = False  # NaN and inf in all that stands past the lengths

    def __str__(self) -> str:
        return self.name

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of jax_fa3.dot_product_attention and of the oracle."""
        sinks = {} if self.sinks is None else {"sinks": np.asarray(self.sinks, np.float32)}
        return {"scale": self.scale, "logits_soft_cap": self.logits_soft_cap, **sinks, **self.mask}

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of query, key, value and out."""
        b, t, s, n, k, h, v = self.B, self.T, self.S, self.N, self.K, self.H, self.V or self.H
        return (b, t, n, h), (b, s, k, h), (b, s, k, v), (b, t, n, v)

    def inputs(self, dtype: DTypeLike, seed: int = 0) -> tuple[Array, Array, Array]:
        """query, key, value."""
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), seed])
        arrays = [rng.standard_normal(shape, np.float32) for shape in self.shapes[:3]]
        if self.planted:
            self._plant(arrays[0], "query_seq_lengths")
            self._plant(arrays[1], "key_value_seq_lengths")
            self._plant(arrays[2], "key_value_seq_lengths")
        q, k, v = (jnp.asarray(x, dtype) for x in arrays)
        return q, k, v

    def cotangents(self, dtype: DTypeLike, seed: int = 0) -> tuple[Array, Array]:
        """Of out in dtype and of lse [B, T, N] in fp32, or fp64."""
        rng = np.random.default_rng([zlib.crc32(self.name.encode()), seed, 1])
        shape = self.shapes[3]
        out, lse = (
            rng.standard_normal(shape, np.float32),
            rng.standard_normal(shape[:3], np.float32),
        )
        if self.planted:
            self._plant(out, "query_seq_lengths")
            self._plant(lse, "query_seq_lengths")
        return jnp.asarray(out, dtype), jnp.asarray(lse, jnp.promote_types(dtype, "float32"))

    def _plant(self, x: np.ndarray, lengths: str) -> None:
        for entry, length in zip(x, self.mask.get(lengths, ()), strict=False):
            entry[max(length, 0) :: 2] = np.nan
            entry[max(length, 0) + 1 :: 2] = np.inf


CAUSAL = {"is_causal": True}
HUGE = 2**31 - 1
SHUFFLED = np.random.default_rng(0).permutation(documents(70, 1, 80, 49, ids=(4, 0, 9, 2)))
_MASKS = (CAUSAL, {}, {"local_window_size": (40, 3)}, {"is_causal": True, "query_offset": 60})


def _lengths() -> list[Case]:
    """T and S around 1 and around the tile sizes of all kernels, the masks and heads in turn."""
    sizes = [(1, 1), (1, 300), (300, 1), (65, 63), (2, 129)]
    for tile in (64, 80, 96, 112, 128, 176, 192):
        sizes += [(tile + 1, tile - 1), (tile, tile + 1), (2 * tile - 1, tile)]
    heads, dims = [(4, 2), (3, 3), (2, 1)], [64, 128, 96, 256, 192]
    narrow = [(193, 111), (191, 113), (385, 225), (64, 336)]  # for the tile of head dim 80
    return [
        Case(f"{t}x{s}", t, s, *heads[i % 3], dims[i % 5], B=1, mask=_MASKS[i % 4])
        for i, (t, s) in enumerate(sizes)
    ] + [
        Case(f"{t}x{s}", t, s, *heads[i % 3], 80, B=1, mask=_MASKS[i % 4])
        for i, (t, s) in enumerate(narrow)
    ]


def _head_dims() -> list[Case]:
    dims = [(h, h) for h in (8, 40, 64, 72, 80, 88, 96, 104, 128, 136, 160, 192, 200, 256)]
    dims += [(192, 128), (64, 128), (128, 64)]
    names = (f"head dims {h}, {v}" for h, v in dims)
    return [Case(next(names), 150, 190, 4, 2, *hv, mask=_MASKS[i % 3]) for i, hv in enumerate(dims)]


def _heads() -> list[Case]:
    return [
        Case("one head", N=1, K=1, mask=CAUSAL),
        Case("K = 1", N=6, K=1, H=128, mask=CAUSAL),
        Case("K = N", N=5, K=5, H=128),
        # At head dim 128 a last block of at most 32 keys has a kernel of its own.
        Case("1 key more than a block", 130, 129, H=128),
        Case("32 keys more than four blocks", 70, 544, N=3, K=3, H=128),
        Case("33 keys more than two blocks", 150, 289, H=128),
        Case("21 keys more than two blocks, 120 columns", 290, 277, H=120),
        Case("soft cap, 4 keys more than two blocks", logits_soft_cap=2.0, H=128),
        Case("groups of 3", N=6, K=2, H=96, mask={"local_window_size": 64}),
        Case("batch 0", B=0, mask=CAUSAL),
        Case("T = 0", T=0),
        Case("S = 0", S=0, mask=CAUSAL),
        Case("scale 1", scale=1.0, H=40),
        Case("soft cap", logits_soft_cap=3.0, mask=CAUSAL),
        Case("soft cap, scale, window", scale=0.7, logits_soft_cap=15.0, H=128, mask=_MASKS[2]),
        Case("soft cap, lengths", B=3, logits_soft_cap=0.5, H=256, mask=_LENGTHS),
    ]


_LENGTHS = {"query_seq_lengths": ints(0, 130, 200), "key_value_seq_lengths": ints(129, 0, 63)}


def _closed_forms() -> list[Case]:
    """Causal, windows, offsets and lengths."""
    both = {"query_seq_lengths": ints(77, 200), "key_value_seq_lengths": ints(250, 128)}
    masks: dict[str, dict[str, Any]] = {
        "causal": CAUSAL,
        "bottom right": {"is_causal": True, "query_offset": 60},
        "window 0": {"local_window_size": 0},
        "window to the left": {"local_window_size": (33, 0)},
        "window to the right": {"local_window_size": (0, 65)},
        "window and causal": {"local_window_size": (64, 64), "is_causal": True},
        "window wider than int32": {"local_window_size": (2**40, 2**70)},
        "rows see nothing at first": {"is_causal": True, "query_offset": -130},
        "rows see nothing at last": {"local_window_size": (5, 5), "query_offset": 150},
        "rows see nothing at all": {"is_causal": True, "query_offset": -(2**40)},
        "offset wider than int32": {"is_causal": True, "query_offset": 2**40},
        "window far away": {"local_window_size": (2**40 + 9, 2**40), "query_offset": 2**40},
        "array offset": {"is_causal": True, "query_offset": ints(60, -7)},
        "array offset, window": {"local_window_size": (20, 90), "query_offset": ints(-100, 170)},
        "one offset": {"local_window_size": (100, 0), "query_offset": ints(60)[0].reshape(())},
        "hostile offsets": {"local_window_size": HUGE, "query_offset": ints(HUGE, -HUGE - 1)},
        "query lengths": {"query_seq_lengths": ints(129, 1)},
        "key lengths": {"key_value_seq_lengths": ints(259, 64), "is_causal": True},
        "both lengths, window": {**both, "local_window_size": (50, 10)},
        "lengths 0": {"query_seq_lengths": ints(0, 5), "key_value_seq_lengths": ints(5, 0)},
        "hostile lengths": {"query_seq_lengths": ints(HUGE, -1), **key_lengths(-HUGE - 1, HUGE)},
    }
    past = {"query_seq_lengths": ints(77, 200, 0), **key_lengths(250, 129, 9)}
    all_keys = {"query_seq_lengths": ints(3, 100), **key_lengths(0, 64)}
    return [
        *(Case(name, mask=mask, H=128) for name, mask in masks.items()),
        Case("planted, full", B=3, H=96, mask=past, planted=True),
        Case("planted, 80 columns", B=3, H=80, mask={**past, **CAUSAL}, planted=True),
        Case("planted, causal", B=3, H=96, mask={**past, **CAUSAL}, planted=True),
        Case("planted, window", B=3, H=64, mask={**past, **_MASKS[2]}, planted=True),
        Case("planted, all keys", H=256, mask=all_keys, planted=True),
    ]


def _per_row() -> list[Case]:
    """Segments and intervals."""
    three = documents(90, 1, 109)
    padded = documents(30, 70, 20, 80, ids=(3, -1, 0, -2))
    broken = documents(50, 40, 60, 50, ids=(0, 1, 0, 2))
    other_keys = documents(60, 100, 40, 60, ids=(9, 2, 7, 4))
    masks: dict[str, tuple[int, int, dict[str, Any]]] = {
        "documents, causal": (200, 200, {**packed(three), **CAUSAL}),
        "documents, full": (200, 200, packed(three)),
        "documents, window": (200, 200, {**packed(three), "local_window_size": (20, 0)}),
        "documents, padding": (200, 200, {**packed(padded), **CAUSAL}),
        "documents, queries in another order": (200, 260, packed(SHUFFLED, other_keys)),
        "documents, broken run": (200, 200, packed(broken)),
        "documents, broken run, causal": (200, 200, {**packed(broken), **CAUSAL}),
        "documents, lengths": (200, 200, {**packed(broken), "query_seq_lengths": ints(120)}),
        "prefix-LM": (200, 260, prefix_lm(200, 70)),
        "chunked": (200, 200, chunked(1, 200, 64)),
        "key_begin alone": (200, 260, {"key_begin": scattered(1, 200, 260)["key_begin"]}),
        "any intervals": (200, 260, scattered(1, 200, 260)),
        "any intervals, causal": (200, 260, {**scattered(1, 200, 260, 90), **CAUSAL}),
        "out of range": (200, 260, scattered(1, 200, 260, 2**31 - 300)),
        "extremes": (64, 64, {"key_begin": ints([HUGE] * 64), "key_end": ints([~HUGE] * 64)}),
        "mark": (64, 64, {"key_begin": ints([MARK[0]] * 64), "key_end": ints([MARK[1]] * 64)}),
        "nearly marked": (36, 64, nearly_marked()),
    }
    cases = [Case(name, t, s, B=1, mask=mask, H=128) for name, (t, s, mask) in masks.items()]
    two = {
        "query_segment_ids": np.stack([three, padded]),
        "key_value_segment_ids": np.stack([broken, padded]),
    }
    intervals = scattered(2, 200, 200)
    return [
        *cases,
        Case("two batches of documents", 200, 200, mask=two),
        Case("intervals of two", 200, 200, H=256, mask={**intervals, "local_window_size": (90, 9)}),
        Case("prefix-LM of two", 200, 260, H=192, mask={**prefix_lm(200, 0, 130)}),
        Case("everything", mask={**two, **CAUSAL, **key_lengths(180, 150)}, S=200),
        Case("soft cap, documents", 200, 200, logits_soft_cap=5.0, mask=two),
    ]


_SIZES = [*_lengths(), *_head_dims()]
NUM_SIZES = len(_SIZES)  # that the table begins with
TABLE = [*_SIZES, *_heads(), *_closed_forms(), *_per_row()]
