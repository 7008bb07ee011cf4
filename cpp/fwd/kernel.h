// The forward kernel: persistent CTAs of one producer warpgroup and one to three consumers.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>

#include "fwd/bias.h"
#include "fwd/epilogue.h"
#include "fwd/load.h"
#include "fwd/mma.h"
#include "fwd/spare_warp.h"

namespace jax_fa3::fwd {

// Passes over blocks of K and V that other warpgroups need and this one does not, and its turns.
template <class Storage, class State, class Turns>
CUTLASS_DEVICE void skip_blocks(Storage& storage, State& state, Turns turns, int count) {
  auto const skip = [](auto& pipeline, auto& position) {
    pipeline.full[position.stage].wait(position.phase);
    __syncwarp();
    if (threadIdx.x % 32 == 0) pipeline.empty[position.stage].arrive();
    position.advance();
  };
  CUTLASS_PRAGMA_NO_UNROLL
  for (; count > 0; --count) {
    turns.wait();
    turns.pass();
    skip(storage.key_pipeline, state.key);
    skip(storage.value_pipeline, state.value);
  }
}

template <class Element, int kHeadDim, int kHeadDimV, Kind kKind>
CUTLASS_DEVICE void consume(
    Traits<Element, kHeadDim, kHeadDimV, kKind>,
    typename Traits<Element, kHeadDim, kHeadDimV, kKind>::Params const& params,
    typename Traits<Element, kHeadDim, kHeadDimV, kKind>::SharedStorage& storage, int warpgroup) {
  using Traits = Traits<Element, kHeadDim, kHeadDimV, kKind>;
  Turns<Traits::kPingPong ? Traits::kConsumerWarpgroups : 1> const turns{warpgroup};
  typename Traits::ConsumerState state;
  Tensor tOrO = partition_fragment_C(typename Traits::MmaPV{},
                                     Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDimV>>{});
  int const tile_row = warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;

  turns.start();
  for (;; state.work.advance()) {
    WorkTile work = read_work(storage, state.work);
    BlockRange const of_tile = work.blocks;
    TileRows const intervals = storage.tile_rows[state.work.stage];
    if constexpr (Traits::kBlocksByWarpgroup) {
      work.blocks = storage.warpgroup_blocks[state.work.stage][warpgroup];
      if (work.blocks.begin < work.blocks.end) work.blocks.begin = of_tile.begin;
    }
    __syncwarp();
    release_work(storage, state.work);
    if (work.last) break;

    auto const find_rows = [&](Interval(&rows)[kRowsPerThread]) {
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kRowsPerThread; ++row) {
        rows[row] =
            Traits::kKeysStay ? Interval{0, params.mask.seqlen_k} : intervals(tile_row + row * 8);
      }
    };
    Interval rows[kRowsPerThread];
    typename Traits::Softmax softmax{params.exponents};
    float inverse_sum[kRowsPerThread];
    auto const end_rows = [&] {
      if constexpr (Traits::kHasBias || Traits::kHasBits) mark_hidden_rows(softmax, rows);
      if constexpr (Traits::kSharesKeys) {
        // There may be fewer blocks than CTAs.
        if (params.num_splits > 1) mark_hidden_rows(softmax, rows);
      }
      sum_rows<Element>(params.softmax_scale, sink_of(params, work.tile), softmax, inverse_sum);
      store_lse<Traits>(params, work.tile, warpgroup, rows, softmax);
    };
    bool const sees = work.blocks.begin < work.blocks.end;
    if constexpr (Traits::kBlocksByWarpgroup) {
      if (!sees && of_tile.begin < of_tile.end) {
        storage.query_full[warpgroup].wait(state.query_phase);
        state.query_phase ^= 1;
        __syncwarp();
        if (threadIdx.x % 32 == 0) storage.query_empty[warpgroup].arrive();
      }
      skip_blocks(storage, state, turns, of_tile.end - (sees ? work.blocks.end : of_tile.begin));
    }
    if (sees) {
      mma<Traits>(params, storage, state, turns, work, find_rows, rows, softmax, end_rows, tOrO);
      if constexpr (Traits::kHasDropout) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < size(tOrO); ++i) tOrO(i) *= params.dropout.scale;
      }
    } else {
      find_rows(rows);
      end_rows();
    }
    uint16_t* out = nullptr;
    if constexpr (Traits::kOutOverValue) out = storage.out_over_value(state.value, warpgroup);
    store_out<Traits>(params, storage, work.tile, warpgroup, rows, softmax, inverse_sum, tOrO, out);
  }
  tma_store_wait<0>();
}

// load(), use_spare_warp() and consume() are found by the type of their first argument: those of
// this folder, or for the FP8 traits those of fp8/.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
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
