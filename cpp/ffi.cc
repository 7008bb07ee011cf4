// XLA's calls: buffers and attributes become a Problem, which is launched on XLA's stream.
//
// Python has checked everything already; what is checked again here keeps a caller of the bare
// custom call from reading out of bounds. An error is returned, never thrown, never an abort.
#include "xla/ffi/api/ffi.h"

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "dispatch.h"
#include "ffi.h"
#include "problem.h"
#include "segment_intervals.h"

namespace ffi = xla::ffi;

namespace jax_fa3 {
namespace {

ffi::Error invalid(std::string const& message) {
  return ffi::Error::InvalidArgument("jax_fa3: " + message);
}

ffi::Error cuda_status(cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_fa3: CUDA: ") + cudaGetErrorString(error));
}

// The kernels hold machine code for sm_90a alone.
ffi::Error check_device() {
  int device = 0;
  int major = 0;
  int minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  if (error != cudaSuccess) return cuda_status(error);
  if (major == 9 && minor == 0) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kUnimplemented,
                    "jax_fa3: the kernels need a Hopper GPU (sm_90), this device is sm_" +
                        std::to_string(major) + std::to_string(minor) +
                        "; use implementation=\"xla\"");
}

std::optional<DType> to_dtype(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::BF16:
      return DType::kBFloat16;
    case ffi::DataType::F16:
      return DType::kFloat16;
    case ffi::DataType::F32:
      return DType::kFloat32;
    default:
      return std::nullopt;
  }
}

template <class Buffer>
std::string shape_of(Buffer const& buffer) {
  std::string text;
  for (int64_t const dim : buffer.dimensions()) {
    text += (text.empty() ? "[" : ", ") + std::to_string(dim);
  }
  return text.empty() ? "[]" : text + "]";
}

// A [b, t, n, h] operand in row-major order, from head `first_head` on.
template <class Buffer>
Operand to_operand(Buffer& buffer, int64_t first_head, int64_t element_size) {
  auto const dims = buffer.dimensions();
  int64_t const heads = dims[2];
  int64_t const head_dim = dims[3];
  return {static_cast<char*>(buffer.untyped_data()) + first_head * head_dim * element_size,
          dims[1] * heads * head_dim, heads * head_dim, head_dim};
}

using Int32Buffer = ffi::Buffer<ffi::DataType::S32>;

// Optional operands have no elements when absent.
ffi::Error optional_array(Int32Buffer const& buffer, char const* name, int64_t expected,
                          int const** data) {
  *data = nullptr;
  auto const count = static_cast<int64_t>(buffer.element_count());
  if (count == 0) return ffi::Error::Success();
  if (count != expected) {
    return invalid(std::string(name) + " has shape " + shape_of(buffer) + ", expected " +
                   std::to_string(expected) + " elements");
  }
  *data = buffer.typed_data();
  return ffi::Error::Success();
}

#define JAX_FA3_RETURN_IF_FAILED(expression)              \
  if (ffi::Error error = (expression); error.failure()) { \
    return error;                                         \
  }

ffi::Error fwd_impl(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                    ffi::AnyBuffer value, Int32Buffer query_offset, Int32Buffer query_seq_lengths,
                    Int32Buffer key_value_seq_lengths, Int32Buffer key_begin, Int32Buffer key_end,
                    ffi::Result<ffi::AnyBuffer> out,
                    ffi::Result<ffi::Buffer<ffi::DataType::F32>> lse,
                    ffi::Result<Int32Buffer> tile_counter, float scale, float soft_cap,
                    int64_t window_left, int64_t window_right, int64_t num_heads_q,
                    int64_t num_heads_k, int64_t first_head_q, int64_t first_head_k,
                    int64_t first_head_v) {
  JAX_FA3_RETURN_IF_FAILED(check_device());
  auto const q = query.dimensions();
  auto const k = key.dimensions();
  auto const v = value.dimensions();
  auto const o = out->dimensions();
  auto const l = lse->dimensions();
  if (q.size() != 4 || k.size() != 4 || v.size() != 4 || o.size() != 4 || l.size() != 3) {
    return invalid("query, key, value and out must have rank 4, lse rank 3");
  }
  int64_t const batch = q[0];
  int64_t const seqlen_q = q[1];
  int64_t const seqlen_k = k[1];
  int64_t const head_dim = q[3];
  int64_t const head_dim_v = v[3];
  if (k[0] != batch || v[0] != batch || v[1] != seqlen_k || k[3] != head_dim) {
    return invalid("query " + shape_of(query) + ", key " + shape_of(key) + " and value " +
                   shape_of(value) + " do not fit together");
  }
  // Without heads there is nothing to compute, and nothing to divide by.
  bool const no_heads = num_heads_q == 0 && num_heads_k == 0;
  if (!no_heads && (num_heads_k <= 0 || num_heads_q <= 0 || num_heads_q % num_heads_k != 0)) {
    return invalid(std::to_string(num_heads_q) + " query heads are no multiple of " +
                   std::to_string(num_heads_k) + " key/value heads");
  }
  auto const heads_fit = [](int64_t first, int64_t count, int64_t available) {
    return first >= 0 && first <= available && count <= available - first;
  };
  if (!heads_fit(first_head_q, num_heads_q, q[2]) || !heads_fit(first_head_k, num_heads_k, k[2]) ||
      !heads_fit(first_head_v, num_heads_k, v[2])) {
    return invalid("the heads asked for are not all in query, key and value");
  }
  if (o[0] != batch || o[1] != seqlen_q || o[2] != num_heads_q || o[3] != head_dim_v ||
      l[0] != batch || l[1] != num_heads_q || l[2] != seqlen_q) {
    return invalid("out " + shape_of(*out) + " or lse " + shape_of(*lse) + " does not fit query " +
                   shape_of(query) + " and value " + shape_of(value));
  }
  if (tile_counter->element_count() != 1) return invalid("tile_counter must have one element");
  if (head_dim <= 0 || head_dim_v <= 0 || head_dim % 8 != 0 || head_dim_v % 8 != 0 ||
      head_dim > 256 || head_dim_v > 256) {
    return invalid("head dims must be positive multiples of 8 up to 256, found " +
                   std::to_string(head_dim) + " and " + std::to_string(head_dim_v));
  }
  auto const dtype = to_dtype(query.element_type());
  auto const out_dtype = to_dtype(out->element_type());
  if (!dtype || *dtype == DType::kFloat32 || key.element_type() != query.element_type() ||
      value.element_type() != query.element_type()) {
    return invalid("query, key and value must all be bfloat16 or all float16");
  }
  if (!out_dtype || (*out_dtype != *dtype && *out_dtype != DType::kFloat32)) {
    return invalid("out must have query's dtype or float32");
  }
  if (!(scale > 0.f) || !std::isfinite(scale) || !(soft_cap >= 0.f) || !std::isfinite(soft_cap)) {
    return invalid("scale must be positive and finite, soft_cap finite and not negative");
  }
  constexpr int64_t kMaxTiles = int64_t{1} << 30;  // tiles and rounds are counted in 32 bits
  if (seqlen_q > INT32_MAX - 256 || seqlen_k > INT32_MAX - 256 || batch > INT32_MAX ||
      batch * num_heads_q > kMaxTiles / (seqlen_q / 64 + 1)) {
    return invalid("query " + shape_of(query) + " or key " + shape_of(key) + " is too large");
  }

  Problem problem{};
  problem.batch = static_cast<int>(batch);
  problem.seqlen_q = static_cast<int>(seqlen_q);
  problem.seqlen_k = static_cast<int>(seqlen_k);
  problem.num_heads_q = static_cast<int>(num_heads_q);
  problem.num_heads_k = static_cast<int>(num_heads_k);
  problem.head_dim = static_cast<int>(head_dim);
  problem.head_dim_v = static_cast<int>(head_dim_v);
  problem.dtype = *dtype;
  problem.out_dtype = *out_dtype;
  problem.softmax_scale = scale;
  problem.soft_cap = soft_cap;
  problem.query = to_operand(query, first_head_q, 2);
  problem.key = to_operand(key, first_head_k, 2);
  problem.value = to_operand(value, first_head_v, 2);
  problem.out = to_operand(*out, 0, 0);
  problem.lse = lse->typed_data();
  problem.tile_counter = tile_counter->typed_data();

  Mask& mask = problem.mask;
  mask.seqlen_q = problem.seqlen_q;
  mask.seqlen_k = problem.seqlen_k;
  auto const bounded = [](int64_t side) {
    return side > kUnbounded ? kUnbounded : (side < -kUnbounded ? -kUnbounded : side);
  };
  mask.window_left = bounded(window_left);
  mask.window_right = bounded(window_right);
  mask.query_offset_stride = query_offset.element_count() == 1 ? 0 : 1;
  JAX_FA3_RETURN_IF_FAILED(optional_array(
      query_offset, "query_offset", mask.query_offset_stride == 0 ? 1 : batch, &mask.query_offset));
  JAX_FA3_RETURN_IF_FAILED(
      optional_array(query_seq_lengths, "query_seq_lengths", batch, &mask.seqlens_q));
  JAX_FA3_RETURN_IF_FAILED(
      optional_array(key_value_seq_lengths, "key_value_seq_lengths", batch, &mask.seqlens_k));
  JAX_FA3_RETURN_IF_FAILED(
      optional_array(key_begin, "key_begin", batch * seqlen_q, &mask.key_begin));
  JAX_FA3_RETURN_IF_FAILED(optional_array(key_end, "key_end", batch * seqlen_q, &mask.key_end));

  if (out->element_count() == 0) return ffi::Error::Success();
  cudaError_t error = cudaSuccess;
  if (!launch_fwd(problem, stream, &error)) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "jax_fa3: no kernel was built for this dtype and head dims " +
                          std::to_string(head_dim) + " and " + std::to_string(head_dim_v));
  }
  return cuda_status(error);
}

ffi::Error segment_intervals_impl(cudaStream_t stream, Int32Buffer query_segment_ids,
                                  Int32Buffer key_value_segment_ids,
                                  ffi::Result<Int32Buffer> key_begin,
                                  ffi::Result<Int32Buffer> key_end) {
  JAX_FA3_RETURN_IF_FAILED(check_device());
  auto const q = query_segment_ids.dimensions();
  auto const k = key_value_segment_ids.dimensions();
  if (q.size() != 2 || k.size() != 2 || q[0] != k[0] ||
      key_begin->element_count() != query_segment_ids.element_count() ||
      key_end->element_count() != query_segment_ids.element_count()) {
    return invalid("query_segment_ids " + shape_of(query_segment_ids) +
                   " and key_value_segment_ids " + shape_of(key_value_segment_ids) +
                   " must be [B, T] and [B, S], the results [B, T]");
  }
  if (q[1] > INT32_MAX - 4096 || k[1] > INT32_MAX - 4096 || q[0] > INT32_MAX / (q[1] / 256 + 1)) {
    return invalid("query_segment_ids " + shape_of(query_segment_ids) + " is too large");
  }
  if (q[0] == 0 || q[1] == 0) return ffi::Error::Success();
  SegmentIntervals const problem{static_cast<int>(q[0]),
                                 static_cast<int>(q[1]),
                                 static_cast<int>(k[1]),
                                 query_segment_ids.typed_data(),
                                 key_value_segment_ids.typed_data(),
                                 key_begin->typed_data(),
                                 key_end->typed_data()};
  return cuda_status(launch(problem, stream));
}

}  // namespace
}  // namespace jax_fa3

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_fwd, jax_fa3::fwd_impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<jax_fa3::Int32Buffer>()
                                  .Arg<jax_fa3::Int32Buffer>()
                                  .Arg<jax_fa3::Int32Buffer>()
                                  .Arg<jax_fa3::Int32Buffer>()
                                  .Arg<jax_fa3::Int32Buffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::DataType::F32>>()
                                  .Ret<jax_fa3::Int32Buffer>()
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<int64_t>("window_left")
                                  .Attr<int64_t>("window_right")
                                  .Attr<int64_t>("num_heads_q")
                                  .Attr<int64_t>("num_heads_k")
                                  .Attr<int64_t>("first_head_q")
                                  .Attr<int64_t>("first_head_k")
                                  .Attr<int64_t>("first_head_v"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_segment_intervals, jax_fa3::segment_intervals_impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<jax_fa3::Int32Buffer>()
                                  .Arg<jax_fa3::Int32Buffer>()
                                  .Ret<jax_fa3::Int32Buffer>()
                                  .Ret<jax_fa3::Int32Buffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
