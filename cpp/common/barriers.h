// mbarriers between the roles of a CTA: what TMA fills and consumers read, in shared memory. (The
// named barriers of a kernel, bar.sync and bar.arrive, are in its folder's barriers.h.)
#pragma once

#include <cutlass/arch/barrier.h>

namespace jax_fa3 {

using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;

// A ring of kStages buffers: `full` when filled, `empty` when every consumer has read it.
template <int kStages>
struct Pipeline {
  FullBarrier full[kStages];
  EmptyBarrier empty[kStages];

  CUTLASS_DEVICE void init(int num_consumer_arrivals, int num_producer_arrivals = 1) {
    for (int stage = 0; stage < kStages; ++stage) {
      full[stage].init(num_producer_arrivals);
      empty[stage].init(num_consumer_arrivals);
    }
  }
};

// A position in such a ring. Consumers start at phase 0; producers wait for `empty` with the
// opposite phase, so that the first round passes at once.
template <int kStages>
struct PipelineState {
  int stage = 0;
  uint32_t phase = 0;

  CUTLASS_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Q's barriers: each consumer warpgroup has its own 64 rows, and releases them by itself.
template <int kWarpgroups>
CUTLASS_DEVICE void init_query_barriers(FullBarrier (&full)[kWarpgroups],
                                        EmptyBarrier (&empty)[kWarpgroups]) {
  for (int warpgroup = 0; warpgroup < kWarpgroups; ++warpgroup) {
    full[warpgroup].init(1);
    empty[warpgroup].init(4);  // warps
  }
}

}  // namespace jax_fa3
