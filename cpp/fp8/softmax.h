// Online softmax of FP8: every block of keys has scales of its own, and P is converted to e4m3.
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

// The accumulator of O has a scale, that of some block of V. A later block with another scale does
// not change it while the two differ by at most this in log2: P is multiplied by their quotient
// instead, and O is not rescaled. (A higher bound costs precision: the maximum is that of
// P times the quotient, so a block of large scale but small values lowers all other P for nothing.)
inline constexpr float kOutScaleRange = 1.f;

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
  // The exponent (of base 2) of a score is softmax_scale_log2 * score + log2_value: the second term
  // is V's scale, relative to out_scale (BlockScale). This is the greatest exponent so far, each
  // relative to out_scale as it was then. At first it is finite, for -inf - -inf would be NaN.
  float row_max[kRowsPerThread] = {-1e30f, -1e30f};
  // Of probabilities, in which V's scale has no part, over this thread's columns only.
  float row_sum[kRowsPerThread] = {0.f, 0.f};
  // O so far is multiplied by it: 2^(old - new maximum).
  float rescale[kRowsPerThread] = {1.f, 1.f};
  float block_sum[kRowsPerThread];  // of P of this block, over this thread's columns only
  float out_scale;                  // the accumulator's scale: O is the accumulator times this

  // The epilogue asks every softmax for these two; for the 16-bit one's rounded offsets they are
  // more (common/softmax.h).
  CUTLASS_DEVICE float log_sum(int row) const { return logf(row_sum[row]); }
  template <class Element>
  CUTLASS_DEVICE float sum_of_rounded(int row) const {
    return row_sum[row];
  }

  // Raises the running maximum by one block's scores, whose exponents are softmax_scale_log2 *
  // score
  // + log2_value.
  //
  // VIMNMX3 takes the maximum of three integers in one instruction. Of fp32 numbers read as
  // integers it is the right one if any of them is 0 or more: just two negative ones are in the
  // wrong order. So a row maximum of at least log2_value, the exponent of a score of 0, is right.
  // In the rare other case it is taken again by float instructions. A NaN wins either way: the
  // hardware makes NaN without a sign bit, which is greater than every number as an integer, too.
  template <class Scores>
  CUTLASS_DEVICE void update_max(Scores const& scores, float softmax_scale_log2, float log2_value) {
    float const previous[kRowsPerThread] = {row_max[0], row_max[1]};
    raise_max(scores, softmax_scale_log2, log2_value, [](float a, float b, float c) {
      return __int_as_float(__vimax3_s32(__float_as_int(a), __float_as_int(b), __float_as_int(c)));
    });
    if (__any_sync(~0u, fminf(row_max[0], row_max[1]) < log2_value)) {
      row_max[0] = previous[0];
      row_max[1] = previous[1];
      raise_max(scores, softmax_scale_log2, log2_value,
                [](float a, float b, float c) { return max_or_nan(max_or_nan(a, b), c); });
    }
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      if (row_max[row] <= previous[row] + kRescaleThreshold) row_max[row] = previous[row];
      rescale[row] = exp2f(previous[row] - row_max[row]);
      row_sum[row] *= rescale[row];
    }
  }

  // Replaces part kPart of kParts equal parts of the scores by P, before its conversion to e4m3.
  // The parts must be taken in order: the last one adds the block's sum to row_sum, without V's
  // scale.
  template <int kPart, int kParts, class Scores>
  CUTLASS_DEVICE void exponentiate(Scores& scores, float softmax_scale_log2, float log2_value) {
    float const offset = log2_value + kMaxOffset;
    float const offsets[kRowsPerThread] = {offset - row_max[0], offset - row_max[1]};
    constexpr int kSize = decltype(size(scores))::value;
    if constexpr (kPart == 0) block_sum[0] = block_sum[1] = 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int i = kSize / kParts * kPart; i < kSize / kParts * (kPart + 1); ++i) {
      scores(i) = exp2f(scores(i) * softmax_scale_log2 + offsets[fragment_row(i)]);
      block_sum[fragment_row(i)] += scores(i);
    }
    if constexpr (kPart == kParts - 1) {
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kRowsPerThread; ++row) {
        row_sum[row] += block_sum[row] * exp2f(-log2_value);
      }
    }
  }

 private:
  // The running maximum of each row and of its scores, over all four threads that share it.
  template <class Scores, class MaxOfThree>
  CUTLASS_DEVICE void raise_max(Scores const& scores, float softmax_scale_log2, float log2_value,
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
      row_max[row] = max_or_nan(row_max[row], largest * softmax_scale_log2 + log2_value);
    }
  }
};

}  // namespace jax_fa3::fp8
