// The entry points of the FP8 forward kernels, one per head dim, each defined in a file that
// cmake/Selection.cmake writes.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>

#include "problem.h"

namespace jax_fa3::fp8 {

// Rows of one head that share a scale: x = scale * (e4m3 element).
inline constexpr int kBlock = 128;

// Others make NaN of the rows that use them.
JAX_FA3_HOST_DEVICE bool is_scale(float x) { return x > 0.f && x < INFINITY; }

struct Problem {
  jax_fa3::Problem forward;  // query, key and value are e4m3, out_dtype bf16, fp16 or fp32
  float const* query_scale;  // [b, ceil(t / kBlock), n]
  float const* key_scale;    // [b, ceil(s / kBlock), k]
  float const* value_scale;  // [b, ceil(s / kBlock), k]
  // Workspace: V with keys along its rows (transpose.h), bytes [b, k, v, ceil(s / kBlock) *
  // kBlock], and counters, [2 + b * k * ceil(s / kBlock)], of which the first is
  // forward.tile_counter.
  uint8_t* transposed_value;
  int* counters;
};

template <int kHeadDim>
cudaError_t launch(Problem const& problem, cudaStream_t stream);

}  // namespace jax_fa3::fp8
