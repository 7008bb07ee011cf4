// XLA's call of the decoding kernel.
#include "ffi_decode.h"

#include <algorithm>

#include "decode/workspace.h"
#include "dispatch.h"
#include "ffi.h"

namespace jax_fa3 {
namespace {

// Whether TMA reads it.
ffi::Error check_tma(Array const& x, Operand const& operand) {
  auto const bytes = static_cast<int64_t>(ffi::ByteWidth(x.dtype));
  int64_t const width = x.dims[x.dims.size() - 1];
  if (width * bytes % 16 != 0 || reinterpret_cast<std::uintptr_t>(operand.data) % 16 != 0) {
    return wrong(x, "shape " + shape_of(x) + ", or an address", "multiples of 16 bytes");
  }
  constexpr double kMaxElements = 0x1p39;  // of a stride: TMA's are below 2^40 bytes
  double page = 1;
  for (std::size_t i = 1; i < x.dims.size(); ++i) page *= static_cast<double>(x.dims[i]);
  if (page >= kMaxElements) {
    return wrong(x, "shape " + shape_of(x), "strides that fit a TMA descriptor");
  }
  return ffi::Error::Success();
}

}  // namespace

ffi::Error check_attributes(DecodeAttributes const& a, Dims* dims) {
  return check_attributes({a.scale, a.soft_cap, a.window_left, a.window_right, a.num_heads_q,
                           a.num_heads_k, 0, 0, 0, a.head_dim_v, 0, 0},
                          dims);
}

ffi::Error to_problem(Decoding const& x, DecodeAttributes const& a, Dims const& dims, Cache* cache,
                      decode::Problem* problem) {
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

  JAX_FA3_RETURN_IF_FAILED(to_cache(x, a.kv_layout, a.num_heads_k, head_dim, a.head_dim_v, cache));
  JAX_FA3_RETURN_IF_FAILED(check_tma(x.key_cache, cache->key));
  bool const one = x.value_cache.is_absent();
  JAX_FA3_RETURN_IF_FAILED(check_tma(one ? x.key_cache : x.value_cache, cache->value));
  for (Array const& scale : {x.key_scale, x.value_scale}) {
    if (scale.is_absent() != !cache->is_e4m3) {
      return wrong(scale, "shape " + shape_of(scale),
                   cache->is_e4m3 ? "one scale" : "none: caches of 16 bits");
    }
  }
  JAX_FA3_RETURN_IF_FAILED(to_cache_problem(x, x.query, *cache, dims, problem));
  if (problem->pages_per_sequence > 1 && cache->page_size % 8 != 0) {
    return wrong(x.key_cache, "pages of " + std::to_string(cache->page_size), "a multiple of 8");
  }
  problem->num_heads_q = static_cast<int>(a.num_heads_q);
  JAX_FA3_RETURN_IF_FAILED(to_dtype(x.query, &problem->dtype));
  problem->softmax_scale = a.scale;
  problem->soft_cap = a.soft_cap;
  problem->query = x.query.data;
  constexpr int64_t kFarthest = decode::Window::kFarthest;
  problem->window = {static_cast<int>(std::clamp(a.window_left, -kFarthest, kFarthest)),
                     static_cast<int>(std::clamp(a.window_right, -kFarthest, kFarthest))};
  problem->sinks = x.sinks.floats();
  problem->split_size = static_cast<int>(a.split_size);
  problem->out = x.out.data;
  problem->lse = x.lse.floats();
  problem->partials = x.partials.floats();
  problem->arrivals = reinterpret_cast<uint64_t*>(x.arrivals.ints());
  int const group = problem->num_heads_q / problem->num_heads_k;
  if (decode::most_units(problem->sequences, group, problem->num_heads_k) >= 0x1p31) {
    return wrong(x.query, "shape " + shape_of(x.query), "fewer rows, heads or positions");
  }
  auto const needed =
      decode::workspace(problem->sequences, group, problem->head_dim_v, problem->split_size);
  if (x.partials.size() < needed.partials || x.arrivals.size() < needed.arrivals) {
    return invalid("the workspace is too small: was this program exported for other kernels?");
  }
  return ffi::Error::Success();
}

ffi::Error launch(decode::Problem const& problem, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (launch_decode(problem, stream, &error)) return cuda_status(error);
  Problem sizes{};
  sizes.head_dim = problem.head_dim;
  sizes.head_dim_v = problem.head_dim_v;
  return not_built(sizes);
}

namespace {

ffi::Error decode_impl(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                       DecodeAttributes attributes) {
  Dims dims;
  Decoding x;
  Cache cache{};
  decode::Problem problem{};
  JAX_FA3_RETURN_IF_FAILED(check_attributes(attributes, &dims));
  JAX_FA3_RETURN_IF_FAILED(unpack(kDecode, operands, results, &dims, &x));
  JAX_FA3_RETURN_IF_FAILED(to_problem(x, attributes, dims, &cache, &problem));
  if (x.out.is_absent()) return ffi::Error::Success();
  JAX_FA3_RETURN_IF_FAILED(check_device(stream));
  return launch(problem, *stream);
}

}  // namespace
}  // namespace jax_fa3

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa3::DecodeAttributes, JAX_FA3_DECODE_ATTRIBUTES);

JAX_FA3_HANDLER(jax_fa3_decode, jax_fa3::decode_impl, .Attrs<jax_fa3::DecodeAttributes>());
