// V as wgmma wants an 8-bit B operand: keys along its rows.
//
// P leaves the softmax as an accumulator, of which a thread holds columns 8 j + 2 c + {0, 1} of a
// row (c = lane % 4); as an A operand of 8-bit elements it must hold 4 c + {0, 1, 2, 3} and 16 more
// of each 32. No element has to move if V's keys are in the same order: within each 16, slot
// 4 c + q is key 8 (q / 2) + 2 c + q % 2.
#pragma once

#include <cuda_runtime_api.h>

#include "fp8/fp8.h"

namespace jax_fa3::fp8 {

struct Transpose {
  int batch, num_heads, head_dim;
  Operand value;                        // [b, s, k, v] of bytes
  uint8_t* out;                         // [b, k, v, num_blocks * kBlock]
  Mask mask;                            // for the lengths of the keys
  float const* scale;                   // [b, num_blocks, k]; a block without a scale becomes 0
  int num_blocks = 0, num_columns = 0;  // set by launch
};

cudaError_t launch(Transpose const& problem, cudaStream_t stream);

}  // namespace jax_fa3::fp8
