// Online softmax where every block of scores has a scale of its own, and P will be e4m3.
#pragma once

#include "common/fragment.h"

namespace jax_fa3::fp8 {

// P = 2^(score - maximum + kShift): its 1 is 256, in the upper part of e4m3's range, so that small
// probabilities are not lost below it.
inline constexpr float kShift = 8.f;

// A row's maximum is raised where it is exceeded by more than this: mostly, then, no row's is, and
// O need not be rescaled. 2^(kShift + kSlack) is below 448, the greatest e4m3 number.
inline constexpr float kSlack = 0.75f;

// V's scales are taken into P, in a unit that changes where a block's scale is further from it than
// so many powers of 2. Then O need not be rescaled for every block; and a block of large scale
// whose numbers are small after all makes P of the others no smaller than 2^-2 of what it could be.
inline constexpr float kUnitRange = 1.f;

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
  // An exponent of base 2, of weights times V's scale, each in the unit that O had at its block.
  // Where no key has been seen it is finite: -inf - -inf would be NaN.
  float row_max[kRowsPerThread] = {-1e30f, -1e30f};
  float row_sum[kRowsPerThread] = {0.f, 0.f};  // of weights, of this thread's columns only
  float rescale[kRowsPerThread] = {1.f, 1.f};  // of what was accumulated before the last update
  float block_sum[kRowsPerThread];             // of P, of the block at hand, as above
  float out_scale;                             // what O counts in

  // As that of the 16-bit softmax.
  CUTLASS_DEVICE float log_sum(int row) const { return logf(row_sum[row]); }
  template <class Element>
  CUTLASS_DEVICE float sum_of_rounded(int row) const {
    return row_sum[row];
  }

  // Takes one more block's scores, each still to be multiplied by `scale` and added to `exponent`
  // (base 2), into the running maximum. As integers, three numbers are compared at once; their
  // order is that of the floats unless both are negative, so a maximum not below `exponent` is
  // right. A NaN, which the hardware makes without a sign, is the greatest.
  template <class Scores>
  CUTLASS_DEVICE void update_max(Scores const& scores, float scale, float exponent) {
    float const previous[kRowsPerThread] = {row_max[0], row_max[1]};
    raise_max(scores, scale, exponent, [](float a, float b, float c) {
      return __int_as_float(__vimax3_s32(__float_as_int(a), __float_as_int(b), __float_as_int(c)));
    });
    if (__any_sync(~0u, fminf(row_max[0], row_max[1]) < exponent)) {
      row_max[0] = previous[0];
      row_max[1] = previous[1];
      raise_max(scores, scale, exponent,
                [](float a, float b, float c) { return max_or_nan(max_or_nan(a, b), c); });
    }
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      if (row_max[row] <= previous[row] + kSlack) row_max[row] = previous[row];
      rescale[row] = exp2f(previous[row] - row_max[row]);
      row_sum[row] *= rescale[row];
    }
  }

  // One of kParts equal parts of the scores becomes P, relative to the running maximum.
  template <int kPart, int kParts, class Scores>
  CUTLASS_DEVICE void exponentiate(Scores& scores, float scale, float exponent) {
    float const offset = exponent + kShift;
    float const offsets[kRowsPerThread] = {offset - row_max[0], offset - row_max[1]};
    constexpr int kSize = decltype(size(scores))::value;
    if constexpr (kPart == 0) block_sum[0] = block_sum[1] = 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int i = kSize / kParts * kPart; i < kSize / kParts * (kPart + 1); ++i) {
      scores(i) = exp2f(scores(i) * scale + offsets[fragment_row(i)]);
      block_sum[fragment_row(i)] += scores(i);
    }
    if constexpr (kPart == kParts - 1) {
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kRowsPerThread; ++row) {
        row_sum[row] += block_sum[row] * exp2f(-exponent);
      }
    }
  }

 private:
  template <class Scores, class MaxOfThree>
  CUTLASS_DEVICE void raise_max(Scores const& scores, float scale, float exponent,
                                MaxOfThree max_of_three) {
    constexpr int kChains = 4;  // of a row, side by side, for a maximum waits for the one before it
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
      row_max[row] = max_or_nan(row_max[row], largest * scale + exponent);
    }
  }
};

}  // namespace jax_fa3::fp8
