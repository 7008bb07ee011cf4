"""Ring attention (Liu et al., arXiv 2310.01889): K and V go from device to device, and while one
part is worked on the next one is under way. Memory is linear in the length of one device's part.

Each step's result, for one device's keys, is joined in fp32 with that of the steps before. The
backward goes round the ring as well: with the log-sum-exp and out of all keys, each step adds its
own part to every gradient; those of K and V travel with them, in fp32.

All that travels at a time is one array: of several, XLA lets one run beside a kernel, and the others
before it. K and V stay where they arrive: the kernels read them side by side.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from .._autodiff import Method, with_gradient
from .._broken import row_sums
from .._operands import Operands, Rows
from .._problem import Masks
from .._varying import vary_together
from . import _steps
from ._layout import Layout
from ._masks import of_one_part
from ._words import from_words, to_words


@dataclasses.dataclass(frozen=True)
class Ring(Method):
    """Of one device's operands; masks from of_this_device."""

    layout: Layout

    def forward(
        self, operands: Operands, masks: Masks, more: Any, for_gradient: bool
    ) -> tuple[Array, ...]:
        layout, (query, key, value) = self.layout, operands.split()
        part = jnp.concatenate([key, value], axis=-1)
        total: Any = None
        for step in range(layout.size):
            is_last = step + 1 == layout.size
            arriving = None if is_last else layout.send(part)
            keys = of_one_part(layout, masks, layout.device(step), key.shape[1])
            config = dataclasses.replace(self.config, partial=not is_last)
            call = vary_together((Operands(query, part), keys, total))
            total = _steps.forward(self.implementation, config, *call)
            if not is_last:
                part, total = _when_done(arriving, total)
        return total

    def backward(self, operands: Operands, masks: Masks, rows: Rows) -> Operands:
        implementation = with_gradient(self.implementation, operands)
        config = dataclasses.replace(self.config, partial=True)
        layout, (query, key, value) = self.layout, operands.split()
        part: Any = to_words(jnp.concatenate([key, value], axis=-1))
        # XLA may start to send as soon as there is something to send, and K and V are there from the
        # start: while the forward's own parts travel. So they wait for what the forward gave. And
        # what is summed here is what the kernels read: dO V' - row_terms is a small difference of
        # large numbers, and XLA may leave out a rounding of dout to 16 bit that comes before.
        part, dout, out = lax.optimization_barrier((part, rows.dout, rows.out))
        row_terms = rows.whole_dlse() - row_sums(dout, out, rows.lse.dtype)
        rows = rows._replace(dout=dout, out=None, dlse=row_terms)
        words = part.shape[-1]
        dquery: Any = None
        dpart: Any = None  # [B, S, K, H + V]
        for step in range(layout.size):
            is_last = step + 1 == layout.size
            # The next part, and the gradients so far of the one that is here now.
            outgoing = [] if is_last else [part[..., :words]]
            outgoing += [] if dpart is None else [to_words(dpart)]
            leaving: Any = jnp.concatenate(outgoing, axis=-1) if outgoing else None
            arriving: Any = None if leaving is None else layout.send(leaving)
            keys = of_one_part(layout, masks, layout.device(step), key.shape[1])
            call = vary_together((Operands(query, part), keys, rows, dquery))
            dquery, *dkv = _steps.backward(implementation, config, *call, is_last)
            if not is_last:
                arriving, (dquery, dkv) = _when_done(arriving, (dquery, dkv))
            own = jnp.concatenate(dkv, axis=-1)
            if dpart is None:
                dpart = own
            else:
                sums = arriving if is_last else arriving[..., words:]
                dpart = from_words(sums, own.dtype, own.shape[-1]) + own
            part = arriving
        dpart = dpart.astype(key.dtype)
        if layout.size > 1:
            dpart = layout.send(dpart)  # home
        return Operands(dquery, *jnp.split(dpart, [key.shape[-1]], axis=-1))


def _when_done(arriving: Any, results: Any) -> Any:
    """Both, the next part only when this step's results are there: else XLA could send all parts at
    once, and hold as many. (On GPUs; XLA for CPUs takes barriers out before it schedules.)"""
    return lax.optimization_barrier((arriving, results))
