// What one call computes. Plain data: no CUTLASS, no XLA (twin of jax_fa3/_problem.py).
#pragma once

#include <cstdint>

#include "common/mask.h"

namespace jax_fa3 {

enum class DType { kBFloat16, kFloat16, kFloat32, kFloat8E4M3 };

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
  DType out_dtype;  // dtype, or kFloat32 for partial results that are summed elsewhere; any but
                    // kFloat8E4M3 where that is dtype

  float softmax_scale;  // > 0
  float soft_cap;       // s <- soft_cap * tanh(s / soft_cap) after scaling; 0: none

  Operand query;   // [b, t, n, h]
  Operand key;     // [b, s, k, h]
  Operand value;   // [b, s, k, v]
  Operand out;     // [b, t, n, v]
  float* lse;      // [b, n, t], natural logarithm
  float* lse_low;  // [b, n, t] or null: what lse lost to rounding, in base 2
  // [b, t, n, v] or null: the result for other keys, whose log-sum-exp is in lse. Out and lse
  // become those for all of these keys. Where out is fp32 it is the same array.
  float const* out_before;
  Mask mask;

  // Workspace: a counter, and for sums over more keys than plan.h's kMostKeysOfSum as many fp32
  // numbers as CTAs are to be launched, times long_sums_of_cta(); with none such sums drift.
  int* tile_counter;  // [1]
  float* long_sums;
  int64_t long_sums_size;
};

// The gradients of a Problem.
struct BackwardProblem {
  Problem forward;  // out, lse and lse_low are read here; out.data null: dlse has its part in it
                    // already
  Operand dout;     // [b, t, n, v]
  float* dlse;      // [b, n, t]; with no out it is dlse - rowsum(dout * out)
  // [b, t, n, h], of dtype. A sum over several calls, each with other keys, is kept in dq_accum:
  // calls with data null leave it there, calls that continue it find it there.
  Operand dquery;
  bool continues_dq;  // else dq_accum is cleared
  Operand dkey;       // [b, s, k, h], of dkv_dtype, like the other
  Operand dvalue;     // [b, s, k, v]
  DType dkv_dtype;    // dtype, or kFloat32 for partial results that are summed elsewhere
  // Workspace (plan.h), with m blocks of bwd_tile().block_m query rows each.
  float* row_stats;    // [b, n, m, row_stats_of_block()]
  int* row_intervals;  // [b, m, block_m, 2]: key_begin, key_end
  int* query_blocks;   // [b, m, kQueryBlockInts]
  int* ranges;         // [b, k, 3], where dtype is fp16: of dO, V and dlse
  // [num_splits, b, s, k, h + v]: num_splits CTAs share the query rows of a block of keys. Null
  // where one CTA sums over all of them, in one go.
  float* dkv_parts;
  int num_splits;
  // [b, n, m, block_m * head dim of the kernel], where the tile is fused; else, and only for a sum
  // over several calls, [b, n, blocks of kBwdQueryRows, kBwdQueryRows * head dim of the kernel].
  float* dq_accum;
  int* turns;  // [b, n, m], for gradients that are bit-equal from run to run, or null
};

}  // namespace jax_fa3
