"""One of several processes: a sequence over the devices of all of them, by every strategy, against the
oracle. tests/test_multiprocess.py and tests/test_gpu_multiprocess.py start it, see joined.py.

    python tests/split_sequences.py IMPLEMENTATION
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import CAUSAL, Case
from helpers import assert_rounded, both_oracles, with_gradients
from jax.experimental import multihost_utils
from joined import PROCESSES
from masks import documents, packed
from sequences import MESHES, Split

STRATEGIES = "ring", "all_gather", "all_to_all"
CPU_DEVICES = 4


def cases(length: int) -> list[Case]:
    text = packed(documents(length // 4, 1, length // 2, length // 4 - 1, ids=(3, 0, 7, 2)))
    return [
        Case("documents", length, length, 8, 2, 64, B=1, mask={**text, **CAUSAL}),
        Case("causal", length, length, 8, 4, 128, B=1, mask=CAUSAL),
    ]


def check(case: Case, split: Split, implementation: str) -> None:
    dtype = jnp.bfloat16
    cotangents, inputs = case.cotangents(dtype), case.inputs(dtype)

    def call(cotangents: Any, inputs: Any) -> Any:
        def attention(*qkv: Any) -> Any:
            return split.attention(*qkv, **case.arguments, implementation=implementation)

        return with_gradients(attention, cotangents, *inputs)

    found = jax.jit(call)(*jax.device_get((cotangents, inputs)))
    assert not found.out.is_fully_addressable  # nobody has all of it
    found = jax.tree.map(lambda x: np.asarray(_whole(x)), found)
    exact, rounded = jax.jit(both_oracles, static_argnums=(0, 1))(case, dtype, inputs, cotangents)
    exact, rounded = jax.device_get((exact, rounded))
    assert_rounded(found, exact, rounded, case, jnp.finfo(dtype).eps)


def _whole(x: Any) -> Any:
    return multihost_utils.process_allgather(x, tiled=True)


def main() -> None:
    implementation = sys.argv[1]
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES // PROCESSES)
    jax.distributed.initialize()
    assert jax.process_count() == PROCESSES
    count = jax.device_count()
    mesh = next(name for name, size in MESHES.items() if size == count)
    on_gpus = implementation == "fa3"
    for case in cases(2048 if on_gpus else 16 * count)[: 2 if on_gpus else 1]:
        for strategy in STRATEGIES:
            check(case, Split(strategy, mesh=mesh, inside=False), implementation)
            print(f"right: {strategy} of {case} on {count} devices", flush=True)


if __name__ == "__main__":
    main()
