// The producer warpgroup: one warp chooses tiles, one warp brings Q, K and V by TMA.
#pragma once

#include "common/key_source.h"
#include "common/tile_rows.h"
#include "common/tma.h"
#include "fwd/params.h"
#include "fwd/parts.h"
#include "fwd/traits.h"

namespace jax_fa3::fwd {

// The index of the CTA's next tile.
CUTLASS_DEVICE int next_tile_of(Params const& params, int round) {
  return next_tile(round, blockIdx.x, gridDim.x, params.tile_counter);
}
CUTLASS_DEVICE int next_tile_of(ShortParams const& params, int round) {
  int const num_tiles = params.order.num_tiles();
  int const cta = blockIdx.x;
  int const each = num_tiles / gridDim.x;
  int const rest = num_tiles % gridDim.x;  // so many CTAs have one more
  if (round >= each + (cta < rest)) return num_tiles;
  return cta * each + min(cta, rest) + round;
}

// Leaves the intervals of a tile's rows to consumers that ask for them.
template <class Storage>
CUTLASS_DEVICE auto keep_rows(Storage& storage, int stage, TileRows const& rows, int)
    -> decltype(void(storage.tile_rows)) {
  storage.tile_rows[stage] = rows;
}
template <class Storage>
CUTLASS_DEVICE void keep_rows(Storage&, int, TileRows const&, long) {}

// One warp: picks the CTA's next tile and works out which key blocks it visits, while the other
// warps work on the tile before.
template <class Traits>
CUTLASS_DEVICE void schedule(typename Traits::Params const& params,
                             typename Traits::SharedStorage& storage) {
  int const lane = threadIdx.x % 32;
  int const num_tiles = params.order.num_tiles();
  PipelineState<Traits::kWorkStages> state;
  for (int round = 0;; ++round, state.advance()) {
    storage.work_pipeline.empty[state.stage].wait(state.phase ^ 1);
    int const index = next_tile_of(params, round);
    WorkTile work{};
    work.last = index >= num_tiles;
    if (!work.last) {
      work.tile = params.order(index);
      TileRows const rows(params.mask, work.tile.batch, work.tile.block * Traits::kBlockM);
      if (lane == 0) keep_rows(storage, state.stage, rows, 0);
      auto const hull_of = [&](int first, int count) {
        if (rows.ascend()) return rows.hull(first, count);
        IntervalHull hull;
        for (int row = first; row < first + count; row += 32) hull.add(rows(row + lane));
        hull.reduce_warp();
        return hull;
      };
      auto const blocks_of = [&](IntervalHull const& hull) {
        BlockRange blocks = hull.blocks(Traits::kBlockN);
        // The soft cap is applied where the mask is: every block takes that way.
        if (params.score.cap_scale != 0.f) blocks.full_end = blocks.full_begin;
        if constexpr (Traits::kSharesKeys) {
          return part_of_split(params, work.tile.batch,
                               ceil_div(params.mask.seqlen_k, Traits::kBlockN), blocks);
        }
        return blocks;
      };
      IntervalHull hull;
      if constexpr (Traits::kBlocksByWarpgroup) {
        CUTLASS_PRAGMA_NO_UNROLL
        for (int warpgroup = 0; warpgroup < Traits::kConsumerWarpgroups; ++warpgroup) {
          IntervalHull const own_rows = hull_of(warpgroup * 64, 64);
          if (lane == 0) storage.warpgroup_blocks[state.stage][warpgroup] = blocks_of(own_rows);
          hull.merge(own_rows);
        }
      } else {
        hull = hull_of(0, Traits::kBlockM);
      }
      work.blocks = blocks_of(hull);
      if constexpr (Traits::kHasBits) {
        trim_hidden(params.bits, work.tile.batch, work.tile.head, work.tile.block,
                    work.blocks.begin, work.blocks.end);
      }
    }
    if (lane == 0) {
      storage.work[state.stage] = work;
      storage.work_pipeline.full[state.stage].arrive();
    }
    __syncwarp();
    if (work.last) return;
  }
}

// What schedule() has put into a slot; by a whole warp.
template <class Storage, class State>
CUTLASS_DEVICE WorkTile read_work(Storage& storage, State const& state) {
  storage.work_pipeline.full[state.stage].wait(state.phase);
  WorkTile const work = storage.work[state.stage];
  __syncwarp();
  return work;
}
template <class Storage, class State>
CUTLASS_DEVICE void release_work(Storage& storage, State const& state) {
  if (threadIdx.x % 32 == 0) storage.work_pipeline.empty[state.stage].arrive();
}
// By a warp that does not keep the next tile waiting.
template <class Storage, class State>
CUTLASS_DEVICE WorkTile take_work(Storage& storage, State const& state) {
  WorkTile const work = read_work(storage, state);
  release_work(storage, state);
  return work;
}

// The two warps of the producer warpgroup that neither load nor schedule. Here they do nothing; the
// FP8 forward has work for them.
template <class Element, int kHeadDim, int kHeadDimV, Kind kKind>
CUTLASS_DEVICE void use_spare_warp(Traits<Element, kHeadDim, kHeadDimV, kKind>, Params const&) {}

// The keys and values of a tile, behind the last block's keys, which have been loaded already: from
// the last block to the first, keys one block ahead of values. The next tile is taken two blocks
// before the end; tiles that are dealt out in fixed rounds may be taken as early as can be.
template <class Params, class LoadKey, class LoadValue, class TakeNextTile>
CUTLASS_DEVICE void load_blocks(Params const& params, BlockRange const& blocks,
                                LoadKey const& load_key, LoadValue const& load_value,
                                TakeNextTile const& take_next_tile) {
  constexpr int kBlocksAhead = 2;
  int const take_at = params.tile_counter == nullptr ? blocks.end : blocks.begin + kBlocksAhead - 1;
  if (blocks.end - 2 < take_at) take_next_tile();
  for (int n_block = blocks.end - 2; n_block >= blocks.begin; --n_block) {
    if (n_block == take_at) take_next_tile();
    load_key(n_block);
    load_value(n_block + 1);
  }
  load_value(blocks.begin);
}

template <class Element, int kHeadDim, int kHeadDimV, Kind kKind>
CUTLASS_DEVICE void load(
    Traits<Element, kHeadDim, kHeadDimV, kKind>,
    typename Traits<Element, kHeadDim, kHeadDimV, kKind>::Params const& params,
    typename Traits<Element, kHeadDim, kHeadDimV, kKind>::SharedStorage& storage) {
  using Traits = Traits<Element, kHeadDim, kHeadDimV, kKind>;
  constexpr int kBlockM = Traits::kBlockM;
  constexpr int kBlockN = Traits::kBlockN;
  constexpr auto kKeep = TMA::CacheHintSm90::EVICT_LAST;       // K and V: read by many tiles
  constexpr auto kReadOnce = TMA::CacheHintSm90::EVICT_FIRST;  // Q
  int const lane = threadIdx.x % 32;

  PipelineState<Traits::kWorkStages> work_state;
  PipelineState<Traits::kStages> key_state;
  PipelineState<Traits::kStages> value_state;
  uint32_t query_phase = 0;
  uint32_t out_phase = 0;
  uint32_t staged_phase = 0;
  int key_head = -1;  // kKeysStay: whose keys are there, counted over (batch, KV head)

  for (;; work_state.advance()) {
    WorkTile const work = read_work(storage, work_state);
    if (work.last) return;
    int batch = work.tile.batch;
    if constexpr (Traits::kSharesKeys) batch %= params.batch;
    KeySource const keys{batch, work.tile.head / params.group};
    bool stay = false;
    if constexpr (Traits::kKeysStay) {
      int const head = batch * params.num_heads_q + work.tile.head / params.group;
      stay = head == key_head;
      key_head = head;
    }
    // Lets the scheduler take the CTA's next tile: not before this one's loads are nearly done, for
    // a tile that is taken too early waits here while other CTAs have nothing to do.
    auto const take_next_tile = [&] {
      if (lane == 0) storage.work_pipeline.empty[work_state.stage].arrive();
    };

    auto const load_key = [&](int n_block) {
      if (lane == 0) {
        auto& pipeline = storage.key_pipeline;
        auto& full = pipeline.full[key_state.stage];
        pipeline.empty[key_state.stage].wait(key_state.phase ^ 1);
        if (stay) {
          full.arrive();
        } else {
          full.arrive_and_expect_tx(Traits::kSizeK * 2);
          tma_load_rows<kBlockN, Traits::kHeadDim, Traits::kSlab>(
              params.key, full, kKeep, storage.key + key_state.stage * Traits::kSizeK,
              keys.block<kBlockN>(n_block));
        }
      }
      key_state.advance();
    };

    int const length_k = params.mask.length_k(batch);
    auto const load_value = [&](int n_block) {
      auto& pipeline = storage.value_pipeline;
      uint16_t* const smem = storage.value + value_state.stage * Traits::kSizeV;
      // Rows at or past the length may hold anything; a probability of 0 does not silence NaN.
      int const valid_rows = length_k - n_block * kBlockN;
      bool const boundary = valid_rows < kBlockN && length_k < params.mask.seqlen_k;
      FullBarrier& full = boundary ? storage.value_staged : pipeline.full[value_state.stage];
      if (lane == 0) {
        pipeline.empty[value_state.stage].wait(value_state.phase ^ 1);
        if (stay) {
          full.arrive();
        } else {
          full.arrive_and_expect_tx(Traits::kSizeV * 2);
          tma_load_rows<kBlockN, Traits::kHeadDimV, Traits::kSlabV>(params.value, full, kKeep, smem,
                                                                    keys.block<kBlockN>(n_block));
        }
      }
      if (boundary) {
        __syncwarp();
        storage.value_staged.wait(staged_phase);
        staged_phase ^= 1;
        zero_rows_from<kBlockN, Traits::kHeadDimV, Traits::kSlabV>(smem, valid_rows);
        if (lane == 0) pipeline.full[value_state.stage].arrive();
      }
      value_state.advance();
    };

    BlockRange const blocks = work.blocks;
    bool const visits = blocks.begin < blocks.end;
    if (visits) {
      load_key(blocks.end - 1);
      for (int warpgroup = 0; warpgroup < Traits::kConsumerWarpgroups; ++warpgroup) {
        if (lane != 0) break;
        storage.query_empty[warpgroup].wait(query_phase ^ 1);
        FullBarrier& full = storage.query_full[warpgroup];
        full.arrive_and_expect_tx(64 * Traits::kColumns * 2);
        tma_load_rows<kBlockM, Traits::kHeadDim, Traits::kSlab>(
            params.query, full, kReadOnce, storage.query + warpgroup * 64 * Traits::kSlab,
            {work.tile.block * kBlockM + warpgroup * 64, work.tile.head, batch});
      }
      query_phase ^= 1;
    }
    if constexpr (Traits::kOutOverValue) {
      // The previous tile's output still lies in V's memory. Only a tile with loads may wait: an
      // empty one is finished without this warp, and the barrier could complete twice meanwhile.
      if (visits) storage.out_stored.wait(out_phase ^ 1);
      out_phase ^= 1;
    }
    if constexpr (Traits::kHasBits) {
      if (!visits) {
        take_next_tile();
        continue;
      }
      BlockWalk walk(params.bits, batch, work.tile.head, work.tile.block, blocks.end);
      int before = walk.next();
      while (before > blocks.begin) {
        int const n_block = walk.next();
        load_key(n_block);
        load_value(before);
        before = n_block;
      }
      take_next_tile();
      load_value(before);
    } else if (visits) {
      load_blocks(params, blocks, load_key, load_value, take_next_tile);
    } else {
      take_next_tile();
    }
  }
}

}  // namespace jax_fa3::fwd
