// The producer warp of the main kernel: loads the CTA's K and V once, then Q, dO and what
// preprocess wrote about their rows, for every block of query rows that sees any of the CTA's keys.
#pragma once

#include <climits>

#include "bwd/params.h"
#include "bwd/traits.h"
#include "common/key_source.h"
#include "common/tma.h"

namespace jax_fa3::bwd {

// Zeroes some of a loaded tile's rows, by one warp, before wgmma reads them.
template <int kRows, int kColumns, int kSlab>
CUTLASS_DEVICE void zero_rows(uint16_t* smem, RowSet const& rows) {
  constexpr int kVectors = kSlab / 8;
  for (int slab = 0; slab < kColumns / kSlab; ++slab) {
    auto* const vectors = reinterpret_cast<uint4*>(smem + slab * kRows * kSlab);
    for (int i = threadIdx.x % 32; i < kRows * kVectors; i += 32) {
      if (rows.contains(i / kVectors)) vectors[i] = uint4{0, 0, 0, 0};
    }
  }
  cutlass::arch::fence_view_async_shared();
  __syncwarp();
}

// Loads a tile by TMA; the whole warp calls it. Rows in `zeroed` (past the length, or without keys)
// may hold anything, and 0 * NaN is NaN. A tile with such rows lands on the barrier `staged`; this
// warp zeroes them and only then completes `full`, for which consumers wait. `extra_bytes`: what
// else is being loaded that `full` counts. kFourth: the tile lies in slabs of 32 columns, of which
// a fourth begins at this one (traits.h).
template <int kRows, int kColumns, int kFourth = 0, int kSlab = slab(kColumns)>
CUTLASS_DEVICE void load_tile(CUtensorMap const& map, FullBarrier& full, FullBarrier& staged,
                              uint32_t& staged_phase, cute::TMA::CacheHintSm90 hint, uint16_t* smem,
                              RowCoord const& from, RowSet const& zeroed, int extra_bytes = 0) {
  constexpr int kInMemory = kFourth > 0 ? 4 * kSlab : in_slabs(kColumns, kSlab);
  bool const boundary = zeroed.any();
  FullBarrier& barrier = boundary ? staged : full;
  if (threadIdx.x % 32 == 0) {
    if (boundary) {
      staged.arrive_and_expect_tx(kRows * kInMemory * 2);
    } else {
      full.arrive_and_expect_tx(kRows * kInMemory * 2 + extra_bytes);
    }
    tma_load_rows<kRows, kColumns, kSlab>(map, barrier, hint, smem, from);
    if constexpr (kFourth > 0) {
      tma_load_rows<kRows, kSlab, kSlab>(map, barrier, hint, smem + 3 * kSlab * kRows, from,
                                         kFourth);
    }
  }
  if (boundary) {
    __syncwarp();
    staged.wait(staged_phase);
    staged_phase ^= 1;
    zero_rows<kRows, kInMemory, kSlab>(smem, zeroed);
    if (threadIdx.x % 32 == 0) full.arrive_and_expect_tx(extra_bytes);
  }
}

// Where the loading warp is in its rings, from tile to tile.
template <int kStages>
struct Loading {
  PipelineState<kStages> state;  // Q and dO
  uint32_t staged_phase = 0;
  uint32_t key_phase = 0;  // K and V
};

// A step without operands: of a tile that no row sees, or of none.
template <class Traits>
CUTLASS_DEVICE void announce(typename Traits::SharedStorage& storage, KeyTile const& tile,
                             PipelineState<Traits::kStages>& state) {
  auto const place = dout_state<Traits>(state);
  storage.query_pipeline.empty[state.stage].wait(state.phase ^ 1);
  storage.dout_pipeline.empty[place.stage].wait(place.phase ^ 1);
  if (threadIdx.x % 32 == 0) {
    storage.steps[state.stage] = {-1, 0, false, true, true};
    storage.tiles[state.stage] = tile;
    storage.query_pipeline.full[state.stage].arrive();
    if constexpr (kAddsToQueries<Traits>) storage.query_pipeline.full[state.stage].arrive();
    storage.dout_pipeline.full[place.stage].arrive();
  }
  state.advance();
}

template <class Traits>
CUTLASS_DEVICE void load_keys_and_steps(typename Traits::Params const& params,
                                        typename Traits::SharedStorage& storage,
                                        KeyTile const& tile, Loading<Traits::kStages>& loading) {
  constexpr int kBlockM = Traits::kBlockM;
  constexpr int kBlockN = Traits::kBlockN;
  constexpr auto kKeep = TMA::CacheHintSm90::EVICT_LAST;       // Q and dO: read by many tiles
  constexpr auto kReadOnce = TMA::CacheHintSm90::EVICT_FIRST;  // K and V
  int const lane = threadIdx.x % 32;
  int const batch = tile.batch;
  int const first_key = tile.n_block * kBlockN;
  KeySource const keys{batch, tile.head_k};
  Mask const& mask = params.mask;
  // The keys past the length; past the array's end TMA itself writes zeros. Computed where it is
  // needed, for there are no registers to keep it in.
  auto const padding = [&] {
    int const length_k = mask.length_k(batch);
    return RowSet::from(length_k < mask.seqlen_k ? length_k - first_key : kBlockN, kBlockN);
  };
  // In a register for the wide kernels, found anew each time for the fused ones: either has too few
  // registers for the other.
  QueryBlock const* const query_blocks = params.blocks_of(batch);
  auto const query_block = [&](int index) -> QueryBlock const& {
    if constexpr (Traits::kFused) return params.blocks_of(batch)[index];
    return query_blocks[index];
  };

  auto& state = loading.state;
  auto& staged_phase = loading.staged_phase;

  auto const load_query = [&](Step step, RowSet const& blind) {
    auto& pipeline = storage.query_pipeline;
    FullBarrier& full = pipeline.full[state.stage];
    constexpr int kStats = RowStats<kBlockM>::kSize;
    constexpr int kStatsBytes = kStats * sizeof(float);
    constexpr int kIntervalBytes = kBlockM * sizeof(int2);
    pipeline.empty[state.stage].wait(state.phase ^ 1);
    if (lane == 0) {
      storage.steps[state.stage] = step;
      if constexpr (Traits::kPersistent) storage.tiles[state.stage] = tile;
      auto* const barrier = reinterpret_cast<uint64_t*>(&full);
      SM90_BULK_COPY_G2S::copy(
          params.row_stats + params.m_block_index(batch, step.head, step.m_block) * kStats, barrier,
          storage.stats + state.stage * kStats, kStatsBytes);
      SM90_BULK_COPY_G2S::copy(
          params.row_intervals + (int64_t{batch} * params.num_m_blocks + step.m_block) * kBlockM,
          barrier, storage.intervals + state.stage * kBlockM, kIntervalBytes);
    }
    load_tile<kBlockM, Traits::kHeadDim>(params.query, full, storage.staged, staged_phase, kKeep,
                                         storage.query + state.stage * Traits::kSizeQ,
                                         {step.m_block * kBlockM, step.head, batch}, blind,
                                         kStatsBytes + kIntervalBytes);
  };
  auto const load_dout = [&](Step step, RowSet const& blind) {
    auto& pipeline = storage.dout_pipeline;
    auto const place = dout_state<Traits>(state);
    pipeline.empty[place.stage].wait(place.phase ^ 1);
    load_tile<kBlockM, Traits::kHeadDimV>(params.dout, pipeline.full[place.stage], storage.staged,
                                          staged_phase, kKeep,
                                          storage.dout + place.stage * Traits::kSizedO,
                                          {step.m_block * kBlockM, step.head, batch}, blind);
  };
  auto const wait_until_read = [&] {
    if constexpr (Traits::kPersistent) {
      storage.keys_empty.wait(loading.key_phase ^ 1);
      loading.key_phase ^= 1;
    }
  };
  auto const load_keys = [&] {
    wait_until_read();
    load_tile<kBlockN, Traits::kHeadDim, Traits::kFourSlabs ? Traits::kFourthSlab : 0,
              Traits::kSlabK>(params.key, storage.key_full, storage.staged, staged_phase, kReadOnce,
                              storage.key, keys.block<kBlockN>(tile.n_block), padding());
    load_tile<kBlockN, Traits::kHeadDimV>(params.value, storage.value_full, storage.staged,
                                          staged_phase, kReadOnce, storage.value,
                                          keys.block<kBlockN>(tile.n_block), padding());
  };
  bool keys_loaded = false;
  auto const load_step = [&](Step step) {
    RowSet const blind = query_block(step.m_block).blind;
    load_query(step, blind);
    load_dout(step, blind);
    if constexpr (Traits::kHasAlibi) {  // while they are on their way
      write_alibi<kBlockM>(storage.term_queries + state.stage * term_size(kBlockM, 1),
                           params.alibi.slope(batch, step.head),
                           first_key - step.m_block * kBlockM);
    }
    if constexpr (Traits::kHasDropout) {
      storage.dropout_states(state.stage)
          .write(params.dropout, params.dropout.of_head(batch * params.num_heads_q + step.head),
                 tile.n_block, step.m_block * kBlockM);
    }
    if constexpr (kAddsToQueries<Traits>) {
      if (lane == 0) storage.query_pipeline.full[state.stage].arrive();
    }
    state.advance();
    if constexpr (!kKeysFirst<Traits>) {
      if (!keys_loaded) load_keys();
      keys_loaded = true;
    }
  };
  // While the first steps are looked for.
  if constexpr (kKeysFirst<Traits>) load_keys();

  // The steps of all splits are the blocks of query rows that see any of the CTA's keys, head by
  // head of the group. This split's are those of some heads, or an equal share of all in that
  // order.
  auto const meets_keys = [&](IntervalHull const& hull) {
    return hull.max_end > first_key && hull.min_begin < first_key + kBlockN;
  };
  auto const sees_keys = [&](int m_block, bool* full) {
    if (m_block >= params.num_m_blocks) return false;
    IntervalHull const hull = query_block(m_block).hull;
    *full = hull.max_begin <= first_key && hull.min_end >= first_key + kBlockN;
    // The bias of rows that see nothing may be NaN: they are to be masked.
    if constexpr (Traits::kHasBias) *full = *full && !query_block(m_block).blind.any();
    return meets_keys(hull);
  };
  // Blocks are gone through in chunks of kBlocksOfHull, but only those whose hull meets the keys:
  // else each CTA of a long sequence would look at every block. The next chunk from `chunk` on,
  // which is given and returned as its first block.
  static_assert(kBlocksOfHull == 32, "a lane for each block");
  auto const next_chunk = [&](int chunk) {
    if (params.num_m_blocks <= kBlocksOfHull) return chunk;
    for (; chunk < params.num_m_blocks; chunk += 32 * kBlocksOfHull) {
      int const of_lane = chunk / kBlocksOfHull + lane;
      bool const exists = of_lane * kBlocksOfHull < params.num_m_blocks;
      uint32_t const met =
          __ballot_sync(~0u, exists && meets_keys(query_block(params.num_m_blocks + of_lane).hull));
      if (met != 0) return chunk + (__ffs(met) - 1) * kBlocksOfHull;
    }
    return chunk;
  };
  // What of a dense mask is in a chunk: of a tile's keys and the blocks of query rows.
  auto const dense_blocks = [&](int head, int chunk) {
    if constexpr (Traits::kHasBits) {
      return block_bits(params.bits, batch, head, tile.n_block, chunk / kBlocksOfHull);
    } else {
      return BlockBits{~0u, ~0u};
    }
  };
  int head = tile.head_k * params.group;
  int last_head = head + params.group;
  int skipped = 0;      // steps of the first that belong to the split before
  int count = INT_MAX;  // of this split's steps
  if (params.num_splits > 1) {
    if (params.group % params.num_splits == 0) {
      int const heads = params.group / params.num_splits;
      head += tile.split * heads;
      last_head = head + heads;
    } else {
      int of_head = 0;
      for (int chunk = 0; chunk < params.num_m_blocks; chunk += 32) {
        bool full;
        of_head += __popc(__ballot_sync(~0u, sees_keys(chunk + lane, &full)) &
                          dense_blocks(tile.head_k * params.group, chunk).any);
      }
      int64_t const all = int64_t{of_head} * params.group;
      int64_t const begin = all * tile.split / params.num_splits;
      int64_t const end = all * (tile.split + 1) / params.num_splits;
      head = of_head == 0 ? last_head : head + static_cast<int>(begin / of_head);
      skipped = of_head == 0 ? 0 : static_cast<int>(begin % of_head);
      count = static_cast<int>(end - begin);
    }
  }

  // A step is loaded once the next is found: it must say whether it is the last.
  Step pending{-1, 0, false, true, true};
  // dK and dV leave the accumulators after so many steps (partial.h).
  int const most_steps = params.dkv_partial == nullptr ? INT_MAX : kMostRowsOfSum / kBlockM;
  int steps = 0;
  for (; head < last_head && count > 0; ++head) {
    for (int chunk = 0; count > 0 && (chunk = next_chunk(chunk)) < params.num_m_blocks;
         chunk += kBlocksOfHull) {
      bool full = false;
      bool const visited = sees_keys(chunk + lane, &full);
      BlockBits const dense = dense_blocks(head, chunk);
      // The soft cap is applied where the mask is.
      uint32_t const full_blocks =
          __ballot_sync(~0u, full && params.score.cap_scale == 0.f) & dense.full;
      uint32_t const all = __ballot_sync(~0u, visited) & dense.any;
      // Not from the chunk's first block on, but from that of the CTA's own rows, round the end:
      // the key blocks of a head begin at the same time, and would wait for one another at every
      // sum of dQ that one of them begins (write_dq.h). In deterministic mode, where they add one
      // after the other, and with a bias, for which this warp has no registers left, blocks come in
      // order.
      constexpr bool kInPlace = Traits::kHasBias || !Traits::kFused;
      bool const in_place = kInPlace || params.turns != nullptr;
      int const from = in_place ? 0 : first_key / kBlockM % 32;
      for (uint32_t blocks = __funnelshift_r(all, all, from); blocks != 0; blocks &= blocks - 1) {
        if (skipped > 0) {
          --skipped;
          continue;
        }
        if (count-- == 0) break;
        int const bit = (__ffs(blocks) - 1 + from) % 32;
        if (pending.m_block >= 0) {
          pending.last = ++steps == most_steps;
          if (pending.last) steps = 0;
          load_step(pending);
        }
        pending = {chunk + bit, head, (full_blocks >> bit & 1) == 0, false, false};
      }
    }
  }
  pending.last = pending.ends = true;
  if (pending.m_block >= 0) {
    load_step(pending);
    return;
  }
  if constexpr (Traits::kPersistent) {
    if constexpr (Traits::kPaired) wait_until_read();  // its zeros are stored from there
    announce<Traits>(storage, tile, state);
  } else {
    // Gradients of 0 are stored from the memory of K and V.
    storage.key_full.wait(0);
    storage.value_full.wait(0);
    if (lane == 0) {
      storage.steps[0] = pending;
      storage.query_pipeline.full[0].arrive();
      if constexpr (kAddsToQueries<Traits>) storage.query_pipeline.full[0].arrive();
    }
  }
}

// The tiles of a CTA. With a counter all are taken from it, so that in deterministic mode none
// waits for one that nobody has begun.
template <class Traits>
CUTLASS_DEVICE void load(typename Traits::Params const& params,
                         typename Traits::SharedStorage& storage, KeyTile const& of_cta) {
  Loading<Traits::kStages> loading;
  if constexpr (Traits::kHasAlibi) {
    begin_alibi<Traits::kBlockN, Traits::kBlockM, Traits::kStages>(storage.term_keys,
                                                                   storage.term_queries);
  }
  if constexpr (Traits::kPersistent) {
    auto const take = [&] {
      int const taken = threadIdx.x % 32 == 0 ? atomicAdd(params.tile_counter, 1) : 0;
      return __shfl_sync(~0u, taken, 0);
    };
    bool const counted = params.tile_counter != nullptr;
    int index = counted ? take() : blockIdx.x;
    while (index < params.order.num_tiles()) {
      load_keys_and_steps<Traits>(params, storage, params.key_tile(index), loading);
      index = counted ? take() : INT_MAX;
    }
    announce<Traits>(storage, {-1, 0, 0, 0}, loading.state);
  } else {
    load_keys_and_steps<Traits>(params, storage, of_cta, loading);
  }
}

}  // namespace jax_fa3::bwd
