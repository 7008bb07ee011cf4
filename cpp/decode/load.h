// The producer warpgroup: one warp brings keys and values by TMA, page by page, one hands out the
// work and brings the queries.
#pragma once

#include "common/tma.h"
#include "decode/schedule.h"
#include "decode/shares.h"
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
  int const entry = params.page_size(position);
  int const page = params.page_table[int64_t{work.index} * params.pages_per_sequence + entry];
  bool const exists = static_cast<unsigned>(page) < static_cast<unsigned>(params.num_pages);
  return {exists ? page : Part::kLacking, position - entry * params.page_size.divisor};
}

// Of an e4m3 cache: copies the scales of a block's keys and values, of which the parts are lanes'
// from `first_lane` on. Where no row sees a position they are 0, for a probability of 0 does not
// silence NaN.
template <int kBlockN>
CUTLASS_DEVICE void load_scales(Params const& params, Work const& work, Part const& part,
                                int first_lane, int first_position, float (&scales)[2 * kBlockN]) {
  for (int i = threadIdx.x % 32; i < kBlockN; i += 32) {
    int const source = first_lane + i / params.box_rows;
    int const page = __shfl_sync(~0u, part.page, source);
    int const slot = __shfl_sync(~0u, part.slot, source) + i % params.box_rows;
    int const position = first_position + i;
    bool const seen =
        page >= 0 && position >= work.positions.begin && position < work.positions.end;
    auto const copy = [&](Scale const& scale, float& target) {
      float const* const at = seen ? scale.at(work.index, work.head, page, slot) : scale.data;
      SM80_CP_ASYNC_CACHEALWAYS_ZFILL<float>::copy(*at, target, seen);
    };
    copy(params.key_scale, scales[i]);
    copy(params.value_scale, scales[kBlockN + i]);
  }
}

// This lane's copies so far, when they are there.
CUTLASS_DEVICE void arrive_with_copies(FullBarrier& full) {
  cutlass::arch::cpasync_barrier_arrive_noinc(reinterpret_cast<uint64_t*>(&full));
}

// One lane hands out a work.
template <class Traits>
CUTLASS_DEVICE void hand_out(typename Traits::SharedStorage& storage, Work const& work, int stage) {
  storage.work[stage] = work;
  storage.lacks_page[stage] = false;
  storage.work_pipeline.full[stage].arrive();
}

// Of a work that one lane loads.
CUTLASS_DEVICE Part find_part_of_lane(Params const& params, Work const& work, int part) {
  int const bits = params.tiles.block_bits;
  int const position = (work.begin << bits) + part * params.box_rows;
  if (position >= work.end << bits) return Part{Part::kUnneeded, 0};
  return find_part(params, work, position);
}

// By one warp: the keys and values of a work, of whose parts each lane has found the first one.
template <class Traits>
CUTLASS_DEVICE void load_blocks(Params const& params, typename Traits::SharedStorage& storage,
                                Work const& work, Part now, int work_stage,
                                PipelineState<Traits::kLoadStages>* state) {
  constexpr int kBlockN = Traits::kBlockN;
  constexpr auto kReadOnce = TMA::CacheHintSm90::EVICT_FIRST;
  constexpr auto kKeep = TMA::CacheHintSm90::EVICT_NORMAL;  // other tiles read it, too
  int const lane = threadIdx.x % 32;
  int const parts = params.boxes;
  bool const one_tile = params.tiles.count(work.sequence) == 1;
  auto const hint = one_tile ? kReadOnce : kKeep;

  // Each lane finds one part, 32 parts ahead.
  Part next{};
  int first = 0;
  for (int n_block = work.begin; n_block < work.end; ++n_block, first += parts) {
    if (first > 0 && first % 32 == 0) now = next;
    int const own = lane - first % 32;  // of the block's parts
    bool const is_mine = own >= 0 && own < parts;
    bool const loads = is_mine && now.page >= 0;
    int const loaded = __popc(__ballot_sync(~0u, loads));
    bool const lacks = __any_sync(~0u, is_mine && now.page == Part::kLacking);
    if (lacks && lane == 0) storage.lacks_page[work_stage] = true;

    auto const load_block = [&](auto columns, auto slab, CUtensorMap const& map, auto const& also) {
      constexpr int kColumns = decltype(columns)::value;
      constexpr int kSlab = decltype(slab)::value;
      auto& pipeline = storage.load_pipeline();
      FullBarrier& full = pipeline.full[state->stage];
      auto* const smem = storage.load_ring()[state->stage];
      if (lane == 0) {
        pipeline.empty[state->stage].wait(state->phase ^ 1);
        full.arrive_and_expect_tx(loaded * params.box_rows * kColumns * sizeof(*smem));
      }
      __syncwarp();
      if (loads) {
        tma_load_rows<kBlockN, kColumns, kSlab>(
            map, full, hint, smem + own * params.box_rows * kSlab, {now.slot, work.head, now.page});
      }
      also();
      if constexpr (Traits::kE4M3) arrive_with_copies(full);
      state->advance();
    };
    load_block(Int<Traits::kHeadDim>{}, Int<Traits::kLoadSlab>{}, params.key, [&] {
      if constexpr (Traits::kE4M3) {
        if (Traits::kFew && !params.key_scale.of_positions) return;
        load_scales<kBlockN>(params, work, now, first % 32, n_block * kBlockN,
                             storage.load_scales()[state->stage]);
      }
    });
    load_block(Int<Traits::kHeadDimV>{}, Int<Traits::kLoadSlabV>{}, params.value, [] {});
    if (first % 32 == 0) next = find_part_of_lane(params, work, first + 32 + lane);
  }
}

// By one warp, at the kernel's beginning: what the table has of a sequence comes to the L1 while
// lengths are on their way, 128 bytes for each lane, so its first 1,024 entries. Nobody reads
// `fetched`.
CUTLASS_DEVICE void fetch_table(Params const& params, int sequence, int* fetched) {
  int const entry = static_cast<int>(threadIdx.x) % 32 * 32;
  if (params.page_table == nullptr || entry >= params.pages_per_sequence) return;
  int const* const table = params.page_table + int64_t{sequence} * params.pages_per_sequence;
  SM80_CP_ASYNC_CACHEALWAYS<int>::copy(table[entry], *fetched);
}

// equal: the CTA has equal shares, the first of which the last lane knows.
template <class Traits>
CUTLASS_DEVICE void load(Params const& params, typename Traits::SharedStorage& storage, bool equal,
                         Share const& share) {
  int const lane = threadIdx.x % 32;
  PipelineState<Traits::kWorkStages> work_state;
  PipelineState<Traits::kLoadStages> state;
  bool waits = params.appended;
  for (bool own = equal;; work_state.advance(), own = false) {
    Work work;
    if (own) {
      work = share_work(params, SharePlace(params), share_of_lane(share, 31));
    } else {
      storage.work_pipeline.full[work_state.stage].wait(work_state.phase);
      work = storage.work[work_state.stage];
    }
    Part part{};
    if (!work.last) part = find_part_of_lane(params, work, lane);
    if (own && lane == 0) hand_out<Traits>(storage, work, 0);
    if (work.last) return;
    if (waits) {
      cudaGridDependencySynchronize();
      asm volatile("fence.proxy.async.global;" ::: "memory");  // TMA is to see them, too
      waits = false;
    }
    load_blocks<Traits>(params, storage, work, part, work_state.stage, &state);
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
  using Vector = cute::uint128_t;
  Divider const& group = params.tiles.group;
  int const first = work.tile * Traits::kBlockM;
  int const rows = min(work.sequence.count * group.divisor - first, Traits::kBlockM);
  auto* const smem = reinterpret_cast<Vector*>(storage.query);
  CUTLASS_PRAGMA_NO_UNROLL
  for (int i = threadIdx.x % 32; i < rows * kVectors; i += 32) {
    int const row = i / kVectors;
    int const vector = i % kVectors;
    int const query_row = work.sequence.first_row + group(first + row);
    int const head = work.head * group.divisor + group.rest(first + row);
    int const target = swizzled_vector<Traits::kBlockM, Traits::kSlab>(row, vector);
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
                             int units, Ours ours, bool equal) {
  int const lane = threadIdx.x % 32;
  int const cta = static_cast<int>(blockIdx.x);
  Piece piece(0, Divider());
  int unit = 0;
  int end = params.tiles_of_cta;
  Walk walk{params, ours};
  if (!equal) {
    piece = Piece(units * params.num_heads_k, params.num_ctas);
    unit = piece.begin(cta);
    end = piece.begin(cta + 1);
    if (unit < end) walk.start(unit, storage.known_units);
  }

  uint32_t query_phase = 0;
  PipelineState<Traits::kWorkStages> state;
  for (;; state.advance()) {
    Work& handed_out = storage.work[state.stage];
    Work work{};
    if (equal && unit == 0) {  // by the loading warp
      storage.work_pipeline.full[state.stage].wait(state.phase);
      work = handed_out;
    } else {
      work.last = unit >= end;
      if (!work.last && equal) {
        SharePlace place(params);
        place.tile += unit;
        work = share_work(params, place, find_share(params, params.heads(place.tile)));
      } else if (!work.last) {
        work = walk.next(end - unit);
      }
      storage.work_pipeline.empty[state.stage].wait(state.phase ^ 1);
      if (lane == 0) hand_out<Traits>(storage, work, state.stage);
      __syncwarp();
    }
    if (work.last) break;
    if (lane == 0) {
      find_full(params, &handed_out);
      if (equal) {
        count_parts<Traits>(params, &handed_out);
      } else {
        complete(params, unit, piece, &handed_out);
      }
    }
    if (params.appended) cudaGridDependencySynchronize();
    storage.query_empty.wait(query_phase ^ 1);
    query_phase ^= 1;
    load_query<Traits>(params, storage, work);
    if (lane == 0) storage.query_full.arrive();
    unit += equal ? 1 : walk.advance();
  }
  // The kernel after this one waits for this one only: the one that is overtaken must be done, too.
  cudaGridDependencySynchronize();
}

}  // namespace jax_fa3::decode
