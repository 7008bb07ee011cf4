// ALiBi (Press et al., arXiv 2108.12409): slope * (key - query row) is added to the scores, from
// positions alone. Scores here are q.k, as they stand in the accumulators, so slopes are divided by
// softmax_scale.
#pragma once

#include "common/softmax.h"
#include "problem.h"

namespace jax_fa3 {

struct Alibi {
  PerHead slopes;
  float inverse_scale;

  CUTLASS_DEVICE float slope(int batch, int head) const {
    return slopes(batch, head) * inverse_scale;
  }
};

inline Alibi make_alibi(Problem const& problem) {
  return {problem.heads.alibi_slopes, 1.f / problem.softmax_scale};
}

// The forward's: scores of a block lack the term of the block's place, which is the same for all of
// a thread's columns. It is added to their maximum, and to what exponents are relative to, so that
// the term costs one FFMA a score: slope times a column that the instruction holds.
struct AlibiSoftmax : Softmax {
  float slope;
  float shift[kRowsPerThread];  // what this block's scores lack
  float place[kRowsPerThread];  // `offset`, of such scores
  int first_row;                // the first of the thread's

  // `column`: the key of the thread's column 0.
  template <class Scores>
  CUTLASS_DEVICE void add_slope(int column, Scores& scores) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(scores); ++i) {
      scores(i) = fmaf(slope, static_cast<float>(fragment_column(i)), scores(i));
    }
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      shift[row] = slope * static_cast<float>(column - first_row - row * 8);
    }
  }

  template <bool kThreeAtOnce = false, class Scores>
  CUTLASS_DEVICE void update_max(Scores const& scores) {
    raise_shifted_max<kThreeAtOnce>(scores);
    take_max();
    find_place();
  }

  template <class Scores>
  CUTLASS_DEVICE bool raise_offset(Scores const& scores) {
    raise_shifted_max<true>(scores);
    bool const raised = take_max_if_above();
    find_place();
    return raised;
  }

  template <int kPart, int kParts, class Scores>
  CUTLASS_DEVICE void exponentiate(Scores& scores) {
    exponentiate_less<kPart, kParts>(place, scores);
  }

 private:
  template <bool kThreeAtOnce, class Scores>
  CUTLASS_DEVICE void raise_shifted_max(Scores const& scores) {
    float const before[kRowsPerThread] = {row_max[0], row_max[1]};
    row_max[0] = row_max[1] = -INFINITY;
    raise_max<kThreeAtOnce>(scores);
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      row_max[row] = fmaxf(before[row], row_max[row] + shift[row]);
    }
  }

  CUTLASS_DEVICE void find_place() {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      place[row] = fmaf(-shift[row], factor[row], offset[row]);
    }
  }
};

// The backward's, of scores [keys, query rows]: `distance` is that of the thread's first key from
// its first query row. Elements on a diagonal have one term, which is found once.
template <class Scores>
CUTLASS_DEVICE void add_slope_transposed(float slope, int distance, Scores& scores) {
  float const first = slope * static_cast<float>(distance);
  float before[2] = {fmaf(slope, 8.f, first), fmaf(slope, 7.f, first)};
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(scores); i += 4) {
    CUTLASS_PRAGMA_UNROLL
    for (int e = 0; e < 2; ++e) {
      float const term = fmaf(slope, static_cast<float>(-fragment_column(i + e)), first);
      scores(i + e) += term;
      scores(i + 2 + e) += before[e];
      before[e] = term;
    }
  }
}

// The sum of the elements, which are packed in pairs, each times its distance.
template <class Element, class Packed>
CUTLASS_DEVICE float sum_of_distances(int distance, Packed const& ds) {
  float const first = static_cast<float>(distance);
  float sums[2] = {0.f, 0.f};
  float before[2] = {first + 8.f, first + 7.f};
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(ds); i += 2) {
    CUTLASS_PRAGMA_UNROLL
    for (int e = 0; e < 2; ++e) {
      float const own = first - static_cast<float>(fragment_column(2 * i + e));
      sums[e] = fmaf(unpack<Element>(ds(i), e), own, sums[e]);
      sums[e] = fmaf(unpack<Element>(ds(i + 1), e), before[e], sums[e]);
      before[e] = own;
    }
  }
  return sums[0] + sums[1];
}

}  // namespace jax_fa3
