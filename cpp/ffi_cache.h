// KV caches as XLA's calls have them, for those that attend to them and those that write them.
#pragma once

#include <cstdint>

#include "decode/decode.h"
#include "ffi_targets.h"

namespace jax_fa3 {

// In the order of jax_fa3.kv_cache's LAYOUTS.
enum KvLayout : int64_t { kNHD, kHND, kInterleaved, kLanes };

constexpr int64_t kLongest = int64_t{1} << 30;  // positions (decode/sequences.h)

struct Cache {
  int64_t num_pages, page_size;
  bool is_e4m3;
  bool heads_second;
  Operand key, value;  // [page, slot, head, column]
};

ffi::Error to_cache(Decoding const& x, int64_t kv_layout, int64_t heads, int64_t head_dim,
                    int64_t head_dim_v, Cache* cache);

// What writing a cache and attending to it have in common, but for num_heads_q and dtype; checked.
// rows: an array of them.
ffi::Error to_cache_problem(Decoding const& x, Array const& rows, Cache const& cache,
                            Dims const& dims, decode::CacheProblem* problem);

}  // namespace jax_fa3
