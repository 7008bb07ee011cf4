// The forward's named barriers (bar.sync, bar.arrive), and the turns that consumers take by them.
#pragma once

#include <cutlass/arch/barrier.h>

namespace jax_fa3::fwd {

// Each has one purpose. CUTLASS adds 8 to a number that is passed to it: barriers 0 to 7 are its.
enum class NamedBarrier : uint32_t {
  kTurnOfWarpgroup0,  // ping-pong: this warpgroup may issue its GEMMs
  kTurnOfWarpgroup1,
  kTurnOfWarpgroup2,
  // The threads of one warpgroup, around its output tile in shared memory and in
  // any_of_warpgroup().
  kOutOfWarpgroup0,
  kOutOfWarpgroup1,
  kOutOfWarpgroup2,
  kValuesRead,  // every consumer warpgroup has read V: its memory may hold the output
};

CUTLASS_DEVICE uint32_t barrier_id(NamedBarrier first, int offset = 0) {
  return static_cast<uint32_t>(first) + offset;
}

// Whether something is true of any thread of a warpgroup, all of whose threads call this.
CUTLASS_DEVICE bool any_of_warpgroup(int warpgroup, bool of_thread) {
  uint32_t const barrier =
      barrier_id(NamedBarrier::kOutOfWarpgroup0, warpgroup) +
      static_cast<uint32_t>(cutlass::arch::ReservedNamedBarriers::FirstUserBarrier);
  uint32_t any;
  asm volatile(
      "{\n"
      ".reg .pred of_thread, any;\n"
      "setp.ne.u32 of_thread, %1, 0;\n"
      "barrier.cta.red.or.pred any, %2, 128, of_thread;\n"
      "selp.u32 %0, 1, 0, any;\n"
      "}\n"
      : "=r"(any)
      : "r"(static_cast<uint32_t>(of_thread)), "r"(barrier)
      : "memory");
  return any != 0;
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
