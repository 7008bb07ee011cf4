// The named barriers of a CTA, and the way of a tile from one CTA's shared memory to another's.
// (The ring that several CTAs fill together has those of common/ring_barriers.h.)
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/cluster_sm90.hpp>

#include "common/ring_barriers.h"

namespace jax_fa3::wide_bwd {

// bar.sync, counted from 8 on by CUTLASS.
enum class NamedBarrier : uint32_t {
  kWeights,       // both warpgroups have written their half of the weights
  kOfWarpgroup0,  // the threads of one warpgroup, around what they write for the TMA unit
  kOfWarpgroup1,
};

CUTLASS_DEVICE void named_sync(NamedBarrier first, int offset, int threads) {
  cutlass::arch::NamedBarrier::sync(threads, static_cast<uint32_t>(first) + offset);
}

// Copies from this CTA's shared memory to the same cluster's CTA `rank`; its `full` counts the
// bytes. `to` and `full` are those of this CTA at the same place. By one thread, behind a
// fence.proxy.async of those that wrote.
CUTLASS_DEVICE void send(int rank, uint16_t* to, FullBarrier& full, uint16_t const* from,
                         int bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];"
      :
      : "r"(cute::set_block_rank(cute::cast_smem_ptr_to_uint(to), rank)),
        "r"(cute::cast_smem_ptr_to_uint(from)), "r"(bytes),
        "r"(cute::set_block_rank(cute::cast_smem_ptr_to_uint(&full), rank))
      : "memory");
}

}  // namespace jax_fa3::wide_bwd
