// The two kernels of the backward of wide heads: that of dK and dV, and that of dQ.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>

#include "wide_bwd/epilogue.h"
#include "wide_bwd/load.h"
#include "wide_bwd/weights.h"

namespace jax_fa3::wide_bwd {

template <class Traits>
CUTLASS_DEVICE void init_barriers(typename Traits::SharedStorage& storage) {
  storage.pieces.init(Traits::kConsumerWarps);
  storage.records.init(Traits::kConsumerWarps);
  storage.resident_full.init(Traits::kTilesResident);
  storage.staged.init(1);
  for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
    storage.received[warpgroup].init(1);
    storage.may_send[warpgroup].init(4);  // warps
  }
  cutlass::arch::fence_barrier_init();
}

// What the cluster works on. It is found anew where it is needed: kept for the whole kernel it
// spilled.
template <class Traits>
CUTLASS_DEVICE int cluster_index() {
  int index = blockIdx.x / Traits::kClusterSize;
  asm volatile("" : "+r"(index));
  return index;
}
template <class Traits>
CUTLASS_DEVICE bwd::KeyTile tile_of_keys(Params const& params) {
  TileCoord const next = params.order(cluster_index<Traits>());
  return {next.block, next.head / params.num_splits, next.batch, next.head % params.num_splits};
}
template <class Traits>
CUTLASS_DEVICE WorkTile tile_of_queries(Params const& params) {
  WorkTile work{};
  work.tile = params.dq_order(cluster_index<Traits>());
  bwd::QueryBlock const& block = params.blocks_of(work.tile.batch)[work.tile.block];
  work.blocks = block.hull.blocks(Traits::kKeysOfStep);
  return work;
}

// All sums of a tile of keys, by one warpgroup.
template <class Traits, class Work>
CUTLASS_DEVICE void consume_of_keys(Params const& params, typename Traits::SharedStorage& storage,
                                    int first_cta, int warpgroup, float factor, Work& work) {
  Tensor scores = partition_fragment_C(typename Traits::MmaScores{}, Shape<_64, _64>{});
  Tensor grad =
      partition_fragment_C(typename Traits::MmaGrad{}, Shape<_64, Int<Traits::kColumns>>{});
  Gemms<Traits> gemms{storage, warpgroup, first_cta};
  bool ends;
  bool first = true;
  do {
    clear(grad);
    work.read();
    ends = true;
    if (work.step.m_block >= 0) {
      if (first) storage.resident_full.wait(0);
      run_steps(work, gemms, scores, grad);
      ends = work.step.ends;
      bwd::scale_grad(grad, factor);
    }
    store_of_keys<Traits>(params, storage, tile_of_keys<Traits>(params), Place<Traits>::here(),
                          warpgroup, first, grad);
    first = false;
  } while (!ends);
}

template <class Traits>
CUTLASS_DEVICE void consume_of_keys(Params const& params, typename Traits::SharedStorage& storage,
                                    Place<Traits> const& place, int warpgroup) {
  bwd::KeyTile const tile = tile_of_keys<Traits>(params);
  int const key = tile.n_block * Traits::kBlockN + place.side * 64 + threadIdx.x % 128 / 32 * 16 +
                  threadIdx.x % 32 / 4;
  QueryRecords<Traits> const records{params, storage, warpgroup, key};
  Mailbox<Traits> mailbox{storage, warpgroup, place.rank, place.peer};
  if (place.role == 1) {
    using Element = typename Traits::Element;
    float const scale = bwd::ds_scale<Element>(params, tile.batch, tile.head_k);
    mailbox.expect();
    ScoreGradsOfKeys<Traits> work{records, mailbox, scale};
    consume_of_keys<Traits>(params, storage, place.first, warpgroup, params.softmax_scale / scale,
                            work);
  } else if (params.score.cap_scale == 0.f) {
    ProbabilitiesOfKeys<Traits, false> work{records, mailbox};
    consume_of_keys<Traits>(params, storage, place.first, warpgroup, 1.f, work);
  } else {
    ProbabilitiesOfKeys<Traits, true> work{records, mailbox};
    consume_of_keys<Traits>(params, storage, place.first, warpgroup, 1.f, work);
  }
}

template <class Traits>
CUTLASS_DEVICE void consume_of_queries(Params const& params,
                                       typename Traits::SharedStorage& storage,
                                       WorkTile const& work, Place<Traits> const& place,
                                       int warpgroup) {
  using Element = typename Traits::Element;
  Tensor scores = partition_fragment_C(typename Traits::MmaScores{}, Shape<_64, _64>{});
  Tensor grad =
      partition_fragment_C(typename Traits::MmaGrad{}, Shape<_64, Int<Traits::kColumns>>{});
  clear(grad);
  float const scale =
      bwd::ds_scale<Element>(params, work.tile.batch, work.tile.head / params.group);
  if (work.blocks.begin < work.blocks.end) {
    OwnRows rows;
    int const row = warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    rows.read<Traits>(params, work.tile, row);
    KeySteps<Traits> const steps{params,
                                 storage,
                                 warpgroup,
                                 work.blocks.end - 1,
                                 work.blocks.begin,
                                 rows,
                                 Mailbox<Traits>{storage, warpgroup, place.rank, place.peer}};
    Gemms<Traits> gemms{storage, warpgroup, place.first};
    storage.resident_full.wait(0);
    if (place.role == 1) {
      ScoreGradsOfQueries<Traits> of_steps{steps, scale};
      of_steps.mailbox.expect();
      run_steps(of_steps, gemms, scores, grad);
    } else if (params.score.cap_scale == 0.f) {
      ProbabilitiesOfQueries<Traits, false> of_steps{steps};
      run_steps(of_steps, gemms, scores, grad);
    } else {
      ProbabilitiesOfQueries<Traits, true> of_steps{steps};
      run_steps(of_steps, gemms, scores, grad);
    }
  }
  store_of_queries<Traits>(params, storage, work.tile, place, warpgroup, scale, grad);
}

template <class Traits>
__global__ void __cluster_dims__(Traits::kClusterSize, 1, 1) __launch_bounds__(Traits::kThreads, 1)
    bwd_kernel(__grid_constant__ Params const params) {
  extern __shared__ char memory[];
  auto& storage = *reinterpret_cast<typename Traits::SharedStorage*>(memory);
  int const warp = cutlass::canonical_warp_idx_sync();
  auto const place = Place<Traits>::here();
  if (warp == 0 && elect_one_sync()) init_barriers<Traits>(storage);
  cute::cluster_sync();

  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (warp == 0) {
      if constexpr (Traits::kOfKeys) {
        load_of_keys<Traits>(params, storage, tile_of_keys<Traits>(params), place);
      } else {
        load_of_queries<Traits>(params, storage, tile_of_queries<Traits>(params), place);
      }
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    if constexpr (Traits::kOfKeys) {
      consume_of_keys<Traits>(params, storage, place, warp / 4 - 1);
    } else {
      consume_of_queries<Traits>(params, storage, tile_of_queries<Traits>(params), place,
                                 warp / 4 - 1);
    }
  }
  __syncwarp();
  cute::cluster_sync();  // others still write to this CTA's memory and barriers
}

}  // namespace jax_fa3::wide_bwd
