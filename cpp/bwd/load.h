// The producer warp of the main kernel: brings the CTA's K and V once, then Q, dO and what is known
// of their rows, for every block of query rows that sees any of the CTA's keys.
#pragma once

#include "bwd/params.h"
#include "bwd/traits.h"
#include "common/tma.h"

namespace jax_fa3::bwd {

// Loads a tile by TMA. Rows from `valid` on may hold anything, and 0 * NaN is NaN: they are zeroed
// before the consumers hear of the tile. The whole warp calls it.
template <int kRows, int kColumns>
CUTLASS_DEVICE void load_tile(CUtensorMap const& map, FullBarrier& full, FullBarrier& staged,
                              uint32_t& staged_phase, cute::TMA::CacheHintSm90 hint, uint16_t* smem,
                              int row, int head, int batch, int valid, int extra_bytes = 0) {
  constexpr int kSlab = slab(kColumns);
  bool const boundary = valid < kRows;
  FullBarrier& barrier = boundary ? staged : full;
  if (threadIdx.x % 32 == 0) {
    if (boundary) {
      staged.arrive_and_expect_tx(kRows * kColumns * 2);
    } else {
      full.arrive_and_expect_tx(kRows * kColumns * 2 + extra_bytes);
    }
    tma_load_rows<kRows, kColumns, kSlab>(map, reinterpret_cast<uint64_t*>(&barrier), hint, smem,
                                          row, head, batch);
  }
  if (boundary) {
    __syncwarp();
    staged.wait(staged_phase);
    staged_phase ^= 1;
    zero_rows_from<kRows, kColumns, kSlab>(smem, valid);
    if (threadIdx.x % 32 == 0) full.arrive_and_expect_tx(extra_bytes);
  }
}

template <class Traits>
CUTLASS_DEVICE void load(Params const& params, typename Traits::SharedStorage& storage,
                         TileCoord tile) {
  constexpr int kBlockM = Traits::kBlockM;
  constexpr int kBlockN = Traits::kBlockN;
  constexpr auto kKeep = TMA::CacheHintSm90::EVICT_LAST;       // Q and dO: read by many tiles
  constexpr auto kReadOnce = TMA::CacheHintSm90::EVICT_FIRST;  // K and V
  int const lane = threadIdx.x % 32;
  int const batch = tile.batch;
  int const first_key = tile.m_block * kBlockN;
  Mask const& mask = params.mask;
  int const length_q = mask.length_q(batch);
  int const length_k = mask.length_k(batch);
  // Past the arrays' end TMA itself brings zeros.
  int const valid_keys = length_k < mask.seqlen_k ? length_k - first_key : kBlockN;

  PipelineState<Traits::kStages> state;
  uint32_t staged_phase = 0;
  bool first = true;

  auto const load_query = [&](Step step, int valid_rows) {
    auto& pipeline = storage.query_pipeline;
    FullBarrier& full = pipeline.full[state.stage];
    constexpr int kStatsBytes = 2 * kBlockM * sizeof(float);
    constexpr int kIntervalBytes = kBlockM * sizeof(int2);
    pipeline.empty[state.stage].wait(state.phase ^ 1);
    if (lane == 0) {
      storage.steps[state.stage] = step;
      auto* const barrier = reinterpret_cast<uint64_t*>(&full);
      SM90_BULK_COPY_G2S::copy(
          params.row_stats + params.m_block_index(batch, step.head, step.m_block) * (2 * kBlockM),
          barrier, storage.stats + state.stage * 2 * kBlockM, kStatsBytes);
      SM90_BULK_COPY_G2S::copy(
          params.row_intervals + (int64_t{batch} * params.num_m_blocks + step.m_block) * kBlockM,
          barrier, storage.intervals + state.stage * kBlockM, kIntervalBytes);
    }
    load_tile<kBlockM, Traits::kHeadDim>(params.query, full, storage.staged, staged_phase, kKeep,
                                         storage.query + state.stage * Traits::kSizeQ,
                                         step.m_block * kBlockM, step.head, batch, valid_rows,
                                         kStatsBytes + kIntervalBytes);
  };
  auto const load_dout = [&](Step step, int valid_rows) {
    auto& pipeline = storage.dout_pipeline;
    pipeline.empty[state.stage].wait(state.phase ^ 1);
    load_tile<kBlockM, Traits::kHeadDimV>(params.dout, pipeline.full[state.stage], storage.staged,
                                          staged_phase, kKeep,
                                          storage.dout + state.stage * Traits::kSizedO,
                                          step.m_block * kBlockM, step.head, batch, valid_rows);
  };
  auto const load_step = [&](Step step) {
    int const valid_rows = length_q < mask.seqlen_q ? length_q - step.m_block * kBlockM : kBlockM;
    if (first) {
      load_tile<kBlockN, Traits::kHeadDim>(params.key, storage.key_full, storage.staged,
                                           staged_phase, kReadOnce, storage.key, first_key,
                                           tile.head, batch, valid_keys);
    }
    load_query(step, valid_rows);
    if (first) {
      load_tile<kBlockN, Traits::kHeadDimV>(params.value, storage.value_full, storage.staged,
                                            staged_phase, kReadOnce, storage.value, first_key,
                                            tile.head, batch, valid_keys);
    }
    load_dout(step, valid_rows);
    first = false;
    state.advance();
  };

  // A step is sent when it is known whether another follows.
  Step pending{-1, 0, false, true};

  for (int member = 0; member < params.group; ++member) {
    int const head = tile.head * params.group + member;
    for (int chunk = 0; chunk < params.num_m_blocks; chunk += 32) {
      bool visited = false;
      bool full = false;
      if (chunk + lane < params.num_m_blocks) {
        int4 const bounds = params.block_hulls[int64_t{batch} * params.num_m_blocks + chunk + lane];
        IntervalHull const hull{bounds.x, bounds.y, bounds.z, bounds.w};
        visited = hull.max_end > first_key && hull.min_begin < first_key + kBlockN;
        full = hull.max_begin <= first_key && hull.min_end >= first_key + kBlockN;
      }
      // The soft cap is applied where the mask is.
      uint32_t const full_blocks = __ballot_sync(~0u, full && params.cap_scale == 0.f);
      for (uint32_t blocks = __ballot_sync(~0u, visited); blocks != 0; blocks &= blocks - 1) {
        int const bit = __ffs(blocks) - 1;
        if (pending.m_block >= 0) load_step(pending);
        pending = {chunk + bit, head, (full_blocks >> bit & 1) == 0, false};
      }
    }
  }
  pending.last = true;
  if (pending.m_block >= 0) {
    load_step(pending);
  } else if (lane == 0) {
    storage.steps[0] = pending;
    storage.query_pipeline.full[0].arrive();
  }
}

}  // namespace jax_fa3::bwd
