// Online softmax of FP8: every block of keys has a scale of its own, and P is converted to e4m3.
#pragma once

#include "common/fragment.h"

namespace jax_fa3::fp8 {

// P = 2^(exponent - maximum + kMaxOffset): the largest P of a row is 256, not 1. e4m3 ends at 448
// and at 2^-9, so probabilities down to 2^-17 of the largest are more than 0.
inline constexpr float kMaxOffset = 8.f;

// A row's running maximum is raised only if a block exceeds it by more than this. In most blocks no
// row's is, and O is not rescaled. P is then up to 2^(kMaxOffset + kRescaleThreshold), still below
// 448, the greatest e4m3 number.
inline constexpr float kRescaleThreshold = 0.75f;

// O is summed in units of this, 2^kMaxOffset: so its sums overflow no sooner than those of values
// with weights up to 1.
inline constexpr float kOutScale = 256.f;

// 4 fp32 values as neighbouring e4m3 elements; NaN stays NaN.
CUTLASS_DEVICE uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint32_t result;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n"
      "}"
      : "=r"(result)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return result;
}

// As fmaxf, but the maximum of a NaN and anything is NaN.
CUTLASS_DEVICE float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

struct Softmax {
  // The exponent (of base 2) of a score is softmax_scale_log2 * score. This is the greatest so far,
  // up to kRescaleThreshold. At first it is finite, for -inf - -inf would be NaN.
  float row_max[kRowsPerThread] = {-1e30f, -1e30f};
  float row_sum[kRowsPerThread] = {0.f, 0.f};  // of P, over this thread's columns only
  // O so far is multiplied by it: 2^(old - new maximum).
  float rescale[kRowsPerThread] = {1.f, 1.f};

  // The epilogue asks every softmax for these three; for the 16-bit one's rounded offsets two are
  // more (common/softmax.h). O was summed in units of this.
  static constexpr float out_scale = kOutScale;
  CUTLASS_DEVICE float log_sum(int row) const { return logf(row_sum[row]); }
  template <class Element>
  CUTLASS_DEVICE float sum_of_rounded(int row) const {
    return row_sum[row];
  }

  // Raises the running maximum by one block's scores.
  //
  // VIMNMX3 takes the maximum of three integers in one instruction. Of fp32 numbers read as
  // integers it is the right one if any of them is 0 or more: just two negative ones are in the
  // wrong order. So a row maximum of at least 0 is right. In the rare other case it is taken again
  // by float instructions. A NaN wins either way: the hardware makes NaN without a sign bit, which
  // is greater than every number as an integer, too.
  template <class Scores>
  CUTLASS_DEVICE void update_max(Scores const& scores, float softmax_scale_log2) {
    float const previous[kRowsPerThread] = {row_max[0], row_max[1]};
    raise_max(scores, softmax_scale_log2, [](float a, float b, float c) {
      return __int_as_float(__vimax3_s32(__float_as_int(a), __float_as_int(b), __float_as_int(c)));
    });
    if (__any_sync(~0u, fminf(row_max[0], row_max[1]) < 0.f)) {
      row_max[0] = previous[0];
      row_max[1] = previous[1];
      raise_max(scores, softmax_scale_log2,
                [](float a, float b, float c) { return max_or_nan(max_or_nan(a, b), c); });
    }
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      if (row_max[row] <= previous[row] + kRescaleThreshold) row_max[row] = previous[row];
      rescale[row] = exp2f(previous[row] - row_max[row]);
      row_sum[row] *= rescale[row];
    }
  }

  // Replaces the scores by P, before its conversion to e4m3; kSums: and adds it to row_sum.
  template <bool kSums, class Scores>
  CUTLASS_DEVICE void exponentiate(Scores& scores, float softmax_scale_log2) {
    float const offsets[kRowsPerThread] = {kMaxOffset - row_max[0], kMaxOffset - row_max[1]};
    float block_sum[kRowsPerThread] = {0.f, 0.f};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(scores); ++i) {
      scores(i) = exp2f(scores(i) * softmax_scale_log2 + offsets[fragment_row(i)]);
      if constexpr (kSums) block_sum[fragment_row(i)] += scores(i);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; kSums && row < kRowsPerThread; ++row) row_sum[row] += block_sum[row];
  }

 private:
  // The running maximum of each row and of its scores, over all four threads that share it.
  template <class Scores, class MaxOfThree>
  CUTLASS_DEVICE void raise_max(Scores const& scores, float softmax_scale_log2,
                                MaxOfThree max_of_three) {
    // Independent maxima of a row, so that one instruction need not wait for the one before it.
    constexpr int kChains = 4;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      auto const score = [&](int i) { return scores(i / 2 * 4 + i % 2 + 2 * row); };
      constexpr int kSize = decltype(size(scores))::value / kRowsPerThread;
      float chains[kChains];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kChains; ++i) chains[i] = score(i);
      CUTLASS_PRAGMA_UNROLL
      for (int i = kChains; i < kSize; i += 2) {
        float& chain = chains[i / 2 % kChains];
        chain = max_of_three(chain, score(i), score(i + 1));
      }
      float largest = max_or_nan(max_of_three(chains[0], chains[1], chains[2]), chains[3]);
      largest = max_or_nan(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = max_or_nan(largest, __shfl_xor_sync(~0u, largest, 2));
      row_max[row] = max_or_nan(row_max[row], largest * softmax_scale_log2);
    }
  }
};

}  // namespace jax_fa3::fp8
