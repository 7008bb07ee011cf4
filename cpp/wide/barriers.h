// Named barriers of the two consumer warpgroups, and the ring of pieces that
// two CTAs fill together.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/cluster_sm90.hpp>

#include "common/barriers.h"

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

template <int kStages>
struct RingBarriers {
  FullBarrier full[kStages];
  FullBarrier staged[kStages];  // V has landed, its rows past the length are
                                // still to be zeroed
  EmptyBarrier empty[kStages];  // read by all consumers of both CTAs

  CUTLASS_DEVICE void init(int consumer_warps) {
    for (int stage = 0; stage < kStages; ++stage) {
      full[stage].init(1);
      staged[stage].init(1);
      empty[stage].init(kClusterSize * consumer_warps);
    }
  }

  // A consumer's warp needs the piece no more: both CTAs must know, for either
  // writes to both.
  CUTLASS_DEVICE void release(int stage) {
    uint32_t const lane = threadIdx.x % 32;
    empty[stage].arrive(lane, lane < kClusterSize);
  }
};

}  // namespace jax_fa3::wide
