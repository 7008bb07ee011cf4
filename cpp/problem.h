// What one call computes. Plain data: no CUTLASS, no XLA (twin of jax_fa3/_problem.py).
#pragma once

#include <cstdint>

#include "common/mask.h"

namespace jax_fa3 {

enum class DType { kBFloat16, kFloat16, kFloat32 };

// A [batch, seqlen, heads, head_dim] operand; strides in elements, the head dim is contiguous.
struct Operand {
  void* data;
  int64_t batch_stride;
  int64_t seqlen_stride;
  int64_t head_stride;
};

struct Problem {
  int batch;
  int seqlen_q;
  int seqlen_k;
  int num_heads_q;
  int num_heads_k;  // divides num_heads_q; query head n reads key/value head n / (q / k)
  int head_dim;     // of query and key
  int head_dim_v;   // of value and out
  DType dtype;      // of query, key and value
  DType out_dtype;  // dtype, or kFloat32 for partial results that are summed elsewhere

  float softmax_scale;  // > 0
  float soft_cap;       // s <- soft_cap * tanh(s / soft_cap) after scaling; 0: none

  Operand query;  // [b, t, n, h]
  Operand key;    // [b, s, k, h]
  Operand value;  // [b, s, k, v]
  Operand out;    // [b, t, n, v]
  float* lse;     // [b, n, t], natural logarithm
  Mask mask;

  int* tile_counter;  // [1], workspace
};

}  // namespace jax_fa3
