// Named barriers of the two consumer warpgroups, and the cluster of CTAs that fill the ring of
// pieces of K and V together (common/ring_barriers.h).
#pragma once

#include <cutlass/arch/barrier.h>

#include "common/ring_barriers.h"

namespace jax_fa3::wide {

// Each has one purpose. CUTLASS adds 8 to a number that is passed to it:
// barriers 0 to 7 are its.
enum class NamedBarrier : uint32_t {
  kWeightsFull = 0,     // P is in its buffer, one of two, with the factors by which
                        // O is rescaled
  kWeightsEmpty = 2,    // the second warpgroup has read it
  kWeightsWritten = 4,  // the first warpgroup has written it, and may read it
  kRows,                // what the second warpgroup needs of the rows for the epilogue is
                        // there
  kOutOfWarpgroup0,     // the threads of one warpgroup, around its output tile in
                        // shared memory
  kOutOfWarpgroup1,
};

CUTLASS_DEVICE uint32_t barrier_id(NamedBarrier first, int offset = 0) {
  return static_cast<uint32_t>(first) + offset;
}
CUTLASS_DEVICE void named_sync(NamedBarrier first, int offset, int threads) {
  cutlass::arch::NamedBarrier::sync(threads, barrier_id(first, offset));
}
CUTLASS_DEVICE void named_arrive(NamedBarrier first, int offset, int threads) {
  cutlass::arch::NamedBarrier::arrive(threads, barrier_id(first, offset));
}

// CTAs that share K and V: each loads half of every piece into the shared
// memory of both.
inline constexpr int kClusterSize = 2;
inline constexpr uint16_t kAllOfCluster = (1 << kClusterSize) - 1;

}  // namespace jax_fa3::wide
