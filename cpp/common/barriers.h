// Barriers between the roles of a CTA: mbarrier pipelines through shared memory, and the named
// barriers among consumer warpgroups.
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

  CUTLASS_DEVICE void init(int num_consumer_arrivals) {
    for (int stage = 0; stage < kStages; ++stage) {
      full[stage].init(1);
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

// Hardware barriers of the CTA, each with one purpose.
enum class NamedBarrier : uint32_t {
  kTurnOfWarpgroup0,  // ping-pong: this warpgroup may issue its GEMMs
  kTurnOfWarpgroup1,
  kTurnOfWarpgroup2,
  kOutOfWarpgroup0,  // the threads of one warpgroup, around its output tile in shared memory
  kOutOfWarpgroup1,
  kOutOfWarpgroup2,
  kValueRead,  // every consumer warpgroup has read V: its memory may hold the output
};

CUTLASS_DEVICE uint32_t barrier_id(NamedBarrier first, int offset = 0) {
  return static_cast<uint32_t>(first) + offset;
}

// Ping-pong: the consumer warpgroups issue their GEMMs in turn, so that the softmax of one runs
// while the tensor cores work for another.
template <int kWarpgroups>
struct Turns {
  int warpgroup;

  // Each barrier is completed by the warpgroup that waits and the one that passes the turn on.
  static constexpr int kThreads = 2 * 128;

  CUTLASS_DEVICE void start() const {
    if constexpr (kWarpgroups > 1) {
      if (warpgroup == kWarpgroups - 1) pass();
    }
  }
  CUTLASS_DEVICE void wait() const {
    if constexpr (kWarpgroups > 1) {
      cutlass::arch::NamedBarrier::sync(kThreads,
                                        barrier_id(NamedBarrier::kTurnOfWarpgroup0, warpgroup));
    }
  }
  CUTLASS_DEVICE void pass() const {
    if constexpr (kWarpgroups > 1) {
      int const next = warpgroup + 1 == kWarpgroups ? 0 : warpgroup + 1;
      cutlass::arch::NamedBarrier::arrive(kThreads,
                                          barrier_id(NamedBarrier::kTurnOfWarpgroup0, next));
    }
  }
};

}  // namespace jax_fa3
