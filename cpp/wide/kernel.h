// The forward kernel of wide heads: a cluster of two CTAs for each tile, each
// of one producer warpgroup and two consumers.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>

#include "wide/epilogue.h"
#include "wide/load.h"
#include "wide/mma.h"

namespace jax_fa3::wide {

// The tile's key blocks, by one warp.
template <class Traits>
CUTLASS_DEVICE WorkTile find_work(fwd::Params const& params) {
  WorkTile work{};
  work.tile = params.order(blockIdx.x / kClusterSize);
  IntervalHull hull;
  CUTLASS_PRAGMA_UNROLL
  for (int row = threadIdx.x % 32; row < Traits::kBlockM; row += 32) {
    hull.add(params.mask.row_interval(work.tile.batch, work.tile.block * Traits::kBlockM + row));
  }
  hull.reduce_warp();
  work.blocks = hull.blocks(Traits::kBlockN);
  // The soft cap is applied where the mask is: every block takes that way.
  if (params.score.cap_scale != 0.f) work.blocks.full_end = work.blocks.full_begin;
  return work;
}

// half: of O's columns, and which of the two warpgroups this is.
template <class Traits, int kHalf>
CUTLASS_DEVICE void consume(fwd::Params const& params, typename Traits::SharedStorage& storage,
                            WorkTile const& work, int rank) {
  Tensor tOrO = partition_fragment_C(typename Traits::MmaPV{},
                                     Shape<Int<Traits::kRows>, Int<Traits::kColumns>>{});
  int const first_row = work.tile.block * Traits::kBlockM + rank * Traits::kRows +
                        threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  auto const find_rows = [&](Interval(&rows)[kRowsPerThread]) {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      rows[row] = params.mask.row_interval(work.tile.batch, first_row + row * 8);
    }
  };
  Interval rows[kRowsPerThread];
  Softmax softmax{params.exponents};
  bool const visits = work.blocks.begin < work.blocks.end;
  if constexpr (kHalf == 0) {
    if (visits) {
      mma_scores<Traits>(params, storage, work.blocks, find_rows, rows, softmax, tOrO);
    } else {
      find_rows(rows);
    }
  } else {
    if (visits) mma_values<Traits>(storage, work.blocks, tOrO);
    find_rows(rows);
  }
  share_rows<Traits>(storage, kHalf, softmax);
  wide::store<Traits>(params, storage, work.tile, rank, kHalf, rows, softmax, tOrO);
}

template <class Traits>
__global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(Traits::kThreads, 1)
    fwd_kernel(__grid_constant__ fwd::Params const params) {
  extern __shared__ char memory[];
  auto& storage = *reinterpret_cast<typename Traits::SharedStorage*>(memory);
  int const warp = cutlass::canonical_warp_idx_sync();
  int const rank = static_cast<int>(cute::block_rank_in_cluster());

  if (warp == 0) {
    WorkTile const work = find_work<Traits>(params);
    if (elect_one_sync()) {
      storage.work = work;
      storage.query_full.init(1);
      storage.barriers.init(Traits::kConsumerWarps);
      cutlass::arch::fence_barrier_init();
    }
  }
  cute::cluster_sync();
  WorkTile const work = storage.work;

  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (warp == 0 && work.blocks.begin < work.blocks.end) {
      wide::load<Traits>(params, storage, work, rank);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    if (warp < 8) {
      consume<Traits, 0>(params, storage, work, rank);
    } else {
      consume<Traits, 1>(params, storage, work, rank);
    }
  }
  __syncwarp();
  cute::cluster_sync();  // the other CTA still writes to this one's barriers
}

}  // namespace jax_fa3::wide
