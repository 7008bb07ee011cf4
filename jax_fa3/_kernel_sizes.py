"""The kernels that there are, and the tiles of the backward: what kernel_sizes.def lists."""

from __future__ import annotations

import math
import pathlib
import re
from typing import Any, NamedTuple

import jax

# Keys over which one sum in a forward's accumulators does not drift (twin of kMostKeysOfSum). Only the
# kernels without a bias, of heads up to 256, have sums in parts for more.
MOST_KEYS_OF_SUM = 2**18


class BwdTile(NamedTuple):
    head_dim: int  # that the kernel computes with, for all up to it
    block_m: int  # query rows
    block_n: int  # keys
    fused: bool  # one kernel for all gradients, which sums dq in fp32 in global memory

    @property
    def takes_bias(self) -> bool:
        """Whether its kernels take a bias, slopes or a dense mask (twin of plan.h's)."""
        return self.fused and self.block_n >= 128


_TEXT = pathlib.Path(__file__).with_name("kernel_sizes.def").read_text()


def _entries(macro: str) -> list[list[str]]:
    return [entry.split(", ") for entry in re.findall(rf"^{macro}\((.*)\)$", _TEXT, re.MULTILINE)]


_DTYPES = [name for name, _ in _entries("DTYPE")]
_SIZES = [(int(h), int(v), fp8 == "true") for h, v, fp8, *_ in _entries("KERNEL_SIZE")]

# Of the default build, as (dtype, head_dim, head_dim_v), in the order of choice.
KERNELS = [
    (dtype, h, v) for dtype in _DTYPES for h, v, fp8 in _SIZES if fp8 or dtype != "float8_e4m3fn"
]

# Of query, key and value: the tangent kernels, in the order of choice.
JVP_HEAD_DIMS = [int(h) for h, *_ in _entries("JVP_TILE")]

BWD_TILES = [
    BwdTile(int(h), int(m), int(n), fused == "true") for h, m, n, fused in _entries("BWD_TILE")
]

# Query rows that are whole tiles of whichever kernel of the backward, that of dq included.
BWD_ROWS = math.lcm(*(tile.block_m for tile in BWD_TILES), int(_entries("BWD_QUERY_ROWS")[0][0]))
BWD_FEWEST_ROWS = min(tile.block_m for tile in BWD_TILES)


def drifts(keys: Any) -> bool:
    """Whether one sum over so many keys is known to drift: under export they may have no number."""
    return not jax.export.is_symbolic_dim(keys) and keys > MOST_KEYS_OF_SUM


def bwd_tile(head_dim: int) -> BwdTile:
    """That of the backward kernel for this head dim; of one beyond all kernels the widest."""
    return next((tile for tile in BWD_TILES if head_dim <= tile.head_dim), BWD_TILES[-1])
