// The kernel of few tiles, each of which a cluster shares (cluster.h): every CTA has one piece of
// one tile. What runs once waits for its instructions, so there is no schedule here, and nothing
// that is handed out: each warp finds out by itself what the CTA does.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>

#include "decode/cluster.h"
#include "decode/epilogue.h"
#include "decode/load.h"
#include "decode/mma.h"

namespace jax_fa3::decode {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    cluster_kernel(__grid_constant__ Params const params) {
  extern __shared__ char memory[];
  auto& storage = *reinterpret_cast<typename Traits::SharedStorage*>(memory);
  int const warp = cutlass::canonical_warp_idx_sync();
  cudaTriggerProgrammaticLaunchCompletion();
  // The loading warp waits for nobody but who makes the barriers.
  using cutlass::arch::NamedBarrier;
  auto const id = [](auto barrier) { return barrier_id(barrier, 0); };
  using Id = decode::NamedBarrier;
  if (warp == 2) {
    if (elect_one_sync()) {
      storage.init_barriers();
      storage.lacks_page[0] = false;
      SharedTile<Traits>(storage, params).expect(params.slot_rows);
    }
    __syncwarp();
    NamedBarrier::arrive(64, id(Id::kCanLoad));
  }
  SharePlace const place(params);
  if (warp == 3) {
    fetch_table(params, params.heads(place.tile), &storage.fetched);
    if (elect_one_sync()) {
      prefetch_tma_descriptor(&params.key);
      prefetch_tma_descriptor(&params.value);
    }
  }
  Share const share_of_tile = find_share(params, params.heads(place.tile));
  Work work = share_work(params, place, share_of_tile);
  Part part{};
  if (warp == 0) {
    part = find_part_of_lane(params, work, threadIdx.x % 32);
    NamedBarrier::sync(64, id(Id::kCanLoad));
  } else {
    NamedBarrier::sync(Traits::kThreads - 32, id(Id::kStarted));
  }
  cluster_arrive_relaxed();

  if (warp < 4) {
    if constexpr (Traits::kMovesRegisters) {
      cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    }
    if (warp == 0) {
      if (params.appended) {
        cudaGridDependencySynchronize();
        asm volatile("fence.proxy.async.global;" ::: "memory");  // TMA is to see them, too
      }
      PipelineState<Traits::kLoadStages> state;
      load_blocks<Traits>(params, storage, work, part, 0, &state);
    } else if (warp == 1) {
      if (params.appended) cudaGridDependencySynchronize();
      load_query<Traits>(params, storage, work);
      if (threadIdx.x % 32 == 0) storage.query_full.arrive();
      // The kernel after this one waits for this one only.
      cudaGridDependencySynchronize();
    }
  } else {
    if constexpr (Traits::kMovesRegisters) {
      cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    }
    find_full(params, &work);
    int const tile_row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    Interval rows[kRowsPerThread];
    find_rows<Traits>(params, work, tile_row, rows);
    typename Traits::ConsumerState state;
    Softmax softmax{params.exponents};
    Tensor tOrO = Traits::make_out();
    if (work.begin < work.end) {
      mma<Traits>(params, storage, state, work, 0, rows, softmax, tOrO);
    } else {
      clear(tOrO);
    }
    float lse[kRowsPerThread];
    finish<typename Traits::Element>(params, work, storage.lacks_page[0], rows, softmax, tOrO, lse);
    int const stage = (state.ring.stage + Traits::kStages - 2) % Traits::kStages;  // last keys
    share<Traits>(params, storage, work, stage, tile_row, lse, tOrO);
  }
}

}  // namespace jax_fa3::decode
