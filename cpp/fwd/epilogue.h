// The end of a tile: divide by the row sums, write the output and the log-sum-exp.
#pragma once

#include "common/fragment.h"
#include "common/score.h"
#include "common/softmax.h"
#include "common/tma.h"
#include "fwd/params.h"
#include "fwd/traits.h"

namespace jax_fa3::fwd {

// One more key of every row that sees a key, whose value is 0: all that it does is to raise the
// log-sum-exp.
struct Sink {
  float score;  // in base e; -inf: none

  CUTLASS_DEVICE bool is_none() const { return score == -INFINITY; }

  // By how much it raises that of the other keys: by this over the larger of the two,
  CUTLASS_DEVICE float rise_over_larger(float lse) const {
    return logf(1.f + exp2f(-fabsf(score - lse) * kLog2E));
  }
  // and in all.
  CUTLASS_DEVICE float rise(float lse) const {
    return fmaxf(score - lse, 0.f) + rise_over_larger(lse);
  }
};

template <class Params>
CUTLASS_DEVICE Sink sink_of(Params const& params, TileCoord tile) {
  PerHead const& sinks = params.heads.sinks;
  return {sinks.data == nullptr ? -INFINITY : sinks(tile.batch, tile.head)};
}

// The log-sum-exp of a row's keys, once normalize() has summed the rows of all threads.
template <class Softmax>
CUTLASS_DEVICE float lse_of_keys(Softmax const& softmax, float softmax_scale, int row) {
  return softmax.row_max[row] * softmax_scale + softmax.log_sum(row);
}

// What a row that sees no key gets: 0 (and -inf, below), or NaN if it is broken (mask.h).
CUTLASS_DEVICE float out_of_empty(Interval row) { return row.broken() ? NAN : 0.f; }

// Sums the rows over all threads, and finds what O is to be multiplied by.
template <class Element, class Softmax>
CUTLASS_DEVICE void sum_rows(float softmax_scale, Sink sink, Softmax& softmax,
                             float (&inverse_sum)[kRowsPerThread]) {
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row) {
    softmax.row_sum[row] = quad_sum(softmax.row_sum[row]);
    inverse_sum[row] = 1.f / softmax.template sum_of_rounded<Element>(row);
    if (!sink.is_none()) {
      inverse_sum[row] *= exp2f(-sink.rise(lse_of_keys(softmax, softmax_scale, row)) * kLog2E);
    }
  }
}

// Divides by the row sums. Rows that see no key get out_of_empty(), whatever the accumulators hold:
// blocks are not masked if all rows that see a key see all of them.
template <class Element, class Softmax, class Out>
CUTLASS_DEVICE void normalize(Interval const (&rows)[kRowsPerThread], float softmax_scale,
                              Sink sink, Softmax& softmax, Out& tOrO) {
  float inverse_sum[kRowsPerThread];
  sum_rows<Element>(softmax_scale, sink, softmax, inverse_sum);
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(tOrO); ++i) {
    int const row = fragment_row(i);
    tOrO(i) = tOrO(i) * inverse_sum[row] * softmax.out_scale;  // their product may be too small
    if (rows[row].empty()) tOrO(i) = out_of_empty(rows[row]);
  }
}

// The log-sum-exp, after normalize().
template <class Softmax>
CUTLASS_DEVICE void find_lse(Interval const (&rows)[kRowsPerThread], float softmax_scale, Sink sink,
                             Softmax const& softmax, float (&lse)[kRowsPerThread]) {
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row) {
    lse[row] = lse_of_keys(softmax, softmax_scale, row);
    // Not lse + rise(): a sink far above the keys would lose its last digits.
    if (!sink.is_none()) lse[row] = fmaxf(sink.score, lse[row]) + sink.rise_over_larger(lse[row]);
    if (rows[row].empty()) lse[row] = rows[row].broken() ? NAN : -INFINITY;
  }
}

// What `lse` lost to its rounding, in base 2: at scores of 10^5 that is more than a probability's
// rounding to 16 bits. The backward adds it where it counts.
template <class Softmax>
CUTLASS_DEVICE float find_lse_low(Softmax const& softmax, float softmax_scale, Sink sink, float lse,
                                  int row) {
  float const high = __fmul_rn(lse, kLog2E);
  float low = softmax.max_exponent_less(high, row) + softmax.log_sum(row) * kLog2E;
  if (!sink.is_none()) {
    float const of_keys = lse_of_keys(softmax, softmax_scale, row);
    if (sink.score > of_keys) low = fmaf(sink.score, kLog2E, -high);
    low += sink.rise_over_larger(of_keys) * kLog2E;
  }
  return low;
}

// Accumulates the result for the keys of other calls, which is in out_accum and lse_accum: `tOrO`
// and `lse` become the result for all of these keys. Both pointers are at the thread's first row.
// `in_place`: what is stored goes to out_accum itself. Then rows that see no key of this call stay
// as they are: they are not read, and `stored` becomes false for them.
template <class Out>
CUTLASS_DEVICE void accumulate(Interval const (&rows)[kRowsPerThread], float const* out_accum,
                               int64_t row_stride, int columns, float const* lse_accum,
                               bool in_place, bool (&stored)[kRowsPerThread], Out& tOrO,
                               float (&lse)[kRowsPerThread]) {
  float weight[kRowsPerThread];
  float weight_accum[kRowsPerThread];
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row) {
    float const lse_so_far = stored[row] ? lse_accum[row * 8] : -INFINITY;
    if (rows[row].empty() && !rows[row].broken()) {
      stored[row] = stored[row] && !in_place;
      weight[row] = 0.f;
      weight_accum[row] = 1.f;
      lse[row] = lse_so_far;
      continue;
    }
    float const top = fmaxf(lse[row], lse_so_far);  // a NaN comes back by either difference
    float const share = exp2f((lse[row] - top) * kLog2E);
    float const share_accum = exp2f((lse_so_far - top) * kLog2E);
    float const sum = share + share_accum;
    weight[row] = share / sum;
    weight_accum[row] = share_accum / sum;
    lse[row] = top + logf(sum);
  }
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(tOrO); i += 2) {
    int const row = fragment_row(i);
    int const column = fragment_column(i) + threadIdx.x % 4 * 2;
    if (stored[row] && column < columns) {
      auto const pair = *reinterpret_cast<float2 const*>(out_accum + row * 8 * row_stride + column);
      tOrO(i) = weight[row] * tOrO(i) + weight_accum[row] * pair.x;
      tOrO(i + 1) = weight[row] * tOrO(i + 1) + weight_accum[row] * pair.y;
    }
  }
  __syncwarp();  // all have read the log-sum-exp that one of four lanes overwrites
}

// Where a thread's two rows are in the arrays of all rows, and whether they exist.
struct StoredRows {
  int first;  // of the sequence
  int64_t index;
  bool exist[kRowsPerThread];

  template <class Traits>
  CUTLASS_DEVICE static StoredRows of(Traits, typename Traits::Params const& params, TileCoord tile,
                                      int warpgroup) {
    int const first = tile.block * Traits::kBlockM + warpgroup * 64 + threadIdx.x % 128 / 32 * 16 +
                      threadIdx.x % 32 / 4;
    int const seqlen_q = params.mask.seqlen_q;
    return {first,
            (int64_t{tile.batch} * params.num_heads_q + tile.head) * seqlen_q + first,
            {first < seqlen_q, first + 8 < seqlen_q}};
  }
};

// Writes the log-sum-exp, which is known.
template <class Traits>
CUTLASS_DEVICE void write_lse(typename Traits::Params const& params, StoredRows const& stored,
                              Interval const (&rows)[kRowsPerThread], Sink sink,
                              typename Traits::Softmax const& softmax,
                              float const (&lse)[kRowsPerThread]) {
  if (threadIdx.x % 4 != 0) return;
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row) {
    if (!stored.exist[row]) continue;
    params.lse[stored.index + row * 8] = lse[row];
    if constexpr (Traits::kHasLseLow) {
      if (params.lse_low == nullptr) continue;
      float const low = find_lse_low(softmax, params.softmax_scale, sink, lse[row], row);
      params.lse_low[stored.index + row * 8] = rows[row].empty() ? 0.f : low;
    }
  }
}

// The log-sum-exp of all rows, after sum_rows(). Where the result for other keys is to come in,
// store_out() writes it.
template <class Traits>
CUTLASS_DEVICE void store_lse(typename Traits::Params const& params, TileCoord tile, int warpgroup,
                              Interval const (&rows)[kRowsPerThread],
                              typename Traits::Softmax const& softmax) {
  if constexpr (Traits::kAccumulates) {
    if (params.out_accum != nullptr) return;
  }
  Sink const sink = sink_of(params, tile);  // again: registers are few
  float lse[kRowsPerThread];
  find_lse(rows, params.softmax_scale, sink, softmax, lse);
  write_lse<Traits>(params, StoredRows::of(Traits{}, params, tile, warpgroup), rows, sink, softmax,
                    lse);
}

// O in 16 bits, by way of `smem`, which nobody reads any more and where the warpgroup's 64 rows
// begin; a slab has kOutRows rows. It is under way when this returns.
template <class Traits, class Out>
CUTLASS_DEVICE void store_in_16_bits(typename Traits::Params const& params, TileCoord tile,
                                     int warpgroup, uint16_t* smem, Out const& tOrO) {
  int const thread = threadIdx.x % 128;
  Traits::visit_out_element(params, [&](auto element) {
    auto const pair = [&](int i) {  // packed where it is stored: registers are few
      return pack<decltype(element)>(tOrO(2 * i), tOrO(2 * i + 1));
    };
    stage_packed<Traits::kOutRows, Traits::kHeadDimV, Traits::kSlabV>(pair, smem, thread / 32 * 16);
  });
  tma_store_fence();
  cutlass::arch::NamedBarrier::sync(128, barrier_id(NamedBarrier::kOutOfWarpgroup0, warpgroup));
  if (thread == 0) {
    tma_store_rows<Traits::kOutRows, Traits::kHeadDimV, Traits::kSlabV>(
        params.out, smem, {tile.block * Traits::kBlockM + warpgroup * 64, tile.head, tile.batch});
    tma_store_arrive();
  }
}

// The output. `out_over_value`: where it is staged, if in V's memory.
template <class Traits, class Out>
CUTLASS_DEVICE void store_out(typename Traits::Params const& params,
                              typename Traits::SharedStorage& storage, TileCoord tile,
                              int warpgroup, Interval const (&rows)[kRowsPerThread],
                              typename Traits::Softmax const& softmax,
                              float const (&inverse_sum)[kRowsPerThread], Out& tOrO,
                              uint16_t* out_over_value = nullptr) {
  int const thread = threadIdx.x % 128;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(tOrO); ++i) {
    // The product of both factors may be too small.
    tOrO(i) = tOrO(i) * inverse_sum[fragment_row(i)] * softmax.out_scale;
  }
  if (__any_sync(~0u, rows[0].empty() | rows[1].empty())) {  // seldom
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tOrO); ++i) {
      int const row = fragment_row(i);
      if (rows[row].empty()) tOrO(i) = out_of_empty(rows[row]);
    }
  }
  StoredRows stored = StoredRows::of(Traits{}, params, tile, warpgroup);
  int64_t const offset =
      tile.batch * params.out_batch_stride + tile.head * params.out_head_stride;  // of out in fp32
  if constexpr (Traits::kAccumulates) {
    if (params.out_accum != nullptr) {
      float lse[kRowsPerThread];
      find_lse(rows, params.softmax_scale, {-INFINITY}, softmax, lse);
      accumulate(rows, params.out_accum + offset + stored.first * params.out_seqlen_stride,
                 params.out_seqlen_stride, params.head_dim_v, params.lse + stored.index,
                 params.out_fp32 != nullptr, stored.exist, tOrO, lse);
      write_lse<Traits>(params, stored, rows, {-INFINITY}, softmax, lse);
    }
  }
  constexpr bool kIn16Bits = std::is_same_v<typename Traits::Params, ShortParams>;
  if (!kIn16Bits && params.out_fp32 != nullptr) {
    store_fp32(
        tOrO, params.out_fp32 + offset, params.out_seqlen_stride, stored.first,
        [&](int i) { return stored.exist[i]; }, params.head_dim_v);
    if constexpr (Traits::kOutOverValue) {
      if (thread % 32 == 0) storage.out_stored.arrive();
    }
    return;
  }
  uint32_t const barrier = barrier_id(NamedBarrier::kOutOfWarpgroup0, warpgroup);
  uint16_t* const smem = Traits::kOutOverValue ? out_over_value : storage.out(warpgroup);
  // The previous tile's store has read the buffer.
  if (!Traits::kOutOverValue && thread == 0) tma_store_wait<0>();
  cutlass::arch::NamedBarrier::sync(128, barrier);
  store_in_16_bits<Traits>(params, tile, warpgroup, smem, tOrO);
  if constexpr (Traits::kOutOverValue) {
    if (thread == 0) tma_store_wait<0>();
    if (thread % 32 == 0) storage.out_stored.arrive();
  }
}

}  // namespace jax_fa3::fwd
