// What the backward kernels get: descriptors and scalars, by value, in constant memory.
#pragma once

#include <cuda.h>

#include "common/mask.h"
#include "common/mask_bits.h"
#include "common/row_set.h"
#include "common/score.h"
#include "common/term_params.h"
#include "common/tile_scheduler.h"
#include "plan.h"
#include "problem.h"

namespace jax_fa3::bwd {

// What preprocess finds out about a block of query rows, the same for all heads.
struct alignas(16) QueryBlock {
  IntervalHull hull;  // of the rows that see a key
  RowSet blind;       // the rows that see none; what they hold must not reach any gradient
};
static_assert(sizeof(QueryBlock) == 4 * kQueryBlockInts);

// What row_stats holds of a block of query rows and a head, at these offsets: for each row its
// log-sum-exp in base 2, rounded (inf where the row sees nothing, so that P is 0), delta, and what
// the log-sum-exp lost to rounding; then some numbers for the whole block.
template <int kBlockM>
struct RowStats {
  static constexpr int kLse = 0, kDelta = kBlockM, kLseLow = 2 * kBlockM;
  static constexpr int kCareful = 3 * kBlockM;  // as int, not 0: what was lost counts for some row
  static constexpr int kSum = kCareful + 1;     // as int, SumOfBlock
  static constexpr int kTaken = kCareful + 2;   // as int: of the first block, Params::tile_counter
  static constexpr int kSize = row_stats_of_block(kBlockM);
};

// What dq_accum has of a block of query rows and a head. Nobody clears it: who comes first stores
// its part, the others add theirs.
enum SumOfBlock : int { kNoSum, kSumBegun, kSumHeld };

// What a CTA of the main kernel works on: a block of keys of one KV head, and of the steps that its
// query rows make one split's (params.num_splits CTAs share them).
struct KeyTile {
  int n_block;  // -1: there is no tile any more
  int head_k;
  int batch;
  int split;
};

struct Params {
  CUtensorMap query;               // [b, t, n, h]
  CUtensorMap key;                 // [b, s, k, h]
  CUtensorMap value;               // [b, s, k, v]
  CUtensorMap dout;                // [b, t, n, v]
  CUtensorMap dquery;              // unused where dQ stays in dq_accum
  CUtensorMap dkey, dvalue;        // unused where dkv_fp32
  Operand out, dout_rows;          // read by preprocess, row by row; out.data may be null
  Operand value_rows;              // read by range.h
  Operand dkey_rows, dvalue_rows;  // the gradients, for code that writes them by row
  bool dkv_fp32;
  // [splits, b, s, k, h + v] or null: dK and dV of each split's query rows (partial.h). Null: the
  // main kernel writes them.
  float* dkv_partial;
  int num_splits;        // CTAs that share the query rows of a block of keys
  bool accumulates_dq;   // dq_accum holds the dQ of earlier calls
  bool finishes_dq;      // dQ is complete after this call; else it stays in dq_accum
  float const* lse;      // [b, n, t]
  float const* lse_low;  // [b, n, t] or null
  float const* dlse;     // [b, n, t] or null (0); where out.data is null the problem's neg_delta
  float* row_stats;      // [b, n, m], RowStats
  int2* row_intervals;   // [b, m, block_m]
  // [b, m + m / kBlocksOfHull]: behind an entry's blocks, hulls of kBlocksOfHull of them each.
  QueryBlock* query_blocks;
  uint32_t* ranges;   // [b, k], Range, or null (range.h)
  float* dq_accum;    // [b, n, m, block_m * kHeadDim], in the order of the accumulators; m and
                      // block_m are the main kernel's where that is fused, else those of dQ's own
  int* turns;         // [b, n, m] or null: key blocks add to dQ in any order
  int* tile_counter;  // of a persistent kernel: tiles taken so far; null: each CTA has one
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
  HeadOperands heads;
  float* dsinks;  // [b, n, dsinks_blocks], or null as sinks
  int dsinks_blocks;

  CUTLASS_HOST_DEVICE QueryBlock* blocks_of(int batch) const {
    int const hulls = ceil_div(num_m_blocks, kBlocksOfHull);
    return query_blocks + int64_t{batch} * (num_m_blocks + hulls);
  }
  CUTLASS_DEVICE KeyTile key_tile(int index) const {
    TileCoord const coord = order(index);
    return {coord.block, coord.head / num_splits, coord.batch, coord.head % num_splits};
  }
  // The calls after the first of several add to all blocks of dq_accum.
  CUTLASS_HOST_DEVICE bool clears_dq() const { return !accumulates_dq && !finishes_dq; }
  CUTLASS_HOST_DEVICE int64_t m_block_index(int batch, int head, int m_block) const {
    return (int64_t{batch} * num_heads_q + head) * num_m_blocks + m_block;
  }
};

// softmax_scale_log2 is that of scores which have been scaled already.
struct BiasParams : WithBias<Params> {
  float* dbias;  // or null
  int64_t dbias_batch_stride, dbias_head_stride, dbias_row_stride;
};

using BitsParams = WithBits<Params>;
struct DropoutParams : WithDropout<Params> {
  float twice_kept;  // the share of weights that are left, times 2
};

struct AlibiParams : WithAlibi<Params> {
  float* dalibi;  // [b, n, dalibi_parts] or null
  int dalibi_parts;
};

struct RelativeParams : WithRelativeBias<Params> {
  float* drelative;  // [b, n, drelative_parts, relative_bias.size] or null
  int drelative_parts;
};

}  // namespace jax_fa3::bwd
