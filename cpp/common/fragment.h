// What a thread holds of a wgmma accumulator, and the ways out of the registers.
//
// Accumulators of wgmma m64nN: a thread of lane l in warp w holds rows 16 w + l / 4 and that + 8,
// at columns 8 j + 2 (l % 4) + {0, 1}: element i has row (i / 2) % 2 and column 8 (i / 4) + i % 2.
#pragma once

#include <cutlass/numeric_conversion.h>

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/tensor.hpp>

#include "common/layouts.h"

namespace jax_fa3 {

inline constexpr int kRowsPerThread = 2;

CUTLASS_DEVICE constexpr int fragment_row(int i) { return (i / 2) % 2; }
CUTLASS_DEVICE constexpr int fragment_column(int i) { return i / 4 * 8 + i % 2; }

// Two fp32 values as neighbouring 16-bit elements of one register.
template <class Element>
CUTLASS_DEVICE uint32_t pack(float low, float high) {
  cutlass::Array<float, 2> const pair{low, high};
  auto const converted = cutlass::NumericArrayConverter<Element, float, 2>::convert(pair);
  return reinterpret_cast<uint32_t const&>(converted);
}

template <class Element>
CUTLASS_DEVICE float unpack(uint32_t pair, int half) {
  if constexpr (std::is_same_v<Element, cutlass::bfloat16_t>) {
    return __uint_as_float(half == 0 ? pair << 16 : pair & 0xffff0000u);
  } else {
    auto const halves = reinterpret_cast<cutlass::half_t const(&)[2]>(pair);
    return static_cast<float>(halves[half]);
  }
}

// A whole fragment, packed in pairs: the order in which wgmma wants a 16-bit A operand.
template <class Element, class Fragment>
CUTLASS_DEVICE auto packed(Fragment const& fragment) {
  auto result = cute::make_tensor<uint32_t>(cute::Int<decltype(size(fragment))::value / 2>{});
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(result); ++i) {
    result(i) = pack<Element>(fragment(2 * i), fragment(2 * i + 1));
  }
  return result;
}

// A warp's 16 rows of a tile, packed to 16 bits in pairs, to shared memory: slabs of kRows rows and
// kSlab columns, swizzled as TMA and wgmma have it. `smem` points at the tile's first slab,
// `first_row` is the warp's.
template <int kRows, int kColumns, int kSlab, class Packed>
CUTLASS_DEVICE void stage_packed(Packed const& packed, uint16_t* smem, int first_row,
                                 int first_column = 0) {
  int const lane = threadIdx.x % 32;
  int const row = first_row + lane % 16;
  // 16-byte vectors are permuted within a row by the row's index: over 8 rows of 128 bytes, over
  // 4 pairs of rows of 64 bytes.
  int const swizzle = kSlab == 64 ? row % 8 : row / 2 % 4;
  CUTLASS_PRAGMA_UNROLL
  for (int column = 0; column < kColumns; column += 16) {
    // Lanes 0-15 address the first 8 columns of 16 rows, lanes 16-31 the other 8.
    int const target_column = first_column + column;
    int const vector = target_column % kSlab / 8 + lane / 16;
    auto* const target = reinterpret_cast<cute::uint128_t*>(
        smem + target_column / kSlab * (kRows * kSlab) + row * kSlab + (vector ^ swizzle) * 8);
    int const i = column / 4;
    if constexpr (kColumns == 8) {  // just the addresses of lanes 0-15
      cute::SM90_U32x2_STSM_N::copy(packed(i), packed(i + 1), *target);
    } else {
      cute::SM90_U32x4_STSM_N::copy(packed(i), packed(i + 1), packed(i + 2), packed(i + 3),
                                    *target);
    }
  }
}

// Some columns of what stage_packed() has left there, back into registers.
template <int kRows, int kColumns, int kSlab, class Packed>
CUTLASS_DEVICE void load_packed(Packed& packed, uint16_t const* smem, int first_row,
                                int first_column = 0) {
  int const lane = threadIdx.x % 32;
  int const row = first_row + lane % 16;
  CUTLASS_PRAGMA_UNROLL
  for (int column = 0; column < kColumns; column += 16) {
    int const vector = (first_column + column) / 8 + lane / 16;
    auto const* const source = reinterpret_cast<cute::uint128_t const*>(
        smem + swizzled_vector<kRows, kSlab>(row, vector) * 8);
    int const i = column / 4;
    cute::SM75_U32x4_LDSM_N::copy(*source, packed(i), packed(i + 1), packed(i + 2), packed(i + 3));
  }
}

// A warp's 16 rows and kRows columns of an accumulator, packed, as rows of its columns: 16 columns
// of a tile of kRows rows, from `first_column` on.
template <int kRows, int kSlab, class Packed>
CUTLASS_DEVICE void stage_transposed(Packed const& packed, uint16_t* smem, int first_column) {
  int const lane = threadIdx.x % 32;
  // Lanes 0-7 address the first 8 columns of 8 rows, lanes 8-15 the other 8, then the next 8 rows.
  int const vector = first_column / 8 + lane / 8 % 2;
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRows; row += 16) {
    auto* const target = reinterpret_cast<cute::uint128_t*>(
        smem + swizzled_vector<kRows, kSlab>(row + lane / 16 * 8 + lane % 8, vector) * 8);
    int const i = row / 4;
    cute::SM90_U16x8_STSM_T::copy(packed(i), packed(i + 1), packed(i + 2), packed(i + 3), *target);
  }
}

// fp32, straight from registers to rows `row_stride` elements apart; `first_row` is the thread's
// first. `stored(i)`: whether its i-th row is to be stored.
template <class Fragment, class Stored>
CUTLASS_DEVICE void store_fp32(Fragment const& fragment, float* out, int64_t row_stride,
                               int first_row, Stored const& stored, int columns) {
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(fragment); i += 2) {
    int const row = first_row + fragment_row(i) * 8;
    int const column = fragment_column(i) + threadIdx.x % 4 * 2;
    if (stored(fragment_row(i)) && column < columns) {
      *reinterpret_cast<float2*>(out + row * row_stride + column) =
          float2{fragment(i), fragment(i + 1)};
    }
  }
}

}  // namespace jax_fa3
