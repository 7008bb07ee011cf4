// The producer warpgroup: one warp brings keys and values by TMA, page by page, one hands out the
// work and brings the queries.
#pragma once

#include "common/tma.h"
#include "decode/schedule.h"
#include "decode/traits.h"

namespace jax_fa3::decode {

// Up to a block of one page: what one lane loads.
struct Part {
  static constexpr int kUnneeded = -1;
  static constexpr int kLacking = -2;
  int page;
  int slot;
};

// Finds the part of a work that begins at `position`. Of the table nothing is read but what some
// row sees.
CUTLASS_DEVICE Part find_part(Params const& params, Work const& work, int position) {
  if (position >= work.positions.end || position + params.box_rows <= work.positions.begin) {
    return {Part::kUnneeded, 0};
  }
  if (params.page_table == nullptr) return {work.index, position};
  int const entry = position / params.page_size;
  int const page = params.page_table[int64_t{work.index} * params.pages_per_sequence + entry];
  bool const exists = static_cast<unsigned>(page) < static_cast<unsigned>(params.num_pages);
  return {exists ? page : Part::kLacking, position - entry * params.page_size};
}

template <class Traits>
CUTLASS_DEVICE void load(Params const& params, typename Traits::SharedStorage& storage) {
  constexpr int kBlockN = Traits::kBlockN;
  constexpr auto kReadOnce = TMA::CacheHintSm90::EVICT_FIRST;
  constexpr auto kKeep = TMA::CacheHintSm90::EVICT_NORMAL;  // other tiles read it, too
  int const lane = threadIdx.x % 32;
  int const parts = kBlockN / params.box_rows;  // of a block: 1 to 16

  PipelineState<Traits::kWorkStages> work_state;
  PipelineState<Traits::kStages> state;
  for (;; work_state.advance()) {
    storage.work_pipeline.full[work_state.stage].wait(work_state.phase);
    Work const& work = storage.work[work_state.stage];
    if (work.last) return;
    bool const one_tile = params.tiles.count(work.sequence) == 1;
    auto const hint = one_tile ? kReadOnce : kKeep;

    // Each lane finds one part, 32 parts ahead.
    int const first_position = work.begin * kBlockN;
    auto const find = [&](int part) {
      int const position = first_position + part * params.box_rows;
      if (position >= work.end * kBlockN) return Part{Part::kUnneeded, 0};
      return find_part(params, work, position);
    };
    Part now = find(lane);
    Part next{};
    int first = 0;
    for (int n_block = work.begin; n_block < work.end; ++n_block, first += parts) {
      if (first > 0 && first % 32 == 0) now = next;
      if (first % 32 == 0) next = find(first + 32 + lane);
      int const own = lane - first % 32;  // of the block's parts
      bool const is_mine = own >= 0 && own < parts;
      bool const loads = is_mine && now.page >= 0;
      int const loaded = __popc(__ballot_sync(~0u, loads));
      bool const lacks = __any_sync(~0u, is_mine && now.page == Part::kLacking);
      if (lacks && lane == 0) storage.lacks_page[work_state.stage] = true;

      auto const load_block = [&](auto const& load_part, int columns) {
        FullBarrier& full = storage.pipeline.full[state.stage];
        if (lane == 0) {
          storage.pipeline.empty[state.stage].wait(state.phase ^ 1);
          full.arrive_and_expect_tx(loaded * params.box_rows * columns * 2);
        }
        __syncwarp();
        if (loads) load_part(full, storage.ring[state.stage]);
        state.advance();
      };
      RowCoord const from{now.slot, work.head, now.page};
      load_block(
          [&](FullBarrier& full, uint16_t* smem) {
            tma_load_rows<kBlockN, Traits::kHeadDim, Traits::kSlab>(
                params.key, full, hint, smem + own * params.box_rows * Traits::kSlab, from);
          },
          Traits::kHeadDim);
      load_block(
          [&](FullBarrier& full, uint16_t* smem) {
            tma_load_rows<kBlockN, Traits::kHeadDimV, Traits::kSlabV>(
                params.value, full, hint, smem + own * params.box_rows * Traits::kSlabV, from);
          },
          Traits::kHeadDimV);
    }
    __syncwarp();
    if (lane == 0) storage.work_pipeline.empty[work_state.stage].arrive();
  }
}

// The rows of a tile that there are, of the heads that share its keys. The tile's other rows stay
// as they are: what is computed of them is not stored.
template <class Traits>
CUTLASS_DEVICE void load_query(Params const& params, typename Traits::SharedStorage& storage,
                               Work const& work) {
  constexpr int kVectors = Traits::kHeadDim / 8;  // of a row
  constexpr int kVectorsOfSlab = Traits::kSlab / 8;
  using Vector = cute::uint128_t;
  int const group = params.tiles.group;
  int const first = work.tile * Traits::kBlockM;
  int const rows = min(work.sequence.count * group - first, Traits::kBlockM);
  auto* const smem = reinterpret_cast<Vector*>(storage.query);
  for (int i = threadIdx.x % 32; i < rows * kVectors; i += 32) {
    int const row = i / kVectors;
    int const vector = i % kVectors;
    int const query_row = work.sequence.first_row + (first + row) / group;
    int const head = work.head * group + (first + row) % group;
    int const swizzle = Traits::kSlab == 64 ? row % 8 : row / 2 % 4;  // as in stage_packed()
    int const target = vector / kVectorsOfSlab * (Traits::kBlockM * kVectorsOfSlab) +
                       row * kVectorsOfSlab + (vector % kVectorsOfSlab ^ swizzle);
    auto const* const source = static_cast<uint16_t const*>(params.query) +
                               (int64_t{query_row} * params.num_heads_q + head) * params.head_dim +
                               vector * 8;
    bool const exists = vector * 8 < params.head_dim;
    SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<Vector>::copy(
        *reinterpret_cast<Vector const*>(exists ? source : params.query), smem[target], exists);
  }
  cp_async_fence();
  cp_async_wait<0>();
  cutlass::arch::fence_view_async_shared();
  __syncwarp();
}

template <class Traits>
CUTLASS_DEVICE void schedule(Params const& params, typename Traits::SharedStorage& storage,
                             int units, bool back) {
  int const lane = threadIdx.x % 32;
  int const cta = static_cast<int>(blockIdx.x);
  Piece const piece(units * params.num_heads_k, static_cast<int>(gridDim.x));
  int unit = piece.begin(cta);
  int const end = piece.begin(cta + 1);
  Walk walk{params, back};
  if (unit < end) walk.start(unit);

  if (lane == 0) params.splits[cta].parts = 0;
  uint32_t query_phase = 0;
  PipelineState<Traits::kWorkStages> state;
  for (;; state.advance()) {
    storage.work_pipeline.empty[state.stage].wait(state.phase ^ 1);
    Work work{};
    work.last = unit >= end;
    if (!work.last) {
      int taken = 0;
      work = walk.next(unit, end - unit, piece, &taken);
      unit += taken;
    }
    if (lane == 0) {
      storage.work[state.stage] = work;
      storage.lacks_page[state.stage] = false;
      storage.work_pipeline.full[state.stage].arrive();
    }
    __syncwarp();
    if (work.last) break;
    if (work.begin == work.end) continue;
    storage.query_empty.wait(query_phase ^ 1);
    query_phase ^= 1;
    load_query<Traits>(params, storage, work);
    if (lane == 0) storage.query_full.arrive();
  }
}

}  // namespace jax_fa3::decode
