// XLA's calls of the decoding kernel.
#include <algorithm>

#include "decode/workspace.h"
#include "dispatch.h"
#include "ffi.h"
#include "ffi_call.h"

namespace jax_fa3 {

struct DecodeAttributes {
  float scale;
  float soft_cap;
  int64_t window_left, window_right;
  int64_t num_heads_q, num_heads_k;
  int64_t head_dim_v;
  int64_t kv_layout;
  int64_t split_size;
};

namespace {

// In the order of jax_fa3.kv_cache's LAYOUTS.
enum KvLayout : int64_t { kNHD, kHND, kInterleaved, kLanes };

constexpr int64_t kLongest = int64_t{1} << 30;   // positions (decode/sequences.h)
constexpr int64_t kMostRows = int64_t{1} << 29;  // with their heads

struct Cache {
  int64_t num_pages, page_size;
  bool is_e4m3;
  Operand key, value;
};

// One array as [page, head, slot, column].
ffi::Error to_operand(Array const& x, bool heads_second, int64_t first_head, int64_t every,
                      int64_t first_column, int64_t heads, int64_t columns, Operand* operand) {
  int64_t const width = x.dims[x.dims.size() - 1];
  auto const bytes = static_cast<int64_t>(ffi::ByteWidth(x.dtype));
  int64_t all_heads = heads_second ? x.dims[1] : 1;
  for (std::size_t i = 2; !heads_second && i + 1 < x.dims.size(); ++i) all_heads *= x.dims[i];
  int64_t const page_size = x.dims[heads_second ? 2 : 1];
  if (first_column + columns > width || width * bytes % 16 != 0 || first_column * bytes % 16 != 0) {
    return wrong(x, "shape " + shape_of(x),
                 std::to_string(columns) + " columns from column " + std::to_string(first_column) +
                     " on, at multiples of 16 bytes");
  }
  if (heads * every > all_heads) {
    return wrong(x, "shape " + shape_of(x), std::to_string(heads * every) + " heads");
  }
  constexpr double kMaxElements = 0x1p39;  // of a stride: TMA's are below 2^40 bytes
  if (static_cast<double>(page_size) * static_cast<double>(all_heads) *
              static_cast<double>(width) >=
          kMaxElements ||
      x.dims[0] > INT32_MAX) {
    return wrong(x, "shape " + shape_of(x), "dimensions and strides that fit a TMA descriptor");
  }
  if (reinterpret_cast<std::uintptr_t>(x.data) % 16 != 0) {
    return wrong(x, "data that are not aligned", "an address that is a multiple of 16");
  }
  int64_t const head_stride = width * (heads_second ? page_size : 1);
  int64_t const slot_stride = width * (heads_second ? 1 : all_heads);
  *operand = {static_cast<char*>(x.data) + (first_head * head_stride + first_column) * bytes,
              page_size * all_heads * width, slot_stride, head_stride * every};
  return ffi::Error::Success();
}

ffi::Error to_cache(Decoding const& x, DecodeAttributes const& a, int64_t head_dim, Cache* cache) {
  if (a.kv_layout < kNHD || a.kv_layout > kLanes) {
    return invalid("kv_layout: got " + std::to_string(a.kv_layout) + ", wanted 0 to 3");
  }
  bool const both = a.kv_layout == kInterleaved || a.kv_layout == kLanes;
  if (both != x.value_cache.is_absent() && x.key_cache.bytes > 0) {
    return wrong(x.value_cache, "shape " + shape_of(x.value_cache),
                 both ? "none: key_cache holds both" : "one beside key_cache");
  }
  bool const second = a.kv_layout == kHND;
  if (second && x.key_cache.dims.size() != 4) {
    return wrong(x.key_cache, "shape " + shape_of(x.key_cache), "[p, k, page, h]");
  }
  Array const& value = both ? x.key_cache : x.value_cache;
  if (x.value_cache.dtype != x.key_cache.dtype) {
    return wrong(x.value_cache, "another dtype", "key_cache's");
  }
  if (value.dims.size() != x.key_cache.dims.size() ||
      !std::equal(value.dims.begin(), value.dims.end() - 1, x.key_cache.dims.begin())) {
    return wrong(value, "shape " + shape_of(value), "key_cache's " + shape_of(x.key_cache));
  }
  int64_t const every = a.kv_layout == kInterleaved ? 2 : 1;
  JAX_FA3_RETURN_IF_FAILED(
      to_operand(x.key_cache, second, 0, every, 0, a.num_heads_k, head_dim, &cache->key));
  JAX_FA3_RETURN_IF_FAILED(to_operand(value, second, every - 1, every,
                                      a.kv_layout == kLanes ? head_dim : 0, a.num_heads_k,
                                      a.head_dim_v, &cache->value));
  cache->is_e4m3 = x.key_cache.dtype == ffi::DataType::F8E4M3FN;
  cache->num_pages = x.key_cache.dims[0];
  cache->page_size = x.key_cache.dims[second ? 2 : 1];
  return ffi::Error::Success();
}

// Of an e4m3 cache: one scale for all, for each head, for each sequence and head, or in pages as
// the cache has them.
ffi::Error to_scale(Array const& x, Cache const& cache, bool heads_second, int64_t heads,
                    decode::Scale* scale) {
  if (x.is_absent() != !cache.is_e4m3) {
    return wrong(x, "shape " + shape_of(x),
                 cache.is_e4m3 ? "one scale" : "none: caches of 16 bits");
  }
  scale->data = x.floats();
  scale->of_positions = x.dims.size() == 3;
  if (scale->of_positions) {
    int64_t const shape[] = {heads_second ? heads : cache.page_size,
                             heads_second ? cache.page_size : heads};
    if (x.dims[1] != shape[0] || x.dims[2] != shape[1]) {
      return wrong(x, "shape " + shape_of(x), "one for each of the cache's positions and heads");
    }
    scale->page_stride = heads * cache.page_size;
    scale->slot_stride = heads_second ? 1 : heads;
    scale->head_stride = heads_second ? cache.page_size : 1;
  } else if (x.size() > 1) {
    scale->head_stride = 1;
    scale->sequence_stride = x.dims.size() == 2 ? heads : 0;
  }
  return ffi::Error::Success();
}

ffi::Error to_sequences(Decoding const& x, Cache const& cache, Dims const& dims,
                        decode::Problem* problem) {
  int64_t const batch = dims('b');
  int64_t const rows = dims('r');
  bool const tabled = !x.page_table.is_absent();
  int64_t const width = tabled ? dims('w') : 1;
  bool const fits = cache.page_size > 0 && cache.page_size < kLongest && width < kLongest;
  if (!fits || (width > 1 && cache.page_size % 8 != 0)) {
    return wrong(x.key_cache, "pages of " + std::to_string(cache.page_size),
                 "a multiple of 8, below 2^30");
  }
  if (!tabled && cache.num_pages != batch) {
    return wrong(x.page_table, "none", "one, as there are not as many pages as sequences");
  }
  bool const ragged = !x.query_starts.is_absent();
  if (ragged && x.query_starts.size() != batch + 1) {
    return wrong(x.query_starts, "shape " + shape_of(x.query_starts),
                 "[" + std::to_string(batch + 1) + "]");
  }
  if (!ragged && rows % batch != 0) {
    return wrong(x.query, "shape " + shape_of(x.query), "as many rows for each sequence");
  }
  if (rows > kMostRows || batch > kMostRows || dims('n') > kMostRows ||
      rows * dims('n') > kMostRows) {
    return wrong(x.query, "shape " + shape_of(x.query), "fewer rows and heads");
  }
  problem->num_pages = static_cast<int>(cache.num_pages);
  problem->page_size = static_cast<int>(cache.page_size);
  problem->page_table = x.page_table.ints();
  problem->pages_per_sequence = static_cast<int>(width);
  problem->sequences = {static_cast<int>(batch),
                        static_cast<int>(rows),
                        static_cast<int>(rows / batch),
                        static_cast<int>(std::min(width * cache.page_size, kLongest)),
                        x.lengths.ints(),
                        x.query_starts.ints(),
                        x.num_sequences.ints(),
                        x.key_begin.ints()};
  return ffi::Error::Success();
}

ffi::Error decode_impl(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                       DecodeAttributes attributes) {
  DecodeAttributes const& a = attributes;
  Dims dims;
  Decoding x;
  JAX_FA3_RETURN_IF_FAILED(
      check_attributes({a.scale, a.soft_cap, a.window_left, a.window_right, a.num_heads_q,
                        a.num_heads_k, 0, 0, 0, a.head_dim_v, 0, 0},
                       &dims));
  JAX_FA3_RETURN_IF_FAILED(unpack(kDecode, operands, results, &dims, &x));
  int64_t const head_dim = dims('h');
  if (head_dim <= 0 || a.head_dim_v <= 0 || head_dim % 8 != 0 || a.head_dim_v % 8 != 0 ||
      head_dim > 256 || a.head_dim_v > 256) {
    return invalid("head dims must be positive multiples of 8 up to 256, found " +
                   std::to_string(head_dim) + " and " + std::to_string(a.head_dim_v));
  }
  if (a.split_size < 0 || a.split_size > kLongest || a.split_size % decode::kSplitMultiple != 0) {
    return invalid("split_size: got " + std::to_string(a.split_size) + ", wanted a multiple of " +
                   std::to_string(decode::kSplitMultiple) + " up to 2^30, or 0");
  }
  if (x.out.is_absent()) return ffi::Error::Success();
  if (dims('b') == 0) return wrong(x.lengths, "no sequences", "at least one");

  Cache cache{};
  decode::Problem problem{};
  JAX_FA3_RETURN_IF_FAILED(to_cache(x, a, head_dim, &cache));
  JAX_FA3_RETURN_IF_FAILED(to_sequences(x, cache, dims, &problem));
  problem.num_heads_q = static_cast<int>(a.num_heads_q);
  problem.num_heads_k = static_cast<int>(a.num_heads_k);
  problem.head_dim = static_cast<int>(head_dim);
  problem.head_dim_v = static_cast<int>(a.head_dim_v);
  JAX_FA3_RETURN_IF_FAILED(to_dtype(x.query, &problem.dtype));
  problem.softmax_scale = a.scale;
  problem.soft_cap = a.soft_cap;
  problem.query = x.query.data;
  problem.key = cache.key;
  problem.value = cache.value;
  constexpr int64_t kFarthest = decode::Window::kFarthest;
  problem.window = {static_cast<int>(std::clamp(a.window_left, -kFarthest, kFarthest)),
                    static_cast<int>(std::clamp(a.window_right, -kFarthest, kFarthest))};
  problem.sinks = x.sinks.floats();
  problem.e4m3_cache = cache.is_e4m3;
  bool const heads_second = a.kv_layout == kHND;
  JAX_FA3_RETURN_IF_FAILED(
      to_scale(x.key_scale, cache, heads_second, a.num_heads_k, &problem.key_scale));
  JAX_FA3_RETURN_IF_FAILED(
      to_scale(x.value_scale, cache, heads_second, a.num_heads_k, &problem.value_scale));
  problem.split_size = static_cast<int>(a.split_size);
  problem.out = x.out.data;
  problem.lse = x.lse.floats();
  problem.partials = x.partials.floats();
  problem.arrivals = x.arrivals.ints();
  int const group = problem.num_heads_q / problem.num_heads_k;
  if (decode::most_units(problem.sequences, group, problem.num_heads_k) >= 0x1p31) {
    return wrong(x.query, "shape " + shape_of(x.query), "fewer rows, heads or positions");
  }
  auto const needed =
      decode::workspace(problem.sequences, group, problem.head_dim_v, problem.split_size);
  if (x.partials.size() < needed.partials || x.arrivals.size() < needed.arrivals) {
    return invalid("the workspace is too small: was this program exported for other kernels?");
  }
  JAX_FA3_RETURN_IF_FAILED(check_device(stream));
  cudaError_t error = cudaSuccess;
  if (launch_decode(problem, *stream, &error)) return cuda_status(error);
  Problem sizes{};
  sizes.head_dim = problem.head_dim;
  sizes.head_dim_v = problem.head_dim_v;
  return not_built(sizes);
}

}  // namespace
}  // namespace jax_fa3

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_fa3::DecodeAttributes, xla::ffi::StructMember<float>("scale"),
    xla::ffi::StructMember<float>("soft_cap"), xla::ffi::StructMember<int64_t>("window_left"),
    xla::ffi::StructMember<int64_t>("window_right"), xla::ffi::StructMember<int64_t>("num_heads_q"),
    xla::ffi::StructMember<int64_t>("num_heads_k"), xla::ffi::StructMember<int64_t>("head_dim_v"),
    xla::ffi::StructMember<int64_t>("kv_layout"), xla::ffi::StructMember<int64_t>("split_size"));

JAX_FA3_HANDLER(jax_fa3_decode, jax_fa3::decode_impl, .Attrs<jax_fa3::DecodeAttributes>());
