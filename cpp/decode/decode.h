// What one call of the decoding kernel computes, and its entry points, one per (dtype, head dim,
// value head dim), each defined in a file that cmake/Selection.cmake writes.
#pragma once

#include <cuda_runtime_api.h>

#include "decode/sequences.h"
#include "problem.h"

namespace jax_fa3::decode {

constexpr int kSplitMultiple = 128;  // blocks are of so many positions, or of a part of them

// What the numbers of an e4m3 cache are multiplied with; strides in elements, 0 along what shares
// one.
struct Scale {
  float const* data;
  int64_t page_stride;
  int64_t slot_stride;
  int64_t head_stride;
  int64_t sequence_stride;
  bool of_positions;  // each has its own

  // Of a position; a scale that is not of positions has none.
  JAX_FA3_HOST_DEVICE float const* at(int sequence, int head, int page = 0, int slot = 0) const {
    return data + page * page_stride + slot * slot_stride + head * head_stride +
           sequence * sequence_stride;
  }
};

// What a call that attends to a cache and one that writes into it have in common.
struct CacheProblem {
  Sequences sequences;
  int const* page_table;  // [b, pages_per_sequence]; null: page b is sequence b's only one
  int pages_per_sequence;
  int num_pages;
  int page_size;
  int num_heads_q;
  int num_heads_k;  // divides num_heads_q; query head n reads key/value head n / (q / k)
  int head_dim;     // of query and key
  int head_dim_v;   // of value and out
  DType dtype;      // of the rows: query, out, new keys and values
  bool e4m3_cache;  // or of dtype, too

  // Where position `slot` of a page is, for each head: pages are the batch, slots the sequence.
  Operand key_cache, value_cache;
  Scale key_scale, value_scale;  // of an e4m3 cache
};

struct Problem : CacheProblem {
  float softmax_scale;  // > 0
  float soft_cap;       // as in jax_fa3::Problem

  void const* query;  // [rows, n, h], aligned to 16 bytes
  Window window;
  float const* sinks;  // [n] or null
  // Positions that are always summed by themselves, a multiple of kSplitMultiple, or 0: results do
  // not depend on the rest of the batch then.
  int split_size;

  void* out;   // [rows, n, v]
  float* lse;  // [rows, n], natural logarithm

  // Of workspace() numbers (workspace.h).
  float* partials;
  uint64_t* arrivals;

  // The kernel in front writes the cache and the query (append.h).
  bool appended;
};

template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch(Problem const& problem, cudaStream_t stream);

}  // namespace jax_fa3::decode
