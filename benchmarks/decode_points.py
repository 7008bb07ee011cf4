"""What `python -m benchmarks --suite decode` measures."""

import dataclasses
import fnmatch
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class DecodePoint:
    batch: int
    length: int  # the new rows included
    rows: int = 1  # of each sequence
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128
    page: int | None = 64  # None: contiguous
    window: int | None = None  # keys that a row sees
    bar: float | None = None  # the least share of the copy
    e4m3: bool = False  # the cache, with one scale for each head
    sinks: bool = False
    # Sequences with other lengths and rows behind those, in one ragged call: (how many, length, rows).
    others: tuple[int, int, int] | None = None

    @property
    def name(self) -> str:
        pages = "contiguous" if self.page is None else f"pages{self.page}"
        window = "" if self.window is None else f"-w{self.window}"
        heads = "/".join(map(str, self.heads))
        more = "-e4m3" * self.e4m3 + "-sinks" * self.sinks
        others = "" if self.others is None else "+{}x{}-t{}".format(*self.others)
        each = f"{self.batch}x{self.length}-t{self.rows}{others}"
        return f"{each}-{heads}xd{self.head_dim}-{pages}{window}{more}"

    @property
    def kinds(self) -> list[tuple[int, int, int]]:
        """(how many, length, rows)"""
        return [(self.batch, self.length, self.rows), *([self.others] if self.others else [])]

    def seen(self, length: int) -> int:
        return length if self.window is None else min(self.window, length)

    @property
    def cache_bytes(self) -> int:
        """Of keys and values that are read."""
        positions = sum(count * self.seen(length) for count, length, _ in self.kinds)
        return (2 if self.e4m3 else 4) * positions * self.heads[1] * self.head_dim

    @property
    def flops(self) -> float:
        pairs = sum(count * rows * self.seen(length) for count, length, rows in self.kinds)
        return 4.0 * pairs * self.heads[0] * self.head_dim


POINTS = [
    DecodePoint(1, 4096, bar=0.40),
    DecodePoint(1, 32768, bar=0.85),
    DecodePoint(8, 4096, bar=0.86),
    DecodePoint(8, 32768, bar=1.01),
    DecodePoint(64, 4096, bar=1.02),
    DecodePoint(64, 32768, bar=1.02),
    DecodePoint(8, 4096, page=16),
    DecodePoint(8, 4096, page=None),
    *(DecodePoint(8, 32768, rows) for rows in (2, 4, 8, 16)),
    DecodePoint(8, 32768, e4m3=True),
    DecodePoint(64, 32768, e4m3=True),
    DecodePoint(1, 32768, 512, (8, 1)),
    DecodePoint(64, 32768, heads=(32, 2), head_dim=256, bar=0.85),
    DecodePoint(128, 4096, heads=(64, 8), head_dim=64, window=128, sinks=True),
    # In one call, and each by itself.
    DecodePoint(100, 1025, others=(8, 8209, 17)),
    DecodePoint(100, 1025),
    DecodePoint(8, 8209, 17),
]


def points(patterns: Iterable[str] = ("*",)) -> list[DecodePoint]:
    return [p for p in POINTS if any(fnmatch.fnmatchcase(p.name, x) for x in patterns)]
