// A bias by distance: of each head a table, of which the entry of (key - query row) is added to the
// scores. The caller has turned whatever it is of (buckets, a clipped distance) into one entry for
// each distance, so that there is nothing to clip here, and margins are there for what tiles hold
// beyond the arrays. Scores here are q.k, as they stand in the accumulators: the table's entries
// are divided by softmax_scale.
#pragma once

#include "common/fragment.h"
#include "problem.h"

namespace jax_fa3 {

struct RelativeBias {
  float const* table;  // [1 or b, n, 2, size]
  int64_t batch_stride;
  int size;
  int zero;  // the entry of distance 0

  // The entry of a distance, aligned with the next one.
  CUTLASS_DEVICE float2 const* of(int batch, int head, int distance) const {
    int const entry = zero + distance;
    int64_t const row = int64_t{head} * 2 + entry % 2;
    return reinterpret_cast<float2 const*>(table + batch * batch_stride + row * size +
                                           (entry - entry % 2));
  }
};

inline RelativeBias make_relative_bias(Problem const& p) {
  return {p.relative_bias, p.relative_bias_batch_stride,
          static_cast<int>(relative_bias_size(p.seqlen_q, p.seqlen_k)),
          p.seqlen_q + kRelativeMargin};
}

// The entries of a thread's elements of an accumulator with kColumns columns. Elements on a
// diagonal have the same, so it is half as many. kSign: 1 where rows are query rows, -1 where they
// are keys.
template <int kColumns, int kSign>
struct RelativeTerms {
  float2 terms[kColumns / 8 + 1];  // of the second row's first two columns; 8 columns on, and so on

  // `distance`: of the thread's first element.
  CUTLASS_DEVICE void load(RelativeBias const& bias, int batch, int head, int distance) {
    float2 const* const first = bias.of(batch, head, kSign == 1 ? distance : distance - 1);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i <= kColumns / 8; ++i) terms[i] = __ldg(first + kSign * (i - 1) * 4);
  }

  template <class Scores>
  CUTLASS_DEVICE void add(Scores& scores) const {
    static_assert(decltype(size(scores))::value == kColumns / 2);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(scores); ++i) {
      float2 const pair = terms[i / 4 + 1 - fragment_row(i)];
      scores(i) += (i % 2 == 0) == (kSign == 1) ? pair.x : pair.y;
    }
  }
};

}  // namespace jax_fa3
