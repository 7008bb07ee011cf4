// ALiBi (Press et al., arXiv 2108.12409): slope * (key - query row) is added to the scores, from
// positions alone. It costs no instruction a score: it is one more step of 16 columns of the
// product that gives them. Scores here are q.k, as they stand in the accumulators, so slopes are
// divided by softmax_scale.
//
// Of an accumulator's row r and column c the term is `slope * (row - column)`, in the forward of
// the negative slope, for there rows are query rows. The operand of rows has r, r, r, 1, 1, 1 and
// the operand of columns the slope and the term of (first row, c), each in three numbers of bf16,
// which have all 24 bits of it. So the term is as exact as a product in fp32, in fp16, too.
#pragma once

#include "common/barriers.h"
#include "common/fragment.h"
#include "common/gemm.h"
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

// An operand in shared memory, of kRows rows of A or columns of B: not swizzled, vectors of 8
// elements behind each other. Of a row's 16 elements the second 8 are 0.
template <int kRows, int kStages>
using LayoutTerm =
    decltype(cute::tile_to_shape(cute::GMMA::Layout_K_INTER_Atom<uint16_t>{},
                                 cute::Shape<cute::Int<kRows>, cute::_16, cute::Int<kStages>>{}));
constexpr int term_size(int rows, int stages) { return rows * 16 * stages; }

namespace detail {

// A number as three of bf16, each the upper half of a word.
struct InThree {
  uint32_t high, middle, low;

  CUTLASS_DEVICE explicit InThree(float x) {
    high = __float_as_uint(x) & 0xffff0000u;
    float const rest = x - __uint_as_float(high);
    middle = __float_as_uint(rest) & 0xffff0000u;
    low = __float_as_uint(rest - __uint_as_float(middle));
  }
};

// The upper halves of two words.
CUTLASS_DEVICE uint32_t upper_halves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x7632);
}

}  // namespace detail

// The operand of rows, the same for all tiles, and the half of the other's that is 0; by a warp.
template <int kRows, int kColumns, int kStages>
CUTLASS_DEVICE void begin_alibi(uint16_t* rows, uint16_t* columns) {
  auto* const of_rows = reinterpret_cast<uint4*>(rows);
  auto* const of_columns = reinterpret_cast<uint4*>(columns);
  for (int row = threadIdx.x % 32; row < kRows; row += 32) {
    uint32_t const index = __float_as_uint(static_cast<float>(row)) >> 16;
    uint32_t const one = 0x3f80;
    of_rows[row] = {index | index << 16, index | one << 16, one | one << 16, 0};
    of_rows[kRows + row] = {0, 0, 0, 0};
  }
  for (int stage = 0; stage < kStages; ++stage) {
    for (int column = threadIdx.x % 32; column < kColumns; column += 32) {
      of_columns[(stage * 2 + 1) * kColumns + column] = {0, 0, 0, 0};
    }
  }
}

// The operand of columns; by a warp, which then tells those who issue its product. `distance`: of
// the accumulator's first row from its first column.
template <int kColumns>
CUTLASS_DEVICE void write_alibi(uint16_t* columns, float slope, int distance) {
  detail::InThree const of_slope(slope);
  CUTLASS_PRAGMA_UNROLL
  for (int column = threadIdx.x % 32; column < kColumns; column += 32) {
    detail::InThree const term(slope * static_cast<float>(distance - column));
    reinterpret_cast<uint4*>(columns)[column] = {
        detail::upper_halves(of_slope.high, of_slope.middle),
        detail::upper_halves(of_slope.low, term.high), detail::upper_halves(term.middle, term.low),
        0};
  }
  cutlass::arch::fence_view_async_shared();
  __syncwarp();
}

// The term's operands, and their product.
template <class Mma, class Rows, class Columns>
struct Term {
  Mma mma;
  Rows rows;
  Columns columns;
};
template <class Mma, class Rows, class Columns>
Term(Mma, Rows, Columns) -> Term<Mma, Rows, Columns>;

// issue_gemm_zero() of the scores, and of the term, as one group.
template <int kSteps, class Mma, class A, class B, class TermOf, class C>
CUTLASS_DEVICE void issue_scores_with_term(Mma mma, A const& a, B const& b, TermOf const& term,
                                           C& c) {
  using namespace cute;
  auto const of_a = recomputed(a);
  auto const of_b = recomputed(b);
  auto const rows = recomputed(term.rows);
  auto const columns = recomputed(term.columns);
  mma.accumulate_ = GMMA::ScaleOut::Zero;
  warpgroup_fence_operand(c);
  warpgroup_arrive();
  CUTLASS_PRAGMA_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    cute::gemm(mma, of_a(_, _, k), of_b(_, _, k), c);
    mma.accumulate_ = GMMA::ScaleOut::One;
  }
  cute::gemm(term.mma, rows(_, _, _0{}), columns(_, _, _0{}), c);
  warpgroup_commit_batch();
}

// Of the backward's dS, the sum of the elements, which are packed in pairs, each times its
// distance; `distance` is that of the thread's first key from its first query row.
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
