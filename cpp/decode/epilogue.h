// The end of a work: divide by the row sums, write the output and the log-sum-exp, or the CTA's
// part of them.
#pragma once

#include "decode/barriers.h"
#include "decode/cluster.h"
#include "decode/params.h"
#include "decode/parts.h"
#include "decode/traits.h"
#include "fwd/epilogue.h"

namespace jax_fa3::decode {

// What a thread's rows see of a work's blocks.
template <class Traits>
CUTLASS_DEVICE void find_rows(Params const& params, Work const& work, int tile_row,
                              Interval (&rows)[kRowsPerThread]) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kRowsPerThread; ++i) {
    int const row = params.tiles.group(work.tile * Traits::kBlockM + tile_row + i * 8);
    rows[i] = {0, 0};
    if (row >= work.sequence.count || work.begin == work.end) continue;
    Interval const seen = params.tiles.window.of(work.sequence, row);
    rows[i] = {max(seen.begin, work.begin * Traits::kBlockN),
               min(seen.end, work.end * Traits::kBlockN)};
  }
}

// The sinks of a thread's rows, or -inf: read early, for the end of a work waits for them.
template <class Traits>
CUTLASS_DEVICE void find_sinks(Params const& params, Work const& work, int tile_row,
                               float (&sinks)[kRowsPerThread]) {
  Divider const& group = params.tiles.group;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kRowsPerThread; ++i) {
    sinks[i] = -INFINITY;
    if (params.sinks == nullptr) continue;
    int const row = work.tile * Traits::kBlockM + tile_row + i * 8;
    sinks[i] = params.sinks[work.head * group.divisor + group.rest(row)];
  }
}

// Divides, and finds the log-sum-exp.
template <class Element, class Out>
CUTLASS_DEVICE void finish(Params const& params, Work const& work, bool lacks_page,
                           Interval const (&rows)[kRowsPerThread], Softmax& softmax, Out& tOrO,
                           float (&lse)[kRowsPerThread]) {
  constexpr fwd::Sink kNoSink{-INFINITY};  // it comes last: parts are joined before
  float inverse_sum[kRowsPerThread];
  fwd::sum_rows<Element>(params.softmax_scale, kNoSink, softmax, inverse_sum);
  fwd::find_lse(rows, params.softmax_scale, kNoSink, softmax, lse);
  bool const broken = work.sequence.mistaken || lacks_page;
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row) {
    if (row > 0 && params.has_one_row()) break;
    if (broken) lse[row] = NAN;
    float const instead = broken ? NAN : fwd::out_of_empty(rows[row]);
    bool const is_instead = broken || rows[row].empty();
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tOrO); ++i) {
      if (fragment_row(i) == row) tOrO(i) = is_instead ? instead : tOrO(i) * inverse_sum[row];
    }
  }
}

// A part of a tile that the CTA's cluster shares.
template <class Traits, class Out>
CUTLASS_DEVICE void share(Params const& params, typename Traits::SharedStorage& storage,
                          Work const& work, int stage, int tile_row,
                          float const (&lse)[kRowsPerThread], Out const& tOrO) {
  constexpr int kVectors = Traits::kHeadDimV / 4;
  // By way of shared memory, in a stage of keys that nobody needs any more (wgmma may still read it
  // for rows that are none): so there is a vector for each thread to send, by little code.
  // Vectors of a row are permuted, for lanes to write to as many banks as there are.
  auto* const out = reinterpret_cast<float4*>(storage.ring[stage]);
  auto* const lses = reinterpret_cast<float*>(out + kClusterRows * kVectors);
  auto const place = [](int row, int vector) { return row * kVectors + (vector ^ row); };
  if (tile_row < params.slot_rows) {  // at most 8: the thread's second row is none
    int const quarter = threadIdx.x % 4;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tOrO); i += 4) {
      float4* const at = out + place(tile_row, fragment_column(i) / 4 + quarter / 2);
      reinterpret_cast<float2*>(at)[quarter % 2] = float2{tOrO(i), tOrO(i + 1)};
    }
    if (quarter == 0) lses[tile_row] = lse[0];
  }
  cutlass::arch::NamedBarrier::sync(128, barrier_id(NamedBarrier::kWarpsMet, 0));
  SharedTile<Traits> const shared(storage, params);
  shared.wait_until_others_run();
  int const thread = threadIdx.x % 128;
  CUTLASS_PRAGMA_NO_UNROLL
  for (int i = thread; i < params.slot_rows * kVectors; i += 128) {
    int const row = i / kVectors;
    float4 const x = out[place(row, i % kVectors)];
    shared.send_out(row, i % kVectors * 4, {x.x, x.y, x.z, x.w});
  }
  static_assert(kClusterRows * kLargestCluster <= 128);
  int const row = thread / kLargestCluster;
  int const to = thread % kLargestCluster;
  if (row < params.slot_rows && to < params.cluster) shared.send_lse(row, to, lses[row]);
  shared.join(params, work);
}

template <class Traits, class Out>
CUTLASS_DEVICE void store(Params const& params, Work const& work, int tile_row,
                          float const (&sinks)[kRowsPerThread], float (&lse)[kRowsPerThread],
                          Out& tOrO) {
  using Element = typename Traits::Element;
  int const lane_column = threadIdx.x % 4 * 2;
  OutRow const tile{work.sequence.first_row, work.sequence.count, work.head, work.tile};
  int64_t const slot = int64_t{blockIdx.x} * params.slots + max(work.slot, 0);
  int64_t const first_place = slot * params.slot_rows + tile_row;
  int64_t index[kRowsPerThread];
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row) {
    index[row] =
        tile.index(tile_row + row * 8, Traits::kBlockM, params.tiles.group, params.num_heads_q);
  }
  if (work.joins) {  // with what this thread has stored there
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      if (index[row] < 0) continue;
      int64_t const place = first_place + row * 8;
      Joined const joined(params.partial_lse[place], lse[row]);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 2 * row; i < size(tOrO); i += 4) {
        int const column = fragment_column(i) + lane_column;
        if (column >= params.head_dim_v) continue;
        auto const before = *reinterpret_cast<float2 const*>(params.partial_out +
                                                             place * params.head_dim_v + column);
        tOrO(i) = joined(before.x, tOrO(i));
        tOrO(i + 1) = joined(before.y, tOrO(i + 1));
      }
      lse[row] = joined.lse;
    }
    __syncwarp();  // all have read the log-sum-exps that one of four lanes overwrites
  }
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row) {
    if (index[row] < 0) continue;
    if (Traits::kFlags && work.flagged) {
      FlaggedPart const part(params, static_cast<int>(blockIdx.x), tile_row + row * 8);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 2 * row; i < size(tOrO); i += 4) {
        int const column = fragment_column(i) + lane_column;
        if (column < params.head_dim_v) part.store_out(column, tOrO(i), tOrO(i + 1));
      }
      if (lane_column == 0) part.store_lse(lse[row]);
      continue;
    }
    if (work.slot != Work::kNone) {
      int64_t const place = first_place + row * 8;
      float* const out = params.partial_out + place * params.head_dim_v;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 2 * row; i < size(tOrO); i += 4) {
        int const column = fragment_column(i) + lane_column;
        if (column >= params.head_dim_v) continue;
        *reinterpret_cast<float2*>(out + column) = float2{tOrO(i), tOrO(i + 1)};
      }
      if (lane_column == 0) params.partial_lse[place] = lse[row];
      continue;
    }
    float const share = add_sink(sinks[row], &lse[row]);
    auto* const target = static_cast<uint16_t*>(params.out) + index[row] * params.head_dim_v;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 2 * row; i < size(tOrO); i += 4) {
      int const column = fragment_column(i) + lane_column;
      if (column >= params.head_dim_v) continue;
      *reinterpret_cast<uint32_t*>(target + column) =
          pack<Element>(tOrO(i) * share, tOrO(i + 1) * share);
    }
    if (lane_column == 0) params.lse[index[row]] = lse[row];
  }
}

}  // namespace jax_fa3::decode
