// What the backward kernels get: descriptors and scalars, by value, in constant memory.
#pragma once

#include <cuda.h>

#include "common/mask.h"
#include "common/tile_scheduler.h"
#include "problem.h"

namespace jax_fa3::bwd {

struct Params {
  CUtensorMap query;         // [b, t, n, h]
  CUtensorMap key;           // [b, s, k, h]
  CUtensorMap value;         // [b, s, k, v]
  CUtensorMap dout;          // [b, t, n, v]
  CUtensorMap dquery;        // unused where the sum is left in dq_accum
  CUtensorMap dkey, dvalue;  // unused where dkv_fp32
  Operand out, dout_rows;    // read by preprocess, row by row; no out: delta is -dlse
  Operand dkey_fp32, dvalue_fp32;
  bool dkv_fp32;
  bool continues_dq;    // dq_accum holds the sum of other calls
  bool finishes_dq;     // else it is left there
  float const* lse;     // [b, n, t]
  float const* dlse;    // [b, n, t]
  float* row_stats;     // [b, n, m, 2, block_m]
  int2* row_intervals;  // [b, m, block_m]
  int4* block_hulls;    // [b, m]
  float* dq_accum;      // [b, n, m, block_m * kHeadDim], in the order of the accumulators; m and
                        // block_m of the main kernel where that is fused, else of dQ's own
  int* turns;           // [b, n, m] or null: dQ is summed in any order
  Mask mask;
  TileOrder order;     // of the main kernel: blocks of keys, KV heads
  TileOrder dq_order;  // of dQ's own kernel: blocks of query rows, query heads
  int num_m_blocks;
  int num_heads_q;
  int group;  // query heads of one key/value head
  int head_dim, head_dim_v;
  // Scores x = q.k become exponents: exponent_scale * x (base 2), or with a soft cap
  // exponent_scale * tanh(cap_scale * x).
  float exponent_scale;
  float cap_scale;      // 0: no soft cap
  float softmax_scale;  // of dQ and dK

  CUTLASS_HOST_DEVICE int64_t m_block_index(int batch, int head, int m_block) const {
    return (int64_t{batch} * num_heads_q + head) * num_m_blocks + m_block;
  }
};

}  // namespace jax_fa3::bwd
