// What a tangent computes, and the entry points of its kernels: one per dtype and head dim, each
// defined in a file that cmake/Selection.cmake writes.
//
// A name with _dot is the tangent of what it names.
#pragma once

#include <cuda_runtime_api.h>

#include "problem.h"

namespace jax_fa3::jvp {

struct Problem {
  jax_fa3::Problem forward;  // out, lse and lse_low are read here, not written
  Operand query_dot;         // [b, t, n, h]
  Operand key_dot;           // [b, s, k, h]
  Operand value_dot;         // [b, s, k, v]
  Operand out_dot;           // [b, t, n, v]
  float* lse_dot;            // [b, n, t]
};

template <DType kDType, int kHeadDim>
cudaError_t launch(Problem const& problem, cudaStream_t stream);

}  // namespace jax_fa3::jvp
