// The barriers of a ring of buffers that several CTAs of a cluster fill together.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "common/barriers.h"

namespace jax_fa3 {

// kCtas CTAs of the cluster fill each stage in the shared memory of all of them, each CTA a part of
// it; `empty` when the consumers of all of them have read it, for any of them writes to all.
template <int kStages, int kCtas>
struct RingBarriers {
  FullBarrier full[kStages];
  FullBarrier staged[kStages];  // it has landed, and has rows that are still to be zeroed
  EmptyBarrier empty[kStages];

  CUTLASS_DEVICE void init(int consumer_warps) {
    for (int stage = 0; stage < kStages; ++stage) {
      full[stage].init(1);
      staged[stage].init(1);
      empty[stage].init(kCtas * consumer_warps);
    }
  }

  // By each warp of the consumers, of a stage that it has read. The CTAs are those from `first` on.
  CUTLASS_DEVICE void release(int stage, int first = 0) {
    uint32_t const lane = threadIdx.x % 32;
    empty[stage].arrive(first + lane, lane < kCtas);
  }
};

}  // namespace jax_fa3
