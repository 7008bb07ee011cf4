// Online softmax of one consumer thread: parts of two rows of a warpgroup's 64-row tile.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "common/fragment.h"
#include "common/mask.h"

namespace jax_fa3 {

// The four lanes that share a row are neighbours.
CUTLASS_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
CUTLASS_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Sets scores outside [begin, end) to -inf; `column` is the key index of the thread's column 0. One
// bit per element of a row is made first: testing it costs a third of comparing the column twice.
// A broken row may wrap around here: the epilogue overwrites it.
template <class Scores>
CUTLASS_DEVICE void mask_scores(Scores& scores, Interval const (&rows)[kRowsPerThread],
                                int column) {
  static_assert(decltype(size(scores))::value <= 32 * kRowsPerThread);
  auto const bits_before = [](int key) {  // a row's elements before a key: columns 0, 1, 8, 9, ...
    int const elements = key <= 0 ? 0 : key / 8 * 2 + min(key % 8, 2);
    return elements >= 32 ? ~0u : (1u << elements) - 1;
  };
  uint32_t visible[kRowsPerThread];
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row) {
    visible[row] = bits_before(rows[row].end - column) & ~bits_before(rows[row].begin - column);
  }
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(scores); ++i) {
    int const element = i / 4 * 2 + i % 2;
    scores(i) = visible[fragment_row(i)] >> element & 1 ? scores(i) : -INFINITY;
  }
}

// How scores become exponents of base 2: score * factor - offset in one FFMA. The factor is
// softmax_scale_log2 and the offset the row's maximum times the factor, rounded. So the maximum's
// own exponent is not quite 0: all that is summed of a row is relative to the rounded offset, which
// log_sum() takes into account.
//
// Where an offset is 2^28 or more it is rounded by 2^4 or more. But so large scores differ by 2^4
// or more, if they differ: every weight but the maximum's is below 2^-16, whatever the factor.
// There the factor is a power of 2, and no product is rounded.
struct Exponents {
  float softmax_scale_log2;
  float power_of_2;  // 4 to 8 times that
  float huge;        // scores from this on take power_of_2
  float lowest;      // the maximum of no keys: finite, for -inf - -inf would be NaN; a power of 2,
                     // so that its products are not rounded
};

inline Exponents exponents_of(float scale_log2) {
  float const power_of_2 = std::exp2(std::floor(std::log2(scale_log2)) + 3.f);
  return {scale_log2, power_of_2, 268435456.f / scale_log2,
          -std::exp2(std::floor(std::log2(std::min(FLT_MAX / 4, FLT_MAX / 4 / power_of_2))))};
}

struct Softmax {
  Exponents const& exponents;
  float row_max[kRowsPerThread] = {exponents.lowest, exponents.lowest};
  float row_sum[kRowsPerThread] = {0.f, 0.f};  // of this thread's columns only
  float rescale[kRowsPerThread] = {1.f, 1.f};  // of what was accumulated before the last update
  float factor[kRowsPerThread];
  float offset[kRowsPerThread] = {-INFINITY, -INFINITY};
  static constexpr float out_scale =
      1.f;  // O is to be multiplied by it at the end (FP8: V's scale)

  // Takes the scores of one more block into the running maximum, which becomes what exponents are
  // relative to. kThreeAtOnce: by an instruction for three numbers.
  template <bool kThreeAtOnce = false, class Scores>
  CUTLASS_DEVICE void update_max(Scores const& scores) {
    raise_max<kThreeAtOnce>(scores);
    take_max();
  }

  // The same, but exponents stay relative to what they were relative to while none is above kSlack:
  // no sum is rescaled, and row_max is of this thread's columns only. Returns whether a row of the
  // warp has another offset now: then O is to be rescaled.
  template <class Scores>
  CUTLASS_DEVICE bool raise_offset(Scores const& scores) {
    raise_max_by_bits(scores);
    // Both that is rare in one vote, of which each costs 40 clocks.
    if (!__any_sync(~0u, is_doubtful() | any_is_above())) return false;
    raise_max_by_value(scores);
    return take_max_if_above();
  }

  // After raise_offset(), once there are no more scores.
  CUTLASS_DEVICE void join_max() {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) row_max[row] = quad_max(row_max[row]);
  }

  // One of kParts equal parts of the scores becomes probabilities relative to the running maximum.
  template <int kPart, int kParts, class Scores>
  CUTLASS_DEVICE void exponentiate(Scores& scores) {
    exponentiate_less<kPart, kParts>(offset, scores);
  }

  template <class Out>
  CUTLASS_DEVICE void rescale_out(Out& out) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(out); ++i) out(i) *= rescale[fragment_row(i)];
  }

  // The natural logarithm of the sum of exp(score - maximum), once row_sum is of all threads.
  CUTLASS_DEVICE float log_sum(int row) const {
    constexpr float kLn2 = 0.693147181f;
    return logf(row_sum[row]) - kLn2 * excess(row);
  }

  // The sum of a row's weights, with the largest of them as it was rounded to Element. Where that
  // one is nearly all there is, O divided by this sum is its value, however it was rounded.
  template <class Element>
  CUTLASS_DEVICE float sum_of_rounded(int row) const {
    float const largest = exp2f(excess(row));
    return row_sum[row] + (unpack<Element>(pack<Element>(largest, 0.f), 0) - largest);
  }

  // The row's maximum as an exponent, less `subtrahend`, rounded once.
  CUTLASS_DEVICE float max_exponent_less(float subtrahend, int row) const {
    return fmaf(row_max[row], exponents.softmax_scale_log2, -subtrahend);
  }

 protected:
  // What update_max() and raise_offset() do with the maximum.
  CUTLASS_DEVICE void take_max() {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      row_max[row] = quad_max(row_max[row]);
      take_offset(row);
    }
  }
  CUTLASS_DEVICE bool take_max_if_above() {
    if (!__any_sync(~0u, any_is_above())) return false;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      row_max[row] = quad_max(row_max[row]);
      rescale[row] = 1.f;
      if (is_above(row)) take_offset(row);  // no other: sum_of_rounded() needs its largest weight
    }
    return true;
  }

  template <int kPart, int kParts, class Scores>
  CUTLASS_DEVICE void exponentiate_less(float const (&offset)[kRowsPerThread], Scores& scores) {
    constexpr int kSize = decltype(size(scores))::value;
    CUTLASS_PRAGMA_UNROLL
    for (int i = kSize / kParts * kPart; i < kSize / kParts * (kPart + 1); ++i) {
      int const row = fragment_row(i);
      scores(i) = exp2f(scores(i) * factor[row] - offset[row]);
      row_sum[row] += scores(i);
    }
  }

  // row_max of this thread's columns.
  template <bool kThreeAtOnce, class Scores>
  CUTLASS_DEVICE void raise_max(Scores const& scores) {
    if constexpr (kThreeAtOnce) {
      raise_max_by_bits(scores);
      if (__any_sync(~0u, is_doubtful())) raise_max_by_value(scores);
    } else {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(scores); ++i) {
        row_max[fragment_row(i)] = fmaxf(row_max[fragment_row(i)], scores(i));
      }
    }
  }

 private:
  // By an instruction for three integers. Of fp32 numbers read as integers the greatest is the
  // right one if any is 0 or more: just two negative ones are in the wrong order. So a maximum that
  // is negative still is in doubt, which is rare.
  template <class Scores>
  CUTLASS_DEVICE void raise_max_by_bits(Scores const& scores) {
    raise_max_to(max_of_rows(scores, [](float a, float b, float c) {
      int const bits = __vimax3_s32(__float_as_int(a), __float_as_int(b), __float_as_int(c));
      return __int_as_float(bits);
    }));
  }
  CUTLASS_DEVICE bool is_doubtful() const { return fminf(row_max[0], row_max[1]) < 0.f; }
  template <class Scores>
  CUTLASS_DEVICE void raise_max_by_value(Scores const& scores) {
    raise_max_to(
        max_of_rows(scores, [](float a, float b, float c) { return fmaxf(fmaxf(a, b), c); }));
  }
  CUTLASS_DEVICE void raise_max_to(float2 largest) {
    row_max[0] = fmaxf(row_max[0], largest.x);
    row_max[1] = fmaxf(row_max[1], largest.y);
  }

  template <class Scores, class MaxOfThree>
  CUTLASS_DEVICE static float2 max_of_rows(Scores const& scores, MaxOfThree max_of_three) {
    constexpr int kSize = decltype(size(scores))::value / kRowsPerThread;
    float largest[kRowsPerThread];
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      // Two chains, so that one instruction need not wait for the one before it.
      auto const score = [&](int i) { return scores(i / 2 * 4 + i % 2 + 2 * row); };
      float chains[2] = {score(0), score(1)};
      CUTLASS_PRAGMA_UNROLL
      for (int i = 2; i < kSize; i += 2) {
        chains[i / 2 % 2] = max_of_three(chains[i / 2 % 2], score(i), score(i + 1));
      }
      largest[row] = fmaxf(chains[0], chains[1]);
    }
    return {largest[0], largest[1]};
  }

  // A weight may be up to 2^kSlack: below fp16's largest number, and fp32 has as many digits there.
  // Less than 2^4 times 4, by which huge scores of two keys differ.
  static constexpr float kSlack = 8.f;

  // The exponent of the largest weight.
  CUTLASS_DEVICE float excess(int row) const {
    return fmaf(row_max[row], factor[row], -offset[row]);
  }
  CUTLASS_DEVICE bool is_above(int row) const { return excess(row) > kSlack; }
  CUTLASS_DEVICE bool any_is_above() const { return fmaxf(excess(0), excess(1)) > kSlack; }

  // Makes the exponents of a row relative to its maximum.
  CUTLASS_DEVICE void take_offset(int row) {
    float const previous = offset[row];
    // Both products, then the choice: the exponentials wait for this.
    float const by_scale = __fmul_rn(row_max[row], exponents.softmax_scale_log2);
    float const by_power = __fmul_rn(row_max[row], exponents.power_of_2);
    offset[row] = is_huge(row) ? by_power : by_scale;
    // If the factor is another than before, the new offset is so much greater that this is 0.
    rescale[row] = exp2f(previous - offset[row]);
    row_sum[row] *= rescale[row];
    // Kept: with the choice made again for the exponentials, head dim 128 is 2 % slower.
    factor[row] = is_huge(row) ? exponents.power_of_2 : exponents.softmax_scale_log2;
  }

  CUTLASS_DEVICE bool is_huge(int row) const { return fabsf(row_max[row]) >= exponents.huge; }
};

}  // namespace jax_fa3
