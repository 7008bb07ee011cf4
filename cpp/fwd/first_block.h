// The softmax of a tile's first block of keys, with which nothing else can overlap: by parts of its
// columns, of which a warp passes over those that none of its 16 rows sees, and masks only those
// that not all of them see.
#pragma once

#include "common/softmax.h"

namespace jax_fa3::fwd {

struct SoftmaxByParts : Softmax {
  using Softmax::take_max;  // after raise_max_by() of all parts

  // All scores from now on are less by that than they were, those before, too.
  CUTLASS_DEVICE void count_from(float less) {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      row_max[row] -= less;
      offset[row] -= less * factor[row];
    }
  }

  template <class Scores>
  CUTLASS_DEVICE void raise_max_by(Scores const& scores) {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(scores); ++i) {
      row_max[fragment_row(i)] = fmaxf(row_max[fragment_row(i)], scores(i));
    }
  }
};

template <int kBlockN>
struct FirstBlock {
  static constexpr int kColumns = kBlockN % 32 == 0 ? 32 : 16;  // of a part
  static constexpr int kParts = kBlockN / kColumns;
  static_assert(kParts * kColumns == kBlockN);

  IntervalHull hull;  // of the warp's rows that see a key

  CUTLASS_DEVICE explicit FirstBlock(Interval const (&rows)[kRowsPerThread]) {
    for (Interval const& row : rows) hull.add(row);
    hull.reduce_warp();
  }

  // Scores to weights, which are 0 where nobody sees them; `first` is the block's first key. `then`
  // is called amid it.
  template <class Softmax, class Scores, class Then>
  CUTLASS_DEVICE void exponentiate(Interval const (&rows)[kRowsPerThread], int first,
                                   Softmax& softmax, Scores& scores, Then const& then) const {
    auto const is_seen = [&](int begin) {
      return begin < hull.max_end && begin + kColumns > hull.min_begin;
    };
    auto const is_full = [&](int begin) {
      return begin >= hull.max_begin && begin + kColumns <= hull.min_end;
    };
    constexpr auto kAll = cute::make_int_sequence<kParts>{};
    constexpr int kSize = decltype(size(scores))::value / kParts;
    auto const of_part = [&](auto part) {
      return cute::make_tensor(scores.data() + part * cute::Int<kSize>{}, cute::Int<kSize>{});
    };
    cute::for_each(kAll, [&](auto part) {
      int const begin = first + part * kColumns;
      if (!is_seen(begin)) return;
      auto own = of_part(part);
      if (!is_full(begin)) mask_scores(own, rows, begin + threadIdx.x % 4 * 2);
      softmax.raise_max_by(own);
    });
    softmax.take_max();
    then();
    cute::for_each(kAll, [&](auto part) {
      auto own = of_part(part);
      if (is_seen(first + part * kColumns)) {
        softmax.template exponentiate<0, 1>(own);
      } else {
        cute::clear(own);
      }
    });
  }
};

}  // namespace jax_fa3::fwd
