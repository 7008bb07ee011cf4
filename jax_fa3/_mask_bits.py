"""A dense mask as bits, which the kernels read: one a score, and one for each block of scores that says
whether anybody sees any of it, and one whether everybody sees all. So go several intervals a row, too.

They are made where the kernels run, in one pass, for the forward and for the backward, whose rows are
keys. What is broadcast over rows or keys stays so.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ._custom_call import custom_call
from ._kernel_sizes import MOST_KEYS_OF_SUM, BwdTile, bwd_tile, drifts
from ._operands import Operands
from ._problem import Masks
from ._targets import MASK_BITS

_BLOCK = 128  # rows and columns; kMaskBlock in cpp/plan.h


def refusal(operands: Operands, found: str = "mask: got one") -> str | None:
    """Why the kernels take none here."""
    sizes = operands.sizes
    if operands.dropout is not None:
        return f"{found} beside dropout, wanted one of the two"
    for name in ("alibi_slopes", "relative_bias"):
        if getattr(operands, name) is not None:
            return f"{found} beside {name}, wanted one of the two"
    width = max(sizes.head_dim, sizes.head_dim_v)
    if not bwd_tile(width).takes_bias:
        return f"{found} beside head dim {width}, wanted none beside more than 128"
    keys = sizes.key_length
    if jax.export.is_symbolic_dim(keys):  # which is an attribute of the call that makes bits
        return f"{found} beside {keys} keys, wanted a number that is known when it is exported"
    if drifts(keys):
        return f"{found} beside {keys} keys, wanted none beside more than {MOST_KEYS_OF_SUM}"
    return None


def are_intervals(mask: Array) -> bool:
    """Whether this is int32 [B, 1, T, 2 M], M begins and M ends: a row sees the keys of all M intervals."""
    return mask.dtype == jnp.int32


def as_bool(mask: Array, key_length: int) -> Array:
    """A mask of either kind as [B, N, T, S], each of them maybe 1; of any rank, for blocks of rows."""
    if not are_intervals(mask):
        return mask
    begin, end = (x[..., None] for x in jnp.split(mask, 2, axis=-1))
    keys = jnp.arange(key_length, dtype=jnp.int32)
    return ((begin <= keys) & (keys < end)).any(-2)


def for_kernels(
    mask: Array, key_length: int, backward_tile: BwdTile | None = None
) -> dict[str, Array]:
    """The mask as operands of their calls, of the backward if it is given its tile: mask_bits
    [1|B, 1|N, rows, chunks * 4] and mask_blocks [1|B, 1|N, blocks of rows, words, 2]."""
    batch, heads, length, keys = mask.shape
    intervals = are_intervals(mask)
    keys = key_length if intervals else keys
    rows, columns = (length, keys) if backward_tile is None else (keys, length)
    width = _BLOCK if backward_tile is None else backward_tile.block_m
    chunks = _in_blocks(columns)
    words = -(-chunks * (_BLOCK // width) // 32)
    all_rows = rows if isinstance(rows, int) and rows == 1 else _in_blocks(rows) * _BLOCK
    shapes = {
        "bits": (batch, heads, all_rows, chunks * 4),
        "blocks": (batch, heads, _in_blocks(rows), words, 2),
    }
    attributes = {
        "rows_are_keys": backward_tile is not None,
        "columns_per_block": width,
        "num_keys": key_length,
    }
    found = custom_call(
        MASK_BITS,
        {name: jax.ShapeDtypeStruct(shape, jnp.uint32) for name, shape in shapes.items()},
        {name: np.int64(x) for name, x in attributes.items()},
        mask=None if intervals else mask,
        intervals=mask if intervals else None,
    )
    return {"mask_bits": found["bits"], "mask_blocks": found["blocks"]}


def without_blind_rows(masks: Masks, lse: Array, keys: int) -> Masks:
    """For the backward: rows that see nothing, of any head, which the mask says first, see nothing of
    key_end either, so that what they hold reaches no gradient; lse [B, N, T]."""
    seen = (lse != -jnp.inf).any(1)
    end = jnp.int32(keys) if masks.key_end is None else masks.key_end
    return masks._replace(key_end=jnp.where(seen, end, 0))


def _in_blocks(size: int) -> int:
    return -(-size // _BLOCK)
