// The decoding kernel: persistent CTAs, two on an SM, each with a producer warpgroup and a
// consumer.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>

#include "decode/epilogue.h"
#include "decode/load.h"
#include "decode/mma.h"

namespace jax_fa3::decode {

template <class Traits>
CUTLASS_DEVICE void consume(Params const& params, typename Traits::SharedStorage& storage,
                            int warpgroup) {
  typename Traits::ConsumerState state;
  Tensor tOrO = partition_fragment_C(typename Traits::MmaPV{},
                                     Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDimV>>{});
  int const tile_row = warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  int const group = params.tiles.group;
  for (;; state.work.advance()) {
    storage.work_pipeline.full[state.work.stage].wait(state.work.phase);
    Work const& work = storage.work[state.work.stage];
    if (work.last) return;

    Interval rows[kRowsPerThread];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRowsPerThread; ++i) {
      int const row = (work.tile * Traits::kBlockM + tile_row + i * 8) / group;
      rows[i] = {0, 0};
      if (row >= work.sequence.count || work.begin == work.end) continue;
      // Of what a row sees, the part that is in these blocks.
      Interval const seen = params.tiles.window.of(work.sequence, row);
      rows[i] = {max(seen.begin, work.begin * Traits::kBlockN),
                 min(seen.end, work.end * Traits::kBlockN)};
    }
    Softmax softmax{params.exponents};
    if (work.begin < work.end) {
      mma<Traits>(params, storage, state, work, warpgroup, rows, softmax, tOrO);
    }
    // Its loads are done, so all its pages have been looked for.
    bool const lacks_page = storage.lacks_page[state.work.stage];
    store<Traits>(params, work, lacks_page, tile_row, rows, softmax, tOrO);
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

  if (warp == 0 && elect_one_sync()) {
    prefetch_tma_descriptor(&params.key);
    prefetch_tma_descriptor(&params.value);
    storage.init_barriers();
  }
  bool back = false;
  int const units = count_units<Traits>(params, storage, &back);  // and all threads meet

  cudaTriggerProgrammaticLaunchCompletion();  // the merging kernel's CTAs may come and wait

  if (warp < 4) {
    if constexpr (Traits::kMovesRegisters) {
      cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    }
    if (warp == 0) {
      load<Traits>(params, storage);
    } else if (warp == 1) {
      schedule<Traits>(params, storage, units, back);
    }
  } else {
    if constexpr (Traits::kMovesRegisters) {
      cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    }
    consume<Traits>(params, storage, warp / 4 - 1);
  }
}

}  // namespace jax_fa3::decode
