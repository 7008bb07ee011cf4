// The producer warp: brings the CTA's Q, and its half of every piece of K and V
// to both CTAs.
#pragma once

#include "common/key_source.h"
#include "common/tma.h"
#include "wide/traits.h"

namespace jax_fa3::wide {

template <class Traits>
CUTLASS_DEVICE void load(fwd::Params const& params, typename Traits::SharedStorage& storage,
                         WorkTile const& work, int rank) {
  constexpr int kBlockN = Traits::kBlockN;
  constexpr int kKeysOfPiece = Traits::kKeysOfPiece;
  constexpr int kBytes = Traits::kSizePiece * 2;
  constexpr auto kKeep = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_LAST);
  int const lane = threadIdx.x % 32;
  int const batch = work.tile.batch;
  int const head_k = work.tile.head / params.group;
  int const length_k = params.mask.length_k(batch);
  auto& barriers = storage.barriers;
  PipelineState<Traits::kStages> state;
  uint32_t staged_phases = 0;  // a bit for each stage

  if (lane == 0) {
    constexpr int kQueryBytes = Traits::kRows * Traits::kHeadDim * 2;
    storage.query_full.arrive_and_expect_tx(kQueryBytes);
    tma_load_rows<Traits::kRows, Traits::kHeadDim, 64>(
        params.query, storage.query_full, TMA::CacheHintSm90::EVICT_FIRST, storage.query,
        {work.tile.block * Traits::kBlockM + rank * Traits::kRows, work.tile.head, batch});
  }

  auto const load_box = [&](CUtensorMap const& map, FullBarrier& full, uint16_t* smem, int column,
                            int row) {
    SM90_TMA_LOAD_MULTICAST_4D::copy(&map, reinterpret_cast<uint64_t*>(&full), kAllOfCluster, kKeep,
                                     smem, column, row, head_k, batch);
  };
  auto const load_key = [&](int n_block) {
    for (int piece = 0; piece < Traits::kPiecesK; ++piece) {
      if (lane == 0) {
        FullBarrier& full = barriers.full[state.stage];
        barriers.empty[state.stage].wait(state.phase ^ 1);
        full.arrive_and_expect_tx(kBytes);
        constexpr int kKeys = kBlockN / kClusterSize;  // that this CTA loads
        load_box(params.key, full,
                 storage.ring + state.stage * Traits::kSizePiece + rank * kKeys * 64, piece * 64,
                 n_block * kBlockN + rank * kKeys);
      }
      state.advance();
    }
  };
  auto const load_value = [&](int n_block) {
    for (int piece = 0; piece < 2 * Traits::kPairsV; ++piece) {
      int const first_key = n_block * kBlockN + piece / 2 * kKeysOfPiece;
      uint16_t* const smem = storage.ring + state.stage * Traits::kSizePiece;
      // Rows at or past the length may hold anything; a probability of 0 does
      // not silence NaN.
      int const valid_rows = length_k - first_key;
      bool const boundary = valid_rows < kKeysOfPiece && length_k < params.mask.seqlen_k;
      FullBarrier& full = boundary ? barriers.staged[state.stage] : barriers.full[state.stage];
      if (lane == 0) {
        barriers.empty[state.stage].wait(state.phase ^ 1);
        full.arrive_and_expect_tx(kBytes);
        constexpr int kSlabs = Traits::kColumns / 64 / kClusterSize;  // that this CTA loads
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kSlabs; ++i) {
          int const slab = rank * kSlabs + i;
          load_box(params.value, full, smem + slab * kKeysOfPiece * 64,
                   piece % 2 * Traits::kColumns + slab * 64, first_key);
        }
      }
      if (boundary) {
        __syncwarp();
        full.wait(staged_phases >> state.stage & 1);
        staged_phases ^= 1 << state.stage;
        zero_rows_from<kKeysOfPiece, Traits::kColumns, 64>(smem, valid_rows);
        if (lane == 0) barriers.full[state.stage].arrive();
      }
      state.advance();
    }
  };

  int n_block = work.blocks.end - 1;
  load_key(n_block);
  for (--n_block; n_block >= work.blocks.begin; --n_block) {
    load_key(n_block);
    load_value(n_block + 1);
  }
  load_value(work.blocks.begin);
}

}  // namespace jax_fa3::wide
