// What one call computes. Plain data: no CUTLASS, no XLA (twin of jax_fa3/_problem.py).
//
// Partial results. A call may be given just some of the keys that its query rows see, as each step
// of a ring is. What it computes of O, the log-sum-exp and dQ is then partial, to be accumulated
// with the partial results of the calls for the other keys: always in fp32, in place, call after
// call. Likewise dK and dV of some of the query rows. Those that are accumulated so far are called
// *_accum: a call reads them, adds its own and writes them back. Within one call, too, dQ of all
// key blocks is accumulated in dq_accum, and dK and dV of several CTAs' query rows in dkv_partial.
#pragma once

#include <cstdint>

#include "common/mask.h"
#include "common/per_head.h"

namespace jax_fa3 {

enum class DType { kBFloat16, kFloat16, kFloat32, kFloat8E4M3 };

// A [batch, seqlen, heads, head_dim] operand; strides in elements, the head dim is contiguous.
struct Operand {
  void* data;
  int64_t batch_stride;
  int64_t seqlen_stride;
  int64_t head_stride;
};

// What is added to the scores, [1 or b, 1 or n, 1 or t, columns], in Problem's dtype or fp32;
// strides in elements, 0 where it is broadcast. Rows are whole multiples of 16 bytes: there may be
// more columns than keys.
struct DenseBias {
  void* data;  // or null: none
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
  int columns;
  bool is_fp32;
};

// Entries of a table by distance, a multiple of 4: tiles reach beyond the arrays, so there is a
// margin on either side of the distances that there are.
inline constexpr int kRelativeMargin = 256;
constexpr int64_t relative_bias_size(int64_t seqlen_q, int64_t seqlen_k) {
  return (seqlen_q + seqlen_k + 2 * kRelativeMargin + 3) / 4 * 4;
}

// A dense mask (common/mask_bits.h): rows of query and columns of keys, in the backward the other
// way round. Strides are 0 where it is the same for all.
struct MaskBits {
  uint32_t const* bits;    // [1 or b, 1 or n, 1 or rows, chunks of 128 columns, 4], or null: none
  uint32_t const* blocks;  // [1 or b, 1 or n, blocks of 128 rows, words, 2]: any, full
  int64_t bits_of_batch, bits_of_head, bits_of_row;  // in words
  int bits_of_chunk;
  int64_t blocks_of_batch, blocks_of_head, blocks_of_row;  // in pairs of words
  int blocks_of_word;
};

// Of what may be absent some things exclude others; a handler refuses them together (ffi.cc,
// ffi_call.cc):
//   out_accum        bias, mask_bits, dropout, heads, relative_bias
//   bias             soft_cap, mask_bits, dropout
//   mask_bits        dropout
//   alibi_slopes     soft_cap, bias, mask_bits, dropout
//   relative_bias    all that alibi_slopes exclude, and those
//   num_splits > 1   all that masks, and all that may be null but lse_low
struct Problem {
  int batch;
  int seqlen_q;
  int seqlen_k;
  int num_heads_q;
  int num_heads_k;  // divides num_heads_q; query head n reads key/value head n / (q / k)
  int head_dim;     // of query and key
  int head_dim_v;   // of value and out
  DType dtype;      // of query, key and value
  DType out_dtype;  // dtype, or kFloat32 for partial results; where dtype is kFloat8E4M3, any other

  float softmax_scale;  // > 0
  float soft_cap;       // s <- soft_cap * tanh(s / soft_cap) after scaling; 0: none

  Operand query;   // [b, t, n, h]
  Operand key;     // [b, s, k, h]
  Operand value;   // [b, s, k, v]
  Operand out;     // [b, t, n, v]
  float* lse;      // [b, n, t], natural logarithm
  float* lse_low;  // [b, n, t] or null: what lse lost to rounding, in base 2
  // [b, t, n, v] or null: the result for the keys of earlier calls, whose log-sum-exp is in lse.
  // Out and lse become the result for those and this call's keys. Unless the call is the last (out
  // is then of dtype) `out` is the same array.
  float const* out_accum;
  HeadOperands heads;
  Mask mask;
  // A row all of whose keys the bias hides, by -inf or a number below -1e37, sees nothing.
  DenseBias bias;
  MaskBits mask_bits;
  // [b, n, 2] or null (jax_fa3/_dropout.py), and how many of 2^18 weights are dropped.
  uint32_t const* dropout_words;
  int dropout;
  // [1 or b, n, 2, relative_bias_size()] or null: of each query head what is added to the scores by
  // key - query row, from -seqlen_q - kRelativeMargin on, divided by softmax_scale; and the same
  // without its first entry, so that any two neighbours are aligned in one of them.
  float const* relative_bias;
  int64_t relative_bias_batch_stride;

  // Workspace.
  // More than 1: so many CTAs share the keys of each tile, and long_sums has as many times
  // fwd_split_size() numbers (fwd_splits.h).
  int num_splits;
  int* tile_counter;  // [1]
  // For O over more keys than kMostKeysOfSum (plan.h): long_sums_of_cta() fp32 numbers for each
  // CTA, of which no more are launched than there is room for. Null and 0: such sums drift.
  float* long_sums;
  int64_t long_sums_size;
};

// The gradients of a Problem.
struct BackwardProblem {
  Problem forward;  // out, lse and lse_low are read here, not written
  Operand dout;     // [b, t, n, v]
  // [b, n, t] both, or null. dS = P * (dP - delta) with delta = rowsum(dout * out) - dlse: either
  // forward.out is given, and the gradient of the log-sum-exp, unless that is 0; or -delta whole,
  // which a ring computes once for all its steps, and then forward.out.data is null.
  float const* dlse;
  float const* neg_delta;
  // [b, t, n, h], of dtype; data is null where other calls are still to add to dQ: then it stays in
  // dq_accum. accumulates_dq: dq_accum holds the dQ of earlier calls; else it is cleared first.
  Operand dquery;
  bool accumulates_dq;
  Operand dkey;     // [b, s, k, h], of dkv_dtype
  Operand dvalue;   // [b, s, k, v], of dkv_dtype
  DType dkv_dtype;  // dtype, or kFloat32 for partial results
  // [b, n, dsinks_blocks], or null as forward.heads.sinks is: of each block of bwd_tile().block_m
  // query rows what it adds to the gradient; behind the last block zeros.
  float* dsinks;
  int dsinks_blocks;
  // Of forward.bias, fp32, with the same strides; null: its gradient is not wanted.
  float* dbias;
  // [b, n, dalibi_parts] or null, cleared: parts of the gradient of alibi_slopes, one for each
  // consumer thread of each of the CTAs of a head (bwd/alibi.h).
  float* dalibi;
  int dalibi_parts;
  // [b, n, drelative_parts, relative_bias_size()] or null, cleared: the gradient of
  // forward.relative_bias before it was divided; in one part, or for a fixed order one for each
  // consumer warp of each of the CTAs of a head (bwd/relative_bias.h).
  float* drelative;
  int drelative_parts;
  // Workspace (plan.h). There are m blocks of bwd_tile().block_m query rows each.
  float* row_stats;    // [b, n, m, row_stats_of_block()]
  int* row_intervals;  // [b, m, block_m, 2]: key_begin, key_end
  int* query_blocks;   // [b, m + m / kBlocksOfHull rounded up, kQueryBlockInts]
  int* ranges;         // [b, k, 3], where dtype is fp16: of dO, V and dlse
  // [num_splits, b, s, k, h + v]: dK and dV of each of the num_splits CTAs that share the query
  // rows of a block of keys. Null where one CTA has all of them, and they are few enough for one
  // sum.
  float* dkv_partial;
  int num_splits;
  // fp32 in the order of the kernel's accumulators. Where the tile is fused: [b, n, m, block_m *
  // head dim of the kernel]. Else dQ has a kernel of its own, which needs dq_accum only if dQ is of
  // several calls: [b, n, blocks of kBwdQueryRows, kBwdQueryRows * head dim of the kernel].
  float* dq_accum;
  int* turns;  // [b, n, m] or null: key blocks add to dQ in a fixed order, for bit-equal gradients
};

}  // namespace jax_fa3
