// What an FP8 forward computes, and the entry points of its kernels: one per head dim, each defined
// in a file that cmake/Selection.cmake writes.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>

#include "problem.h"

namespace jax_fa3::fp8 {

// A scale is shared by so many consecutive rows of one head: x = scale * (e4m3 element).
inline constexpr int kBlock = 128;

// A scale must be positive and finite. Query rows that see a block with any other scale become NaN.
JAX_FA3_HOST_DEVICE bool is_scale(float x) { return x > 0.f && x < INFINITY; }

struct Problem {
  jax_fa3::Problem forward;  // query, key and value are e4m3, out_dtype bf16, fp16 or fp32
  float const* query_scale;  // [b, ceil(t / kBlock), n]
  float const* key_scale;    // [b, ceil(s / kBlock), k]
  float const* value_scale;  // [b, ceil(s / kBlock), k]
  float const* value_mean;   // [b, k, v]: what was subtracted from each row of V, or null
  // V^T (transpose.h), e4m3: [b, k, v, ceil(s / kBlock) * kBlock]. Workspace, unless V came so:
  // then forward.value is none.
  uint8_t* transposed_value;
  // [2 + b * k * ceil(s / kBlock)]: forward.tile_counter, then Transpose's warp_tile_counter, then
  // its num_done of every block of keys.
  int* counters;
};

template <int kHeadDim>
cudaError_t launch_fwd(Problem const& problem, cudaStream_t stream);

}  // namespace jax_fa3::fp8
