// The warps that add dQ, from shared memory, to dq_accum in global memory.
//
// Deterministic gradients: the key blocks of a head add to a block of query rows one after the
// other, the last first. That is the order in which they are launched, so a CTA waits only for CTAs
// that are running or done. A turn (to see that it has come, to add, to wait until all is written,
// to pass it on) takes longer than a step of the main loop, so two warps take every second step
// each.
#pragma once

#include "bwd/params.h"
#include "bwd/traits.h"
#include "common/tma.h"

namespace jax_fa3::bwd {

CUTLASS_DEVICE void wait_for_turn(int const* turns, int turn) {
  int reached;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(reached) : "l"(turns) : "memory");
  } while (reached != turn);
  asm volatile("fence.proxy.async;" ::: "memory");
}

CUTLASS_DEVICE void pass_turn(int* turns, int turn) {
  bulk_wait_written();
  asm volatile("fence.proxy.async;" ::: "memory");
  asm volatile("st.release.gpu.global.s32 [%0], %1;" : : "l"(turns), "r"(turn + 1) : "memory");
}

// Key blocks behind this one of which a dense mask shows the step's rows anything; by a whole warp.
template <class Traits>
CUTLASS_DEVICE int seen_behind(BitsParams const& params, KeyTile const& tile, Step const& step) {
  int const end = params.blocks_of(tile.batch)[step.m_block].hull.max_end;
  int count = 0;
  for (int n_block = tile.n_block + 1 + threadIdx.x % 32; n_block * Traits::kBlockN < end;
       n_block += 32) {
    BlockBits const bits =
        block_bits(params.bits, tile.batch, step.head, n_block, step.m_block / kBlocksOfHull);
    count += bits.any >> step.m_block % kBlocksOfHull & 1;
  }
  return __reduce_add_sync(~0u, count);
}

template <class Traits>
CUTLASS_DEVICE void write_dq(typename Traits::Params const& params,
                             typename Traits::SharedStorage& storage, KeyTile const& tile,
                             int writer) {
  constexpr int kPart = Traits::kSizedQ / 2;  // of one warpgroup
  PipelineState<Traits::kStages> state;
  bool const elected = threadIdx.x % 32 == 0;
  auto const release = [](int warpgroup) {
    named_arrive(NamedBarrier::kDQueryEmpty, warpgroup, 128 + 32);
  };
  if (writer == 0) {
    release(0);
    release(1);
  }
  for (;; state.advance()) {
    storage.query_pipeline.full[state.stage].wait(state.phase);
    Step const step = storage.steps[state.stage];
    __syncwarp();
    if (step.m_block < 0) return;
    if (elected) storage.query_pipeline.empty[state.stage].arrive();
    if (state.stage == writer) {
      int64_t const index = params.m_block_index(tile.batch, step.head, step.m_block);
      float* const accum = params.dq_accum + index * Traits::kSizedQ;
      bool const in_turn = params.turns != nullptr && elected;
      int turn = 0;
      if constexpr (Traits::kHasBits) {
        if (params.turns != nullptr) turn = seen_behind<Traits>(params, tile, step);
        if (in_turn) wait_for_turn(params.turns + index, turn);
      } else if (in_turn) {
        int const end = params.blocks_of(tile.batch)[step.m_block].hull.max_end;
        turn = (end - 1) / Traits::kBlockN - tile.n_block;  // key blocks behind this one
        wait_for_turn(params.turns + index, turn);
      }
      __syncwarp();
      CUTLASS_PRAGMA_UNROLL
      for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
        named_sync(NamedBarrier::kDQueryFull, warpgroup * 2 + writer, 128 + 32);
        if (elected) {
          bulk_add_fp32(accum + warpgroup * kPart, storage.dquery + warpgroup * kPart, kPart * 4);
          cute::tma_store_arrive();
        }
        __syncwarp();
      }
      if (elected) cute::tma_store_wait<1>();
      __syncwarp();
      release(0);
      if (elected) cute::tma_store_wait<0>();
      __syncwarp();
      release(1);
      if (in_turn) pass_turn(params.turns + index, turn);
    }
    if (step.ends) break;
  }
}

}  // namespace jax_fa3::bwd
