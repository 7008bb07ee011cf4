// The warps that add dQ, from shared memory, to dq_accum in global memory.
//
// The first part of a sum is stored, so that nobody needs to clear it. Those that come meanwhile
// wait until it is written, for a CTA that has its part at hand and waits for nothing.
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

// Issues the store of `bytes` of shared memory, as bulk_add_fp32() issues an addition.
CUTLASS_DEVICE void bulk_store(float* global, float const* smem, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               :
               : "l"(global), "r"(cute::cast_smem_ptr_to_uint(smem)), "r"(bytes)
               : "memory");
}

// Whether another CTA has set `word` to `value` by reach(). If so, what it added before is there,
// and this thread's additions may follow.
CUTLASS_DEVICE bool has_reached(int const* word, int value) {
  int found;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(word) : "memory");
  if (found != value) return false;
  asm volatile("fence.proxy.async;" ::: "memory");
  return true;
}

// Sets `word` to `value` once all that this thread has added is written.
CUTLASS_DEVICE void reach(int* word, int value) {
  bulk_wait_written();
  asm volatile("fence.proxy.async;" ::: "memory");
  asm volatile("st.release.gpu.global.s32 [%0], %1;" : : "l"(word), "r"(value) : "memory");
}

// Whether this thread is to begin a sum (params.h). Else it is there on return.
CUTLASS_DEVICE bool begins_sum(int* sum) {
  if (atomicCAS(sum, kNoSum, kSumBegun) == kNoSum) return true;
  while (!has_reached(sum, kSumHeld)) {
  }
  return false;
}

// How many key blocks after this one have a key that a dense mask lets any of the step's rows see;
// by a whole warp.
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
                             typename Traits::SharedStorage& storage, KeyTile const& of_cta,
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
  KeyTile tile = of_cta;
  for (;; state.advance()) {
    storage.query_pipeline.full[state.stage].wait(state.phase);
    Step const step = storage.steps[state.stage];
    if constexpr (Traits::kPersistent) tile = storage.tiles[state.stage];
    __syncwarp();
    if (Traits::kPersistent ? tile.n_block < 0 : step.m_block < 0) return;
    if (elected) storage.query_pipeline.empty[state.stage].arrive();
    if (state.stage == writer && step.m_block >= 0) {
      int64_t const index = params.m_block_index(tile.batch, step.head, step.m_block);
      float* const accum = params.dq_accum + index * Traits::kSizedQ;
      using Stats = RowStats<Traits::kBlockM>;
      auto* const sum =
          reinterpret_cast<int*>(params.row_stats + index * Stats::kSize + Stats::kSum);
      // Of the elected thread. Most find the sum begun long before they have their part.
      bool const held = params.turns == nullptr && elected && has_reached(sum, kSumHeld);
      bool const in_turn = params.turns != nullptr && elected;
      int turn = 0;
      if constexpr (Traits::kHasBits) {
        if (params.turns != nullptr) turn = seen_behind<Traits>(params, tile, step);
        while (in_turn && !has_reached(params.turns + index, turn)) {
        }
      } else if (in_turn) {
        int const end = params.blocks_of(tile.batch)[step.m_block].hull.max_end;
        turn = (end - 1) / Traits::kBlockN - tile.n_block;  // key blocks behind this one
        while (!has_reached(params.turns + index, turn)) {
        }
      }
      bool begins = in_turn && turn == 0 && !params.accumulates_dq && !params.clears_dq();
      __syncwarp();
      auto const add = [&](int warpgroup, bool claims) {
        named_sync(NamedBarrier::kDQueryFull, warpgroup * 2 + writer, 128 + 32);
        if (elected) {
          if (claims && !in_turn && !held) begins = begins_sum(sum);
          float* const to = accum + warpgroup * kPart;
          float const* const part = storage.dquery + warpgroup * kPart;
          if (begins) {
            bulk_store(to, part, kPart * 4);
          } else {
            bulk_add_fp32(to, part, kPart * 4);
          }
          cute::tma_store_arrive();
        }
        __syncwarp();
      };
      if constexpr (Traits::kPaired) {
        // The second warpgroup has its part of a step long before the first, but for an addition
        // in turn, which is to be short, both must be there.
        if (params.turns != nullptr) {
          add(0, false);
        } else {
          add(1, true);
        }
        if (elected) cute::tma_store_wait<0>();
        __syncwarp();
        release(params.turns != nullptr ? 0 : 1);
        add(params.turns != nullptr ? 1 : 0, false);
        if (elected) cute::tma_store_wait<0>();
        __syncwarp();
        release(params.turns != nullptr ? 1 : 0);
      } else {
        add(0, true);
        add(1, false);
        if (elected) cute::tma_store_wait<1>();
        __syncwarp();
        release(0);
        if (elected) cute::tma_store_wait<0>();
        __syncwarp();
        release(1);
      }
      if (begins) reach(sum, kSumHeld);
      if (in_turn) reach(params.turns + index, turn + 1);
    }
    if (!Traits::kPersistent && step.ends) break;
  }
}

}  // namespace jax_fa3::bwd
