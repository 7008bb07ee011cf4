// Q in registers, as wgmma takes an operand A.
#pragma once

#include <cute/tensor.hpp>

#include "common/layouts.h"

namespace jax_fa3::fwd {

// The registers of Q as operand A of S, of a tile of kRows rows and kColumns columns.
template <class Element, int kRows, int kColumns, class Slice>
CUTLASS_DEVICE auto query_registers(Slice const& slice) {
  using namespace cute;
  return make_fragment_like<Element>(
      slice.partition_A(make_tensor<Element>(Shape<Int<kRows>, Int<kColumns>>{})));
}

// Loads them from shared memory, of the warpgroup's 64 rows from `first` on.
template <int kRows, int kSlab, class Registers>
CUTLASS_DEVICE void load_query(uint16_t const* smem, int first, Registers& query) {
  cute::Tensor registers = cute::recast<uint32_t>(query);
  int const row = first + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 16;
  int const half = threadIdx.x % 32 / 16;  // of a step's 16 columns
  uint32_t const begin = cute::cast_smem_ptr_to_uint(smem);
  CUTLASS_PRAGMA_UNROLL
  for (int k = 0; k < size(registers) / 4; ++k) {
    uint32_t const vector = swizzled_vector<kRows, kSlab>(row, 2 * k + half);
    asm volatile("ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers(4 * k)), "=r"(registers(4 * k + 1)), "=r"(registers(4 * k + 2)),
                   "=r"(registers(4 * k + 3))
                 : "r"(begin + 16 * vector)
                 : "memory");
  }
}

}  // namespace jax_fa3::fwd
