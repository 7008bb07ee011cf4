// The backward's named barriers (bar.sync, bar.arrive).
#pragma once

#include <cutlass/arch/barrier.h>

namespace jax_fa3::bwd {

// A kernel is fused, paired or wide, so these have the same numbers. An entry stands for as many
// barriers as its comment counts; the next entry's number leaves room for them.
enum class NamedBarrier : uint32_t {
  // Fused.
  kDScoresWritten = 1,  // 4, by warpgroup and buffer: the warpgroup's part of dS is written
  kDQueryFull = 5,      // 4, by warpgroup and dQ writer: its part of dQ is in shared memory
  kDQueryEmpty = 9,     // 2, by warpgroup: it has left shared memory again
  kTurn = 11,           // 2, by warpgroup: it may begin a tile, or a step (head dim 64)
  kTileRead = 13,       // both warpgroups have read the tile's last operands: where those are in
                        // shared memory gradients may be
  // Paired: beside kDQueryFull, kDQueryEmpty and kTileRead.
  kProbabilitiesShared = 1,  // P is in shared memory, with a soft cap P times its derivative
  kProbabilitiesTaken = 2,   // the other warpgroup has read it
  kScoreGradsShared = 3,     // dS is in shared memory
  kScoreGradsTaken = 4,      // the other warpgroup has read it, for its half of dQ
  kDerivativeTaken = 11,     // with a soft cap: P itself may take the place of what was shared
  // Wide.
  kProbabilitiesFull = 5,   // 2, by buffer: P has been handed from one warpgroup to the other
  kProbabilitiesEmpty = 7,  // 2, by buffer: the other has taken it
  kKeyMemoryFree = 9,       // the warpgroup that reads K needs it no more: its memory may hold dK
  kValueMemoryFree = 10,    // likewise V and dV
  // All kernels, dQ's own too.
  kGradOfWarpgroup0 = 14,  // the threads of one warpgroup, around its gradient in shared memory
  kGradOfWarpgroup1,
};

// Given to CUTLASS as its own type, a number is the hardware's, 1 to 15 (0 is __syncthreads); as a
// plain integer it would be counted from 8 on, and there are not enough. The first 7, which CUTLASS
// keeps for itself, are used by parts of it that are not used here.
using BarrierId = cutlass::arch::ReservedNamedBarriers;
static_assert(static_cast<uint32_t>(NamedBarrier::kGradOfWarpgroup1) <= 15);

CUTLASS_DEVICE BarrierId barrier_id(NamedBarrier first, int offset = 0) {
  return static_cast<BarrierId>(static_cast<uint32_t>(first) + offset);
}

CUTLASS_DEVICE void named_sync(NamedBarrier first, int offset, int threads) {
  cutlass::arch::NamedBarrier::sync(threads, barrier_id(first, offset));
}
CUTLASS_DEVICE void named_arrive(NamedBarrier first, int offset, int threads) {
  cutlass::arch::NamedBarrier::arrive(threads, barrier_id(first, offset));
}
// named_arrive() if `condition`, but without a branch: one while a wgmma is in flight makes ptxas
// wait for all of them.
CUTLASS_DEVICE void named_arrive_if(bool condition, NamedBarrier first, int offset, int threads) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p bar.arrive %1, %2;\n}"
               :
               : "r"(static_cast<int>(condition)),
                 "r"(static_cast<uint32_t>(barrier_id(first, offset))), "r"(threads)
               : "memory");
}

}  // namespace jax_fa3::bwd
