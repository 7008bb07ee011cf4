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

struct AppendProblem {
  decode::Sequences sequences;
  int const* page_table;  // [b, pages_per_sequence]; null: page b is sequence b's only one
  int pages_per_sequence;
  int num_pages;
  int page_size;
  int num_heads_q;  // of query
  int num_heads_k;
  int head_dim;
  int head_dim_v;

  DType dtype;  // of the new rows; all but 16-bit ones are copied as they are
  bool e4m3_cache;
  void const* key;                       // [rows, k, h]
  void const* value;                     // [rows, k, v]
  Operand key_cache, value_cache;        // pages are the batch, slots the sequence
  decode::Scale key_scale, value_scale;  // by which numbers are divided; without data: by 1
  void const* query;                     // [rows, n, h] or null
  void* rotated_query;                   // [rows, n, h]
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
