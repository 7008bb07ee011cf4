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

  // The entry of all distances from `first` to `last`, if that is the same, and at most `most`; NaN
  // if not. By a warp.
  template <int kMostDistances>
  CUTLASS_DEVICE float same_of(int batch, int head, int first, int last, float most) const {
    float const* const entries = table + batch * batch_stride + int64_t{head} * 2 * size + zero;
    float const entry = __ldg(entries + first);
    bool same = fabsf(entry) <= most;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kMostDistances; i += 32) {
      int const distance = first + i + static_cast<int>(threadIdx.x % 32);
      same &= __ldg(entries + min(distance, last)) == entry;
    }
    return __all_sync(~0u, same) ? entry : NAN;
  }
};

inline RelativeBias make_relative_bias(Problem const& p) {
  return {p.relative_bias, p.relative_bias_batch_stride,
          static_cast<int>(relative_bias_size(p.seqlen_q, p.seqlen_k)),
          p.seqlen_q + kRelativeMargin};
}

// The entries of a thread's elements of an accumulator with kColumns columns. Elements on a
// diagonal have the same, so it is half as many. kSign: 1 where rows are query rows, -1 where they
// are keys. kAtOnce: so many are loaded by load(), each of the others by add(), in the place of one
// that it has added.
template <int kColumns, int kSign, int kAtOnce = kColumns / 8 + 1>
struct RelativeTerms {
  static constexpr int kCount = kColumns / 8 + 1;
  float2 terms[kCount];  // of the second row's first two columns; 8 columns on, and so on
  float2 const* first;

  // `distance`: of the thread's first element.
  CUTLASS_DEVICE void load(RelativeBias const& bias, int batch, int head, int distance) {
    first = bias.of(batch, head, kSign == 1 ? distance : distance - 1) - kSign * 4;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) terms[i] = entry(i);
  }

  template <class Scores>
  CUTLASS_DEVICE void add(Scores& scores) {
    static_assert(decltype(size(scores))::value == kColumns / 2);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(scores); ++i) {
      if (i % 4 == 0 && i / 4 + kAtOnce < kCount) terms[i / 4 + kAtOnce] = entry(i / 4 + kAtOnce);
      float2 const pair = terms[i / 4 + 1 - fragment_row(i)];
      scores(i) += (i % 2 == 0) == (kSign == 1) ? pair.x : pair.y;
    }
  }

 private:
  CUTLASS_DEVICE float2 entry(int i) const {
    float2 const* const place = first + kSign * i * 4;
    if constexpr (kAtOnce == kCount) return __ldg(place);
    float2 found;  // volatile: else all would be loaded at once
    asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(found.x), "=f"(found.y) : "l"(place));
    return found;
  }
};

}  // namespace jax_fa3
