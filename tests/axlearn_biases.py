"""A stand-in for AXLearn's biases: names, fields and meanings of apple/axlearn's
axlearn/common/attention_bias.py at fc1f41e."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

NEG_INF = -1e15


@struct.dataclass
class BaseAttentionBias:
    dtype: Any = struct.field(kw_only=True, default=None, pytree_node=False)

    def value(self) -> Any:
        """[B or 1, N or 1, T, S], or None."""
        found = self._value()
        return found if found is None or self.dtype is None else found.astype(self.dtype)

    def has_value(self) -> bool:
        return jax.eval_shape(type(self).value, self) is not None

    def astype(self, dtype: Any) -> Any:
        return dataclasses.replace(self, dtype=dtype)

    def __add__(self, other: Any) -> Any:
        return CompositeAttentionBias([self, other])

    def partition_spec(self, specs: dict[str, Any]) -> Any:
        del specs
        return P()

    def _value(self) -> Any:
        raise NotImplementedError


@struct.dataclass
class CompositeAttentionBias(BaseAttentionBias):
    biases: Any

    def _value(self) -> Any:
        found = [x.value() for x in self.biases if x.has_value()]
        return functools.reduce(jnp.add, found) if found else None

    def partition_spec(self, specs: dict[str, Any]) -> Any:
        return CompositeAttentionBias(
            [x.partition_spec(specs) for x in self.biases], dtype=self.dtype
        )


@struct.dataclass
class TensorAttentionBias(BaseAttentionBias):
    _internal_value: Any

    def _value(self) -> Any:
        return self._internal_value

    def partition_spec(self, specs: dict[str, Any]) -> Any:
        batch, heads = self._internal_value.shape[:2]
        spec = specs["bnts"]
        return P(None if batch == 1 else spec[0], None if heads == 1 else spec[1], *spec[2:])


@struct.dataclass
class BoolAttentionBias(BaseAttentionBias):
    def _value(self) -> Any:
        found = self.bool_value()
        return None if found is None else ~found * NEG_INF

    def bool_value(self) -> Any:
        raise NotImplementedError


@struct.dataclass
class ZeroAttentionBias(BoolAttentionBias):
    def bool_value(self) -> None:
        return None


@struct.dataclass
class SegmentIdAttentionBias(BoolAttentionBias):
    segment_ids: Any

    def bool_value(self) -> Any:
        return (self.segment_ids[:, :, None] == self.segment_ids[:, None])[:, None]

    def partition_spec(self, specs: dict[str, Any]) -> Any:
        return P(*specs["btnh"][:2])


@struct.dataclass
class MaskFnAttentionBias(BoolAttentionBias):
    mask: Any = struct.field(pytree_node=False)
    target_positions: Any = struct.field(kw_only=True)  # [B or 1, T]
    source_positions: Any = struct.field(kw_only=True)  # [B or 1, S]

    def bool_value(self) -> Any:
        rows, keys = self.target_positions[:, :, None], self.source_positions[:, None]
        return self.mask(rows, keys)[:, None]

    def partition_spec(self, specs: dict[str, Any]) -> Any:
        batch, _, rows, keys = specs["bnts"]

        def spec(positions: Any, length: Any) -> Any:
            return P(None if positions.shape[0] == 1 else batch, length)

        return dataclasses.replace(
            self,
            target_positions=spec(self.target_positions, rows),
            source_positions=spec(self.source_positions, keys),
        )


def causal_mask(query_position: Any, key_position: Any) -> Any:
    return query_position >= key_position


def sliding_window_causal_mask(sliding_window_size: int) -> Any:
    def mask(query_position: Any, key_position: Any) -> Any:
        distance = query_position - key_position
        return (distance >= 0) & (distance <= sliding_window_size)

    return mask


@struct.dataclass
class CausalAttentionBias(MaskFnAttentionBias):
    mask: Any = struct.field(pytree_node=False, default=causal_mask)


@struct.dataclass
class SlidingWindowAttentionBias(MaskFnAttentionBias):
    sliding_window_size: int = struct.field(kw_only=True, pytree_node=False)


def split(bias: Any, *cls: type) -> Iterator[Any]:
    """One of each of cls, or a ZeroAttentionBias, and what is left. Several of one class are one, which of
    masks by functions, and the classes derived from it, has not that class any more."""
    left = [x for x in _flat(bias) if x.has_value()]
    for kind in cls:
        found = [x for x in left if isinstance(x, kind)]
        left = [x for x in left if not isinstance(x, kind)]
        yield _joined(found) if found else ZeroAttentionBias()
    yield CompositeAttentionBias(left)


def _flat(bias: Any) -> list[Any]:
    if isinstance(bias, CompositeAttentionBias):
        return [y for x in bias.biases for y in _flat(x)]
    return [bias]


def _joined(biases: list[Any]) -> Any:
    if len(biases) == 1:
        return biases[0]
    if not all(isinstance(x, MaskFnAttentionBias) for x in biases):
        raise NotImplementedError
    functions = [x.mask for x in biases]

    def mask(query_position: Any, key_position: Any) -> Any:
        masks = [x(query_position, key_position) for x in functions]
        return functools.reduce(jnp.logical_and, masks)

    positions = (biases[0].target_positions, biases[0].source_positions)
    return MaskFnAttentionBias(mask, target_positions=positions[0], source_positions=positions[1])
