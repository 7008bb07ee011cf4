// The producer warp: the resident tiles once, then step by step the pieces for S or dP of the step
// and those for the gradient of the step before.
#pragma once

#include "bwd/load.h"
#include "common/tma.h"
#include "wide_bwd/steps.h"
#include "wide_bwd/traits.h"

namespace jax_fa3::wide_bwd {

// The way of pieces into the rings of all CTAs of this role.
template <class Traits>
struct PieceLoader {
  typename Traits::SharedStorage& storage;
  Place<Traits> place;
  int lane = threadIdx.x % 32;
  PipelineState<Traits::kStages> state;
  uint32_t staged_phases = 0;  // a bit for each stage

  // One box of `rows` rows and 64 columns. All CTAs of the role call it for another part of the
  // piece.
  CUTLASS_DEVICE void load_box(CUtensorMap const& map, FullBarrier& full, uint16_t* smem,
                               int column, RowCoord const& from) const {
    constexpr auto kKeep = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_LAST);
    auto* const barrier = reinterpret_cast<uint64_t*>(&full);
    if constexpr (Traits::kSides > 1) {
      SM90_TMA_LOAD_MULTICAST_4D::copy(&map, barrier, place.ctas(), kKeep, smem, column, from.row,
                                       from.head, from.batch);
    } else {
      SM90_TMA_LOAD_4D::copy(&map, barrier, kKeep, smem, column, from.row, from.head, from.batch);
    }
  }

  // `load` issues this CTA's boxes; rows in `zeroed` may hold anything, and 0 * NaN is NaN.
  template <int kRows, class Load>
  CUTLASS_DEVICE void piece(RowSet const& zeroed, Load const& load) {
    bool const boundary = zeroed.any();
    uint16_t* const smem = storage.ring + state.stage * Traits::kSizePiece;
    auto& pieces = storage.pieces;
    FullBarrier& full = boundary ? pieces.staged[state.stage] : pieces.full[state.stage];
    if (lane == 0) {
      pieces.empty[state.stage].wait(state.phase ^ 1);
      full.arrive_and_expect_tx(Traits::kSizePiece * 2);
      load(full, smem);
    }
    if (boundary) {
      __syncwarp();
      full.wait(staged_phases >> state.stage & 1);
      staged_phases ^= 1 << state.stage;
      bwd::zero_rows<kRows, Traits::kSizePiece / kRows, 64>(smem, zeroed);
      if (lane == 0) pieces.full[state.stage].arrive();
    }
    __syncwarp();
    state.advance();
  }

  // `from`: the block's first row; `zeroed`: among all its rows.
  CUTLASS_DEVICE void scores(CUtensorMap const& map, RowCoord from, RowSet const& zeroed) {
    from.row += place.side * 64;
    for (int i = 0; i < Traits::kPiecesOfScores; ++i) {
      piece<64 * Traits::kSides>(zeroed, [&](FullBarrier& full, uint16_t* smem) {
        load_box(map, full, smem + place.side * Traits::kUnit, i * 64, from);
      });
    }
  }
  CUTLASS_DEVICE void grad(CUtensorMap const& map, RowCoord from, RowSet const& zeroed) {
    constexpr int kRows = Traits::kRowsOfGrad;
    // Of keys each of the two loads half the columns, of queries the only one has only those that
    // its role sums.
    int const first_slab = Traits::kOfKeys ? place.side * 4 : 0;
    int const first_column = Traits::kOfKeys ? 0 : place.role * Traits::kColumns;
    for (int i = 0; i < Traits::kPiecesOfGrad; ++i) {
      RowSet of_piece{};
      of_piece.bits[0] = zeroed.bits[i / 2] >> i % 2 * kRows & ((1u << kRows) - 1);
      piece<kRows>(of_piece, [&](FullBarrier& full, uint16_t* smem) {
        CUTLASS_PRAGMA_UNROLL
        for (int slab = first_slab; slab < first_slab + 4; ++slab) {
          load_box(map, full, smem + slab * kRows * 64, first_column + slab * 64, from);
        }
      });
      from.row += kRows;
    }
  }
};

template <class Traits>
CUTLASS_DEVICE RowSet padding(Mask const& mask, int batch, int first_key) {
  int const length = mask.length_k(batch);
  // Past the array's end TMA itself writes zeros.
  return RowSet::from(length < mask.seqlen_k ? length - first_key : 128);
}

template <class Traits>
CUTLASS_DEVICE void load_resident(CUtensorMap const& map, typename Traits::SharedStorage& storage,
                                  int tile, uint32_t& phase, RowCoord from, RowSet zeroed) {
  from.row += tile * 64;
  if (tile == 1) zeroed = RowSet{{zeroed.bits[2], zeroed.bits[3], 0, 0}};
  if (tile == 0) zeroed.bits[2] = zeroed.bits[3] = 0;
  bwd::load_tile<64, Traits::kHeadDim>(map, storage.resident_full, storage.staged, phase,
                                       TMA::CacheHintSm90::EVICT_FIRST,
                                       storage.resident + tile * Traits::kSizeTile, from, zeroed);
}

// dK and dV.
template <class Traits>
CUTLASS_DEVICE void load_of_keys(Params const& params, typename Traits::SharedStorage& storage,
                                 bwd::KeyTile const& tile, Place<Traits> const& place) {
  constexpr int kBlockM = Traits::kBlockM;
  int const lane = threadIdx.x % 32;
  bwd::QueryBlock const* const blocks = params.blocks_of(tile.batch);
  PieceLoader<Traits> loader{storage, place};
  PipelineState<Traits::kRecords> state;
  bool const of_value = place.role == 0;  // S and dV, else dP and dK
  CUtensorMap const& of_scores = of_value ? params.query : params.dout;
  CUtensorMap const& of_grad = of_value ? params.dout_rows_map : params.query_rows;
  bwd::Step before{-1, 0, true, true, true};  // whose gradient is still to come
  uint32_t staged_phase = 0;
  bool first = true;

  auto const load_records = [&](bwd::Step const& step) {
    constexpr int kStats = bwd::RowStats<kBlockM>::kSize;
    FullBarrier& full = storage.records.full[state.stage];
    if (lane == 0) {
      storage.records.empty[state.stage].wait(state.phase ^ 1);
      storage.steps[state.stage] = step;
      full.arrive_and_expect_tx(kStats * sizeof(float) + kBlockM * sizeof(int2));
      auto* const barrier = reinterpret_cast<uint64_t*>(&full);
      SM90_BULK_COPY_G2S::copy(
          params.row_stats + params.m_block_index(tile.batch, step.head, step.m_block) * kStats,
          barrier, storage.stats + state.stage * kStats, kStats * sizeof(float));
      SM90_BULK_COPY_G2S::copy(
          params.row_intervals +
              (int64_t{tile.batch} * params.num_m_blocks + step.m_block) * kBlockM,
          barrier, storage.intervals + state.stage * kBlockM, kBlockM * sizeof(int2));
    }
    __syncwarp();
    state.advance();
  };
  auto const load_grad = [&] {
    if (before.m_block < 0) return;
    loader.grad(of_grad, {before.m_block * kBlockM, before.head, tile.batch},
                blocks[before.m_block].blind);
    before.m_block = -1;
  };
  for_each_step<Traits>(
      params, tile,
      [&](bwd::Step const& step) {
        if (first) {
          int const first_key = tile.n_block * Traits::kBlockN + place.side * 64;
          load_resident<Traits>(of_value ? params.key : params.value, storage, 0, staged_phase,
                                {first_key, tile.head_k, tile.batch},
                                padding<Traits>(params.mask, tile.batch, first_key));
          first = false;
        }
        load_records(step);
        loader.scores(of_scores, {step.m_block * kBlockM, step.head, tile.batch},
                      blocks[step.m_block].blind);
        load_grad();
        before = step;
        if (step.last) load_grad();
      },
      [&](bwd::Step const& none) {
        if (lane == 0) {
          storage.steps[0] = none;
          storage.records.full[0].arrive();
        }
      });
}

// dQ.
template <class Traits>
CUTLASS_DEVICE void load_of_queries(Params const& params, typename Traits::SharedStorage& storage,
                                    WorkTile const& work, Place<Traits> const& place) {
  if (work.blocks.begin >= work.blocks.end) return;
  int const batch = work.tile.batch;
  int const head_k = work.tile.head / params.group;
  PieceLoader<Traits> loader{storage, place};
  uint32_t staged_phase = 0;
  RowSet const blind = params.blocks_of(batch)[work.tile.block].blind;
  for (int tile = 0; tile < 2; ++tile) {
    load_resident<Traits>(place.role == 0 ? params.query : params.dout, storage, tile, staged_phase,
                          {work.tile.block * Traits::kBlockM, work.tile.head, batch}, blind);
  }
  auto const rows = [&](int n_block) {
    return RowCoord{n_block * Traits::kKeysOfStep, head_k, batch};
  };
  auto const zeroed = [&](int n_block) {
    RowSet set = padding<Traits>(params.mask, batch, n_block * Traits::kKeysOfStep);
    set.bits[2] = set.bits[3] = 0;
    return set;
  };
  for (int n_block = work.blocks.end - 1; n_block >= work.blocks.begin; --n_block) {
    loader.scores(place.role == 0 ? params.key : params.value, rows(n_block), zeroed(n_block));
    if (n_block + 1 < work.blocks.end) {
      loader.grad(params.key_rows, rows(n_block + 1), zeroed(n_block + 1));
    }
  }
  loader.grad(params.key_rows, rows(work.blocks.begin), zeroed(work.blocks.begin));
}

}  // namespace jax_fa3::wide_bwd
