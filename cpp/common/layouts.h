// Tiles in shared memory as wgmma reads them: rows of a [rows, columns] operand in swizzled slabs
// of 64 columns (128 bytes), or of 32 where 64 does not divide the width.
#pragma once

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

namespace jax_fa3 {

constexpr int slab(int columns) { return columns % 64 == 0 ? 64 : 32; }

// The columns of a tile as it lies in memory: whole slabs. A GEMM over 80 columns just leaves out
// what is beyond them.
constexpr int in_slabs(int columns, int width) { return (columns + width - 1) / width * width; }
constexpr int in_slabs(int columns) { return in_slabs(columns, slab(columns)); }

// Which vector of 16 bytes of a tile of kRows rows of 16-bit elements is the one that has elements
// 8 vector, ... of a row: slabs follow one another, and a row's vectors are permuted by its index,
// over 8 rows of 128 bytes, or over 4 pairs of rows of 64 bytes.
template <int kRows, int kSlab>
CUTE_HOST_DEVICE constexpr int swizzled_vector(int row, int vector) {
  constexpr int kVectors = kSlab / 8;
  int const swizzle = kSlab == 64 ? row % 8 : row / 2 % 4;
  return vector / kVectors * (kRows * kVectors) + row * kVectors + (vector % kVectors ^ swizzle);
}

namespace detail {

using namespace cute;

template <int kSlab>
using AtomK = std::conditional_t<kSlab == 64, GMMA::Layout_K_SW128_Atom<uint16_t>,
                                 GMMA::Layout_K_SW64_Atom<uint16_t>>;
template <int kSlab>
using AtomMN = std::conditional_t<kSlab == 64, GMMA::Layout_MN_SW128_Atom<uint16_t>,
                                  GMMA::Layout_MN_SW64_Atom<uint16_t>>;

}  // namespace detail

// [rows, columns, stages] of 8-bit elements, in slabs of 128 columns or of 64.
constexpr int slab8(int columns) { return columns % 128 == 0 ? 128 : 64; }

template <int kRows, int kColumns, int kStages>
using LayoutRows8 = decltype(cute::tile_to_shape(
    std::conditional_t<slab8(kColumns) == 128, cute::GMMA::Layout_K_SW128_Atom<uint8_t>,
                       cute::GMMA::Layout_K_SW64_Atom<uint8_t>>{},
    cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, cute::Int<kStages>>{}));

// [rows, columns, stages] of 16-bit elements.
template <int kRows, int kColumns, int kStages, int kSlab = slab(kColumns)>
using LayoutRows = decltype(cute::tile_to_shape(
    detail::AtomK<kSlab>{},
    cute::Shape<cute::Int<kRows>, cute::Int<in_slabs(kColumns, kSlab)>, cute::Int<kStages>>{}));

// The same memory as [columns, rows, stages].
template <int kRows, int kColumns, int kStages, int kSlab = slab(kColumns)>
using LayoutColumns = decltype(cute::tile_to_shape(
    detail::AtomMN<kSlab>{},
    cute::Shape<cute::Int<in_slabs(kColumns, kSlab)>, cute::Int<kRows>, cute::Int<kStages>>{},
    cute::Step<cute::_2, cute::_1, cute::_3>{}));

}  // namespace jax_fa3
