// The decoding kernel: persistent CTAs, two on an SM, each with a producer warpgroup and a
// consumer. Of an e4m3 cache the other two warps of the producer widen what it loads.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>

#include "decode/epilogue.h"
#include "decode/few.h"
#include "decode/load.h"
#include "decode/merge.h"
#include "decode/mma.h"
#include "decode/widen.h"

namespace jax_fa3::decode {

template <class Traits>
CUTLASS_DEVICE void consume(Params const& params, typename Traits::SharedStorage& storage,
                            int warpgroup) {
  typename Traits::ConsumerState state;
  int const first_row = Traits::kFew ? 0 : warpgroup * 64 + threadIdx.x % 128 / 32 * 16;
  int const tile_row = first_row + threadIdx.x % 32 / 4;
  for (;; state.work.advance()) {
    storage.work_pipeline.full[state.work.stage].wait(state.work.phase);
    Work const& work = storage.work[state.work.stage];
    if (work.last) return;

    Interval rows[kRowsPerThread];
    find_rows<Traits>(params, work, tile_row, rows);
    float sinks[kRowsPerThread];
    find_sinks<Traits>(params, work, tile_row, sinks);
    Softmax softmax{params.exponents};
    Tensor tOrO = Traits::make_out();
    if (work.begin < work.end) {
      if constexpr (Traits::kFew) {
        mma_few<Traits>(params, storage, state, work, rows, softmax, tOrO);
      } else {
        mma<Traits>(params, storage, state, work, warpgroup, rows, softmax, tOrO);
      }
      if constexpr (Traits::kE4M3) {
        float const scale =
            params.value_scale.of_positions ? 1.f : *params.value_scale.at(work.index, work.head);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < size(tOrO); ++i) tOrO(i) *= scale;
      }
    } else {
      clear(tOrO);
      storage.query_full.wait(state.query_phase);  // and what the consumers need of the work
      state.query_phase ^= 1;
      if (threadIdx.x % 32 == 0) storage.query_empty.arrive();
    }
    // A kernel that this one overtakes may still read its own parts there.
    if (work.slot != Work::kNone) cudaGridDependencySynchronize();
    Arrival<Traits> arrival(params, storage, work, state.work.stage);
    // Its loads are done, so all its pages have been looked for.
    bool const lacks_page = storage.lacks_page[state.work.stage];
    if constexpr (Traits::kFew) {
      store_few<Traits>(params, storage, work, lacks_page, rows, softmax, tOrO);
    } else {
      float lse[kRowsPerThread];
      finish<typename Traits::Element>(params, work, lacks_page, rows, softmax, tOrO, lse);
      store<Traits>(params, work, tile_row, sinks, lse, tOrO);
    }
    if (work.parts > 0) arrival.join_if_last();
    __syncwarp();
    if (threadIdx.x % 32 == 0) storage.work_pipeline.empty[state.work.stage].arrive();
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    decode_kernel(__grid_constant__ Params const params) {
  extern __shared__ char memory[];
  auto& storage = *reinterpret_cast<typename Traits::SharedStorage*>(memory);
  int const warp = cutlass::canonical_warp_idx_sync();
  cudaTriggerProgrammaticLaunchCompletion();

  if (warp == 2 && elect_one_sync()) {
    storage.init_barriers();
    if constexpr (Traits::kFew) {
      if (params.cluster > 0) SharedTile<Traits>(storage, params).expect(params.slot_rows);
    }
  }
  if (warp == 3 && elect_one_sync()) {
    prefetch_tma_descriptor(&params.key);
    prefetch_tma_descriptor(&params.value);
  }
  if (warp == 3 && params.tiles_of_cta > 0) {
    fetch_table(params, min(params.heads(SharePlace(params).tile), params.sequences.batch - 1),
                &storage.fetched);
  }
  Ours ours;
  Share share{};
  bool equal = false;
  int units = 0;
  if (params.tiles_of_cta > 0) equal = are_equal<Traits>(params, &share);  // and all threads meet
  if (!equal) units = count_units<Traits>(params, storage, &ours);         // and here
  if (Traits::kFew && params.cluster > 0) cluster_arrive_relaxed();

  if (warp < 4) {
    if constexpr (Traits::kMovesRegisters) {
      cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    }
    if (warp == 0) {
      load<Traits>(params, storage, equal, share);
    } else if (warp == 1) {
      schedule<Traits>(params, storage, units, ours, equal);
    } else if constexpr (Traits::kWidens) {
      widen<Traits>(storage);
    }
  } else {
    if constexpr (Traits::kMovesRegisters) {
      cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    }
    consume<Traits>(params, storage, warp / 4 - 1);
  }
}

}  // namespace jax_fa3::decode
