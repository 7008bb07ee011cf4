"""Every device gathers all of K and V and attends with its own rows; in the backward again, so that
only its own part is kept. The gradients of K and V are summed by a reduce-scatter in fp32."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import Array

from .._autodiff import Attention, Method
from .._operands import Operands, Rows
from .._problem import Masks
from .._varying import vary_together
from ._layout import Layout


@dataclasses.dataclass(frozen=True)
class AllGather(Method):
    """Of one device's operands; masks from of_this_device."""

    layout: Layout

    def forward(
        self, operands: Operands, masks: Masks, more: Any, for_gradient: bool
    ) -> tuple[Array, ...]:
        call = vary_together((self._gathered(operands), masks))
        return Attention(self.implementation, self.config).forward(*call, None, False)

    def backward(self, operands: Operands, masks: Masks, rows: Rows) -> Operands:
        config = dataclasses.replace(self.config, partial=True)  # dk and dv in fp32
        call = vary_together((self._gathered(operands), masks, rows.out, rows.lse))
        whole, masks, out, lse = call
        rows = rows._replace(out=out, lse=lse)
        dquery, *dpart = Attention(self.implementation, config).backward(whole, masks, rows).split()
        parts = zip(dpart, operands.split()[1:], strict=True)
        return Operands(dquery, *(self.layout.scatter_sum(dx).astype(x.dtype) for dx, x in parts))

    def _gathered(self, operands: Operands) -> Operands:
        query, *part = operands.split()
        return Operands(query, *map(self.layout.gather, part))
