// New keys and values into a KV cache, where it is, with rotary embedding and quantization.
#pragma once

#include <cuda_runtime_api.h>

#include "decode/decode.h"

namespace jax_fa3 {

// Tables of rotary embedding: a row of cosines and of sines for each position from 0 on, of the
// angles by which pairs of dims are turned.
struct RotaryTables {
  void const* cos;  // [positions, pairs]; null: nothing is turned
  void const* sin;
  bool is_fp32;  // or of the rows' dtype
  int positions;
  int pairs;
  bool interleaved;  // a pair is two neighbours, and not i and i + pairs
};

// num_heads_q is query's, or 0. Rows that are not of 16 bits are copied as they are; others are
// divided by the scales of an e4m3 cache, where those have data.
struct AppendProblem : decode::CacheProblem {
  void const* key;      // [rows, k, h]
  void const* value;    // [rows, k, v]
  void const* query;    // [rows, n, h] or null
  void* rotated_query;  // [rows, n, h]
  RotaryTables tables;
  int const* positions;  // [rows], of the tables; null: the rows' own
};

#ifdef JAX_FA3_HAS_CUDA
cudaError_t launch_append(AppendProblem const& problem, cudaStream_t stream);
#else  // a build without kernels
inline cudaError_t launch_append(AppendProblem const&, cudaStream_t) {
  return cudaErrorNotSupported;
}
#endif

}  // namespace jax_fa3
