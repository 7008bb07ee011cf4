// From S and its tangent to P and its tangent H, in the registers of a consumer thread.
#pragma once

#include "common/score.h"
#include "common/softmax.h"
#include "jvp/traits.h"

namespace jax_fa3::jvp {

// What is known of a thread's two rows.
//
// H is P times the score's tangent less `center`, any number that is the same for a whole row: that
// takes center * out from P dV + H V, and center from the sum of H. So chosen that tangents are
// near it, H is small where a common part of them, which moves no weight, would be large and
// rounded. What rounding is left is in `sum_of_rounded`, too: of a row with one large weight, whose
// out is that key's value, it cancels.
struct Rows {
  float lse[kRowsPerThread];      // in base 2; inf where the row sees nothing, so that P is 0
  float lse_low[kRowsPerThread];  // what it lost to its rounding
  float center[kRowsPerThread] = {0.f, 0.f};  // 0: not found yet
  float sum[kRowsPerThread] = {0.f, 0.f};     // of H, of this thread's columns only
  float sum_of_rounded[kRowsPerThread] = {0.f, 0.f};

  // P in place of the scores.
  template <class Scores>
  CUTLASS_DEVICE void probabilities(Params const& params, Scores& scores) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(scores); ++i) {
      int const row = fragment_row(i);
      scores(i) =
          exp2f((scores(i) * params.exponents.softmax_scale_log2 - lse[row]) - lse_low[row]);
    }
  }

  // H in place of the scores' tangents.
  template <class Scores>
  CUTLASS_DEVICE void weigh(Params const& params, Scores const& weights, Scores& tangents) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tangents); ++i) {
      int const row = fragment_row(i);
      tangents(i) = weights(i) * (tangents(i) * params.score_dot_scale - center[row]);
      sum[row] += tangents(i);
    }
  }

  // H as the second half of an A operand.
  template <class Element, class Packed>
  CUTLASS_DEVICE void add_rounded(Packed const& packed) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = size(packed) / 2; i < size(packed); ++i) {
      sum_of_rounded[fragment_row(2 * i)] +=
          unpack<Element>(packed(i), 0) + unpack<Element>(packed(i), 1);
    }
  }

  // The weighted mean of the tangents of the first block in which a row has any weight: what was
  // summed before with another center is next to nothing.
  template <class Scores>
  CUTLASS_DEVICE void find_center(Params const& params, Scores const& weights,
                                  Scores const& tangents) {
    float total[kRowsPerThread] = {0.f, 0.f};
    float weight[kRowsPerThread] = {0.f, 0.f};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tangents); ++i) {
      total[fragment_row(i)] += weights(i) * tangents(i);
      weight[fragment_row(i)] += weights(i);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      float const all = quad_sum(weight[row]);
      float const mean = quad_sum(total[row]) * params.score_dot_scale / all;
      bool const found = center[row] == 0.f && all > kLeast;
      // Never 0, or a later block would be taken for the first one.
      center[row] = found ? (mean == 0.f ? FLT_MIN : mean) : center[row];
    }
  }

 private:
  // Of so little weight the mean says nothing of a row.
  static constexpr float kLeast = 0x1p-20f;
};

// What the soft cap and the mask make of a block's scores and tangents. Those of what a row does
// not see may be NaN.
template <class Scores>
CUTLASS_DEVICE void cap_and_mask(Params const& params, Interval const (&intervals)[kRowsPerThread],
                                 int column, Scores& scores, Scores& tangents) {
  if (params.score.cap_scale != 0.f) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(scores); ++i) {
      scores(i) = params.score.cap(scores(i));
      tangents(i) *= Score::cap_grad(scores(i));
    }
  }
  mask_scores(scores, intervals, column);
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(scores); ++i) {
    tangents(i) = scores(i) == -INFINITY ? 0.f : tangents(i);
  }
}

}  // namespace jax_fa3::jvp
