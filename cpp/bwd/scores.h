// From S^T and dP^T to P^T and dS^T, in the registers of a consumer thread: two keys (rows of the
// accumulator) and, for each 8 columns, two query rows.
#pragma once

#include "bwd/params.h"
#include "common/mask_bits.h"
#include "common/softmax.h"

namespace jax_fa3::bwd {

// What preprocess wrote about a step's query rows, in shared memory.
template <int kBlockM>
struct RowRecords {
  using Stats = RowStats<kBlockM>;
  float const* stats;
  int2 const* rows;  // begin and end of the keys that they see
  int key;           // the first of the thread's two keys
  int quad = threadIdx.x % 4 * 2;

  // The values of elements i to i + 3: those of two query rows, twice.
  CUTLASS_DEVICE static float of(float2 pair, int e) { return e % 2 == 0 ? pair.x : pair.y; }
  CUTLASS_DEVICE float2 lse_of(int i) const { return load(Stats::kLse, i); }
  CUTLASS_DEVICE float2 lse_low_of(int i) const { return load(Stats::kLseLow, i); }
  CUTLASS_DEVICE float2 delta_of(int i) const { return load(Stats::kDelta, i); }
  CUTLASS_DEVICE bool careful() const { return __float_as_int(stats[Stats::kCareful]) != 0; }
  CUTLASS_DEVICE int4 interval_of(int i) const {
    return *reinterpret_cast<int4 const*>(rows + fragment_column(i) + quad);
  }
  CUTLASS_DEVICE bool visible(int4 interval, int i) const {
    int const index = key + fragment_row(i) * 8;
    return i % 2 == 0 ? index >= interval.x && index < interval.y
                      : index >= interval.z && index < interval.w;
  }

 private:
  CUTLASS_DEVICE float2 load(int offset, int i) const {
    return *reinterpret_cast<float2 const*>(stats + offset + fragment_column(i) + quad);
  }
};

// With a dense mask, too.
template <int kBlockM>
struct RowRecordsWithBits : RowRecords<kBlockM> {
  uint32_t const (&bits)[kRowsPerThread];  // of the thread's keys, from the step's first row on

  CUTLASS_DEVICE bool visible(int4 interval, int i) const {
    return RowRecords<kBlockM>::visible(interval, i) &&
           (bits[fragment_row(i)] >> (i / 4 * 2 + i % 2) & 1) != 0;
  }
};

// P from scores (or from what the soft cap made of them), in place. With kCareful it is masked, and
// exact however large the scores are.
template <bool kCareful, class Records, class Scores>
CUTLASS_DEVICE void probabilities(Params const& params, Records const& records, Scores& scores) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(scores); i += 4) {
    float2 const lse = records.lse_of(i);
    CUTLASS_PRAGMA_UNROLL
    for (int e = 0; e < 4; ++e) {
      scores(i + e) = scores(i + e) * params.softmax_scale_log2 - Records::of(lse, e);
    }
    if constexpr (kCareful) {
      float2 const low = records.lse_low_of(i);
      CUTLASS_PRAGMA_UNROLL
      for (int e = 0; e < 4; ++e) scores(i + e) -= Records::of(low, e);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int e = 0; e < 4; ++e) scores(i + e) = exp2f(scores(i + e));
    if constexpr (kCareful) {
      int4 const interval = records.interval_of(i);
      CUTLASS_PRAGMA_UNROLL
      for (int e = 0; e < 4; ++e)
        scores(i + e) = records.visible(interval, i + e) ? scores(i + e) : 0.f;
    }
  }
}

// dS = P (dP - delta), in place of dP, times ds_scale() (range.h), by which delta has been
// multiplied already.
template <class Records, class Scores>
CUTLASS_DEVICE void score_grads(Records const& records, float scale, Scores const& p, Scores& dp) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(dp); i += 4) {
    float2 const delta = records.delta_of(i);
    CUTLASS_PRAGMA_UNROLL
    for (int e = 0; e < 4; ++e) {
      dp(i + e) = p(i + e) * (dp(i + e) * scale - Records::of(delta, e));
    }
  }
}

}  // namespace jax_fa3::bwd
