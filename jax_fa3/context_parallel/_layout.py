"""Which device has which part of a sequence, and the zigzag order."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .._checks import natural, wrong


def to_zigzag(x: Any, axis_size: int, *, axis: int = 1) -> Any:
    """x with the sequence along its `axis` put from natural into zigzag order.

    The sequence is cut into 2 * axis_size chunks; sharded over a mesh axis of axis_size devices,
    device i then has chunk i followed by chunk 2 * axis_size - 1 - i. Under a causal mask the rows
    of every device see equally many keys.

    Args:
        x: a JAX array, not sharded along `axis` (else it moves between the devices), or a NumPy
            array, which stays one.
        axis_size: devices along the mesh axis.
        axis: of x; 1 is the sequence of [B, T, ...].

    Raises ValueError where 2 * axis_size does not divide the sequence.
    """
    numpy, axis, size, chunk = _cut(x, axis_size, axis)
    chunks = x.reshape(*x.shape[:axis], 2, size, chunk, *x.shape[axis + 1 :])
    lead = (slice(None),) * axis
    low, high = chunks[*lead, 0], numpy.flip(chunks[*lead, 1], axis)
    return numpy.stack([low, high], axis + 1).reshape(x.shape)


def from_zigzag(x: Any, axis_size: int, *, axis: int = 1) -> Any:
    """The inverse of `to_zigzag`; its arguments and errors."""
    numpy, axis, size, chunk = _cut(x, axis_size, axis)
    chunks = x.reshape(*x.shape[:axis], size, 2, chunk, *x.shape[axis + 1 :])
    lead = (slice(None),) * axis
    low, high = chunks[*lead, :, 0], numpy.flip(chunks[*lead, :, 1], axis)
    return numpy.stack([low, high], axis).reshape(x.shape)


def zigzag_positions(length: int, axis_size: int) -> Array:
    """int32 [length]: the position of each row of a sequence in zigzag order, for rotary embeddings
    and the like. Sharded as the sequence is, it gives every device the positions of its rows."""
    return to_zigzag(jnp.arange(length, dtype=jnp.int32), axis_size, axis=0)


def _cut(x: Any, axis_size: int, axis: int) -> tuple[ModuleType, int, int, int]:
    """NumPy or its twin, axis and axis_size checked, and the length of a chunk."""
    if not isinstance(x, (Array, np.ndarray)):
        raise wrong("x", type(x).__name__, "an array of JAX or NumPy")
    size = natural("axis_size", axis_size)
    if not -x.ndim <= axis < x.ndim:
        raise wrong("axis", axis, f"one of the {x.ndim} axes of x {x.shape}")
    axis %= x.ndim
    if not size or x.shape[axis] % (2 * size):
        wanted = f"a multiple of 2 * axis_size = {2 * size}, as zigzag order needs"
        raise wrong("x", f"length {x.shape[axis]} along axis {axis}", wanted)
    return (np if isinstance(x, np.ndarray) else jnp), axis, size, x.shape[axis] // (2 * size)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How sequences lie along a mesh axis: device i has part i of `size` equal ones, or in zigzag
    order the chunks i and 2 * size - 1 - i of 2 * size.

    Either way a device's rows are runs of positions, one after the other in ascending order. So
    whatever interval of positions a row sees, what it sees of one device's keys is one interval.
    """

    axis_name: Any
    size: int
    zigzag: bool

    def positions(self, length: int) -> Array:
        """int32 [length], of the rows of the device that runs this."""
        starts, run = self._runs(self.device(), length)
        return jnp.concatenate([start + jnp.arange(run, dtype=jnp.int32) for start in starts])

    def rows_before(self, positions: Array, device: Array, length: int) -> Array:
        """How many of a device's `length` rows have a lower position; elementwise, any int32."""
        starts, run = self._runs(device, length)
        positions = jnp.clip(positions, 0, self.size * length)
        return sum((jnp.clip(positions - start, 0, run) for start in starts), jnp.int32(0))

    def device(self, back: int = 0) -> Array:
        """The index of the device that is `back` before this one on the ring."""
        return (lax.axis_index(self.axis_name) - back) % self.size

    def send(self, x: Array) -> Array:
        """x to the next device of the ring, and what the one before sends."""
        ring = [(i, (i + 1) % self.size) for i in range(self.size)]
        return lax.ppermute(x, self.axis_name, ring)

    def gather(self, x: Array) -> Array:
        """[B, T, ...], T of one device, to all of the sequence in its natural order."""
        return self.natural(lax.all_gather(x, self.axis_name, axis=1, tiled=True))

    def scatter_sum(self, x: Array) -> Array:
        """The transpose of gather."""
        x = self.laid_out(x)
        return lax.psum_scatter(x, self.axis_name, scatter_dimension=1, tiled=True)

    def natural(self, x: Array) -> Array:
        """[B, T, ...], the parts of all devices in their order, to its natural order."""
        return from_zigzag(x, self.size) if self.zigzag else x

    def laid_out(self, x: Array) -> Array:
        """The inverse of natural."""
        return to_zigzag(x, self.size) if self.zigzag else x

    def _runs(self, device: Array, length: int) -> tuple[list[Array], int]:
        """The first positions of a device's runs, and the length of each."""
        if not self.zigzag:
            return [device * length], length
        return [x * (length // 2) for x in (device, 2 * self.size - 1 - device)], length // 2
