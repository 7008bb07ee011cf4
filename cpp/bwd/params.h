// What the backward kernels get: descriptors and scalars, by value, in constant memory.
#pragma once

#include <cuda.h>

#include "common/mask.h"
#include "common/row_set.h"
#include "common/score.h"
#include "common/tile_scheduler.h"
#include "plan.h"
#include "problem.h"

namespace jax_fa3::bwd {

// What is known of a block of query rows, whichever head.
struct alignas(16) QueryBlock {
  IntervalHull hull;  // of the rows that see a key
  RowSet blind;       // the others; what they hold must not reach any gradient
};
static_assert(sizeof(QueryBlock) == 4 * kQueryBlockInts);

// Numbers of a block of rows in row_stats: log-sum-exp in base 2, rounded (inf where the row sees
// nothing, so that P is 0), delta, what the log-sum-exp lost to rounding; then kCareful.
template <int kBlockM>
struct RowStats {
  static constexpr int kLse = 0, kDelta = kBlockM, kLseLow = 2 * kBlockM;
  static constexpr int kCareful = 3 * kBlockM;  // not 0: what was lost counts, in this block
  static constexpr int kSize = row_stats_of_block(kBlockM);
};

struct Params {
  CUtensorMap query;               // [b, t, n, h]
  CUtensorMap key;                 // [b, s, k, h]
  CUtensorMap value;               // [b, s, k, v]
  CUtensorMap dout;                // [b, t, n, v]
  CUtensorMap dquery;              // unused where the sum is left in dq_accum
  CUtensorMap dkey, dvalue;        // unused where dkv_fp32
  Operand out, dout_rows;          // read by preprocess, row by row; no out: delta is -dlse
  Operand value_rows;              // read by range.h
  Operand dkey_rows, dvalue_rows;  // the gradients, for who writes them by row
  bool dkv_fp32;
  // Sums of dK and dV over a part of their query rows, or null: then dK and dV are written at once.
  float* dkv_parts;          // [splits, b, s, k, h + v]
  int num_splits;            // CTAs that share the query rows of a block of keys
  bool continues_dq;         // dq_accum holds the sum of other calls
  bool finishes_dq;          // else it is left there
  float const* lse;          // [b, n, t]
  float const* lse_low;      // [b, n, t] or null
  float const* dlse;         // [b, n, t]
  float* row_stats;          // [b, n, m], RowStats
  int2* row_intervals;       // [b, m, block_m]
  QueryBlock* query_blocks;  // [b, m]
  uint32_t* ranges;          // [b, k], Range, or null (range.h)
  float* dq_accum;  // [b, n, m, block_m * kHeadDim], in the order of the accumulators; m and
                    // block_m of the main kernel where that is fused, else of dQ's own
  int* turns;       // [b, n, m] or null: dQ is summed in any order
  Mask mask;
  TileOrder order;     // of the main kernel: blocks of keys, KV heads times splits
  TileOrder dq_order;  // of dQ's own kernel: blocks of query rows, query heads
  int num_m_blocks;
  int batch;
  int num_heads_q, num_heads_k;
  int group;  // query heads of one key/value head
  int head_dim, head_dim_v;
  float softmax_scale_log2;  // of what `score` gives
  Score score;
  float softmax_scale;  // of dQ and dK

  CUTLASS_HOST_DEVICE int64_t m_block_index(int batch, int head, int m_block) const {
    return (int64_t{batch} * num_heads_q + head) * num_m_blocks + m_block;
  }
};

}  // namespace jax_fa3::bwd
