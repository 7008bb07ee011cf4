// Operands read row by row, 16 bytes at a time.
#pragma once

#include "common/fragment.h"
#include "problem.h"

namespace jax_fa3::bwd {

// 16 bytes of each operand, multiplied, added to `sum`.
template <class Element>
CUTLASS_DEVICE float dot8(uint4 a, uint4 b, float sum) {
  uint32_t const x[] = {a.x, a.y, a.z, a.w};
  uint32_t const y[] = {b.x, b.y, b.z, b.w};
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < 4; ++i) {
    sum += unpack<Element>(x[i], 0) * unpack<Element>(y[i], 0);
    sum += unpack<Element>(x[i], 1) * unpack<Element>(y[i], 1);
  }
  return sum;
}

CUTLASS_DEVICE uint4 load_vector(Operand const& operand, int batch, int row, int head, int column) {
  auto const* const data = static_cast<uint16_t const*>(operand.data);
  return *reinterpret_cast<uint4 const*>(data + batch * operand.batch_stride +
                                         row * operand.seqlen_stride + head * operand.head_stride +
                                         column);
}

}  // namespace jax_fa3::bwd
