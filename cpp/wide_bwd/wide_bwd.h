// The entry points of the backward of heads wider than 256, one per (dtype, head dim, value head
// dim), each defined in a file that cmake/Selection.cmake writes.
#pragma once

#include <cuda_runtime_api.h>

#include "problem.h"

namespace jax_fa3::wide_bwd {

template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch(BackwardProblem const& problem, cudaStream_t stream);

}  // namespace jax_fa3::wide_bwd
