// The forward's named barriers (bar.sync, bar.arrive), and the turns that consumers take by them.
#pragma once

#include <cutlass/arch/barrier.h>

namespace jax_fa3::fwd {

// Each has one purpose. CUTLASS adds 8 to a number that is passed to it: barriers 0 to 7 are its.
enum class NamedBarrier : uint32_t {
  kTurnOfWarpgroup0,  // ping-pong: this warpgroup may issue its GEMMs
  kTurnOfWarpgroup1,
  kTurnOfWarpgroup2,
  kOutOfWarpgroup0,  // the threads of one warpgroup, around its output tile in shared memory
  kOutOfWarpgroup1,
  kOutOfWarpgroup2,
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

}  // namespace jax_fa3::fwd
