// The forward kernel: persistent CTAs of one producer warpgroup and two or three consumers.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>

#include "fwd/bias.h"
#include "fwd/epilogue.h"
#include "fwd/load.h"
#include "fwd/mma.h"

namespace jax_fa3::fwd {

template <class Element, int kHeadDim, int kHeadDimV, Keys kKeys>
CUTLASS_DEVICE void consume(
    Traits<Element, kHeadDim, kHeadDimV, kKeys>,
    typename Traits<Element, kHeadDim, kHeadDimV, kKeys>::Params const& params,
    typename Traits<Element, kHeadDim, kHeadDimV, kKeys>::SharedStorage& storage, int warpgroup) {
  using Traits = Traits<Element, kHeadDim, kHeadDimV, kKeys>;
  Turns<Traits::kPingPong ? Traits::kConsumerWarpgroups : 1> const turns{warpgroup};
  typename Traits::ConsumerState state;
  Tensor tOrO = partition_fragment_C(typename Traits::MmaPV{},
                                     Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDimV>>{});
  int const tile_row = warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;

  turns.start();
  for (;; state.work.advance()) {
    WorkTile const work = take_work(storage, state.work);
    if (work.last) break;

    auto const find_rows = [&](Interval(&rows)[kRowsPerThread]) {
      TileRows const of_tile(params.mask, work.tile.batch, work.tile.block * Traits::kBlockM);
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kRowsPerThread; ++row) rows[row] = of_tile(tile_row + row * 8);
    };
    Interval rows[kRowsPerThread];
    typename Traits::Softmax softmax{params.exponents};
    if constexpr (Traits::kHasAlibi) {
      softmax.slope = params.alibi.slope(work.tile.batch, work.tile.head);
      softmax.first_row = work.tile.block * Traits::kBlockM + tile_row;
    }
    if (work.blocks.begin < work.blocks.end) {
      mma<Traits>(params, storage, state, turns, work, find_rows, rows, softmax, tOrO);
      if constexpr (Traits::kHasDropout) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < size(tOrO); ++i) tOrO(i) *= params.dropout.scale;
      }
    } else {
      find_rows(rows);
    }
    if constexpr (Traits::kHasBias || Traits::kHasBits) mark_hidden_rows(softmax, rows);
    store<Traits>(params, storage, work.tile, warpgroup, rows, softmax, tOrO);
  }
  tma_store_wait<0>();
}

// load(), use_spare_warp() and consume() are found by the type of their first argument: those of
// this folder, or for the FP8 traits those of fp8/.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    fwd_kernel(__grid_constant__ typename Traits::Params const params) {
  extern __shared__ char memory[];
  auto& storage = *reinterpret_cast<typename Traits::SharedStorage*>(memory);
  int const warp = cutlass::canonical_warp_idx_sync();

  if (warp == 0 && elect_one_sync()) {
    prefetch_tma_descriptor(&params.query);
    prefetch_tma_descriptor(&params.key);
    prefetch_tma_descriptor(&params.value);
    storage.init_barriers();
  }
  __syncthreads();

  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (warp == 0) {
      load(Traits{}, params, storage);
    } else if (warp == 1) {
      schedule<Traits>(params, storage);
    } else {
      use_spare_warp(Traits{}, params, storage, warp - 2);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    consume(Traits{}, params, storage, warp / 4 - 1);
  }
}

}  // namespace jax_fa3::fwd
