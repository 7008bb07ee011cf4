// The tiles of an FP8 consumer warpgroup: first S, mainloop, epilogue. A tile's first S is computed
// while the epilogue of the tile before runs.
#pragma once

#include "fp8/epilogue.h"
#include "fp8/mma.h"

namespace jax_fa3::fp8 {

// A warpgroup's operand that P is multiplied by for its rows' sums (traits.h).
template <class Traits>
CUTLASS_DEVICE void write_ones(uint8_t* ones, int warpgroup) {
  for (int i = threadIdx.x % 128; i < Traits::kSizeOnes; i += 128) {
    int const column = i % Traits::kSumColumns;
    int const key = i / Traits::kSumColumns;
    typename Traits::Element const one(key % Traits::kSumColumns == column ? 1.f : 0.f);
    ones[typename Traits::LayoutOnes{}(column, key)] = one.storage;
  }
  cutlass::arch::fence_view_async_shared();
  cutlass::arch::NamedBarrier::sync(
      128, fwd::barrier_id(fwd::NamedBarrier::kOutOfWarpgroup0, warpgroup));
}

template <int kHeadDim>
CUTLASS_DEVICE void consume(Traits<kHeadDim>, Params const& params,
                            typename Traits<kHeadDim>::SharedStorage& storage, int warpgroup) {
  using Traits = Traits<kHeadDim>;
  WarpgroupMma<Traits> mma{storage, warpgroup};
  int num_tiles = 0;  // done
  StepReader<Traits> steps{storage.step_pipeline};
  // Of the tile at hand. Its coordinates and key blocks are not among it: they are read from shared
  // memory where they are needed, for O and the next tile's first S leave few registers.
  bool last_tile;  // there is no tile: the CTA is done
  float query_scale;
  float key_scale;
  Softmax softmax;
  Mainloop<Traits> const mainloop{params, storage,     warpgroup, mma,
                                  steps,  query_scale, key_scale, softmax};
  auto const work_stage = [&](int tile) { return tile % Traits::kWorkStages; };
  // Whether this warpgroup's rows see any block of keys.
  auto const has_blocks = [&] {
    BlockRange const& own = storage.warpgroup_blocks[work_stage(num_tiles)][warpgroup];
    return !last_tile && own.begin < own.end;
  };

  // Waits for the next tile and for its Q, and issues S of the last block that the warpgroup's rows
  // see. If there is no tile or no such block, S is computed all the same, of whatever is in the
  // stage, and not used: so no branch stands around wgmma.
  auto const issue_first_scores = [&] {
    storage.work_pipeline.full[work_stage(num_tiles)].wait(num_tiles / Traits::kWorkStages % 2);
    WorkTile const& work = storage.work[work_stage(num_tiles)];
    BlockRange const& own = storage.warpgroup_blocks[work_stage(num_tiles)][warpgroup];
    last_tile = work.last;
    if (!last_tile) {
      int const query_block = min((work.tile.block * Traits::kBlockM + warpgroup * 64) / kBlock,
                                  params.num_query_blocks - 1);
      query_scale = __ldg(params.query_scale +
                          (int64_t{work.tile.batch} * params.num_query_blocks + query_block) *
                              params.num_heads_q +
                          work.tile.head);
      storage.query_full[warpgroup].wait(Traits::query_phase(work_stage(num_tiles)));
      if (has_blocks()) {
        steps.skip(work.blocks.end - own.end);
        steps.wait();
      } else {
        if (steps.elected()) storage.query_empty[warpgroup].arrive();
        bool const visits = work.blocks.begin < work.blocks.end;
        steps.skip(visits ? work.blocks.end - work.blocks.begin + 1 : 0);
      }
    }
    mma.issue_scores(steps.state.stage);
  };

  // Finds the intervals of the thread's rows meanwhile, waits for S and takes the block's scales.
  // (If the warpgroup sees no block they mean nothing and are not used, as S.)
  auto const finish_first_scores = [&] {
    if (!last_tile) {
      TileCoord const coord = storage.work[work_stage(num_tiles)].tile;
      int const tile_row =
          warpgroup * 64 + thread_index() % 128 / 32 * 16 + thread_index() % 32 / 4;
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kRowsPerThread; ++row) {
        rows_of_thread(storage)[row] = params.mask.row_interval(
            coord.batch, coord.block * Traits::kBlockM + tile_row + row * 8);
      }
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(mma.tSrS);
    key_scale = storage.scale[steps.state.stage].key;
    if (has_blocks()) steps.release();
  };

  if constexpr (Traits::kSumsByMma) write_ones<Traits>(storage.ones[warpgroup], warpgroup);
  if constexpr (Traits::kTransposesInKernel) {
    // Before Q and K arrive these warps have nothing to do: they transpose what is needed first.
    if (params.transpose.warp_tile_counter != nullptr) {
      transpose_claimed<kHeadDim>(params.transpose, claim_warp_tiles(params.transpose));
    }
  }
  issue_first_scores();
  finish_first_scores();
  while (!last_tile) {
    softmax = Softmax{};
    if (has_blocks()) mainloop.run(work_stage(num_tiles));
    ++num_tiles;
    issue_first_scores();
    store<Traits>(params, storage, storage.work[work_stage(num_tiles - 1)].tile, warpgroup, softmax,
                  mma.tOrO);
    __syncwarp();
    if (steps.elected()) storage.work_pipeline.empty[work_stage(num_tiles - 1)].arrive();
    finish_first_scores();
  }
  tma_store_wait<0>();
}

}  // namespace jax_fa3::fp8
