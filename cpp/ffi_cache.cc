// ffi_cache.h: KV caches of every layout as strides, and where their sequences and scales are.
#include "ffi_cache.h"

#include <algorithm>

namespace jax_fa3 {
namespace {

constexpr int64_t kMostRows = int64_t{1} << 29;  // with their heads

// One array as [page, head, slot, column].
ffi::Error to_operand(Array const& x, bool heads_second, int64_t first_head, int64_t every,
                      int64_t first_column, int64_t heads, int64_t columns, Operand* operand) {
  double page = 1;  // in an array without elements a product may be beyond 64 bits
  for (std::size_t i = 1; i < x.dims.size(); ++i) page *= static_cast<double>(x.dims[i]);
  if (x.dims[0] > INT32_MAX || page >= 0x1p62) {
    return wrong(x, "shape " + shape_of(x), "fewer pages, or smaller ones");
  }
  int64_t const width = x.dims[x.dims.size() - 1];
  int64_t all_heads = heads_second ? x.dims[1] : 1;
  for (std::size_t i = 2; !heads_second && i + 1 < x.dims.size(); ++i) all_heads *= x.dims[i];
  int64_t const page_size = x.dims[heads_second ? 2 : 1];
  if (first_column + columns > width) {
    return wrong(
        x, "shape " + shape_of(x),
        std::to_string(columns) + " columns from column " + std::to_string(first_column) + " on");
  }
  if (heads * every > all_heads) {
    return wrong(x, "shape " + shape_of(x), std::to_string(heads * every) + " heads");
  }
  int64_t const head_stride = width * (heads_second ? page_size : 1);
  int64_t const slot_stride = width * (heads_second ? 1 : all_heads);
  auto const bytes = static_cast<int64_t>(ffi::ByteWidth(x.dtype));
  *operand = {static_cast<char*>(x.data) + (first_head * head_stride + first_column) * bytes,
              page_size * all_heads * width, slot_stride, head_stride * every};
  return ffi::Error::Success();
}

// None without an array; otherwise one for all, for each head, for each sequence and head, or in
// pages as the cache has them.
ffi::Error to_scale(Array const& x, Cache const& cache, int64_t heads, decode::Scale* scale) {
  scale->data = x.floats();
  scale->of_positions = x.dims.size() == 3;
  if (scale->of_positions) {
    int64_t const shape[] = {cache.num_pages, cache.heads_second ? heads : cache.page_size,
                             cache.heads_second ? cache.page_size : heads};
    if (!std::equal(x.dims.begin(), x.dims.end(), std::begin(shape))) {
      return wrong(x, "shape " + shape_of(x), "one for each of the cache's positions and heads");
    }
    scale->page_stride = heads * cache.page_size;
    scale->slot_stride = cache.heads_second ? 1 : heads;
    scale->head_stride = cache.heads_second ? cache.page_size : 1;
  } else if (x.size() > 1) {
    scale->head_stride = 1;
    scale->sequence_stride = x.dims.size() == 2 ? heads : 0;
  }
  return ffi::Error::Success();
}

// width: of the page table.
ffi::Error to_sequences(Decoding const& x, Array const& rows, Cache const& cache, Dims const& dims,
                        int64_t* width, decode::Sequences* sequences) {
  int64_t const batch = dims('b');
  int64_t const count = dims('r');
  bool const tabled = !x.page_table.is_absent();
  *width = tabled ? dims('w') : 1;
  if (cache.page_size <= 0 || cache.page_size >= kLongest || *width >= kLongest) {
    return wrong(x.key_cache, "pages of " + std::to_string(cache.page_size), "less than 2^30");
  }
  if (!tabled && cache.num_pages != batch) {
    return wrong(x.page_table, "none", "one, as there are not as many pages as sequences");
  }
  bool const ragged = !x.query_starts.is_absent();
  if (ragged && x.query_starts.size() != batch + 1) {
    return wrong(x.query_starts, "shape " + shape_of(x.query_starts),
                 "[" + std::to_string(batch + 1) + "]");
  }
  if (!ragged && count % batch != 0) {
    return wrong(rows, "shape " + shape_of(rows), "as many rows for each sequence");
  }
  int64_t const heads = std::max(dims('n'), int64_t{1});
  if (count > kMostRows || batch > kMostRows || heads > kMostRows || count * heads > kMostRows) {
    return wrong(rows, "shape " + shape_of(rows), "fewer rows and heads");
  }
  *sequences = {static_cast<int>(batch),
                static_cast<int>(count),
                static_cast<int>(count / batch),
                static_cast<int>(std::min(*width * cache.page_size, kLongest)),
                x.lengths.ints(),
                x.query_starts.ints(),
                x.num_sequences.ints(),
                x.key_begin.ints()};
  return ffi::Error::Success();
}

}  // namespace

ffi::Error to_cache(Decoding const& x, int64_t kv_layout, int64_t heads, int64_t head_dim,
                    int64_t head_dim_v, Cache* cache) {
  if (kv_layout < kNHD || kv_layout > kLanes) {
    return invalid("kv_layout: got " + std::to_string(kv_layout) + ", wanted 0 to 3");
  }
  bool const one = kv_layout == kInterleaved || kv_layout == kLanes;
  if (one != x.value_cache.is_absent() && x.key_cache.bytes > 0) {
    return wrong(x.value_cache, "shape " + shape_of(x.value_cache),
                 one ? "none: key_cache holds both" : "one beside key_cache");
  }
  std::size_t const rank = x.key_cache.dims.size();
  if (rank != 4 && !(one && rank == 5)) {
    return wrong(x.key_cache, "shape " + shape_of(x.key_cache),
                 one ? "[p, page, *, *] or [p, page, *, *, *]" : "four dimensions");
  }
  bool const second = kv_layout == kHND;
  Array const& value = one ? x.key_cache : x.value_cache;
  if (x.value_cache.dtype != x.key_cache.dtype) {
    return wrong(x.value_cache, "another dtype", "key_cache's");
  }
  if (value.dims.size() != rank ||
      !std::equal(value.dims.begin(), value.dims.end() - 1, x.key_cache.dims.begin())) {
    return wrong(value, "shape " + shape_of(value), "key_cache's " + shape_of(x.key_cache));
  }
  if (!one && (x.key_cache.dims[second ? 1 : 2] != heads || x.key_cache.dims[3] != head_dim ||
               value.dims[3] != head_dim_v)) {
    return wrong(x.key_cache, "shape " + shape_of(x.key_cache),
                 std::to_string(heads) + " heads, of " + std::to_string(head_dim) +
                     " columns and " + std::to_string(head_dim_v) + " of value_cache");
  }
  int64_t const every = kv_layout == kInterleaved ? 2 : 1;
  JAX_FA3_RETURN_IF_FAILED(
      to_operand(x.key_cache, second, 0, every, 0, heads, head_dim, &cache->key));
  JAX_FA3_RETURN_IF_FAILED(to_operand(value, second, every - 1, every,
                                      kv_layout == kLanes ? head_dim : 0, heads, head_dim_v,
                                      &cache->value));
  cache->is_e4m3 = x.key_cache.dtype == ffi::DataType::F8E4M3FN;
  cache->heads_second = second;
  cache->num_pages = x.key_cache.dims[0];
  cache->page_size = x.key_cache.dims[second ? 2 : 1];
  return ffi::Error::Success();
}

ffi::Error to_cache_problem(Decoding const& x, Array const& rows, Cache const& cache,
                            Dims const& dims, decode::CacheProblem* problem) {
  int64_t const heads = dims('k');
  int64_t width = 0;
  JAX_FA3_RETURN_IF_FAILED(to_sequences(x, rows, cache, dims, &width, &problem->sequences));
  problem->num_heads_k = static_cast<int>(heads);
  problem->head_dim = static_cast<int>(dims('h'));
  problem->head_dim_v = static_cast<int>(dims('v'));
  problem->e4m3_cache = cache.is_e4m3;
  problem->key_cache = cache.key;
  problem->value_cache = cache.value;
  JAX_FA3_RETURN_IF_FAILED(to_scale(x.key_scale, cache, heads, &problem->key_scale));
  JAX_FA3_RETURN_IF_FAILED(to_scale(x.value_scale, cache, heads, &problem->value_scale));
  problem->num_pages = static_cast<int>(cache.num_pages);
  problem->page_size = static_cast<int>(cache.page_size);
  problem->page_table = x.page_table.ints();
  problem->pages_per_sequence = static_cast<int>(width);
  return ffi::Error::Success();
}

}  // namespace jax_fa3
