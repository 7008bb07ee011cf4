#include "ffi_call.h"

#include <cmath>
#include <cstdint>

namespace jax_fa3 {

ffi::Error invalid(std::string const& message) {
  return ffi::Error::InvalidArgument("jax_fa3: " + message);
}

ffi::Error cuda_status(cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_fa3: CUDA: ") + cudaGetErrorString(error));
}

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

ffi::Error not_built(Problem const& problem) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented,
                    "jax_fa3: no kernel was built for this dtype and head dims " +
                        std::to_string(problem.head_dim) + " and " +
                        std::to_string(problem.head_dim_v));
}

std::optional<DType> to_dtype(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::BF16:
      return DType::kBFloat16;
    case ffi::DataType::F16:
      return DType::kFloat16;
    case ffi::DataType::F32:
      return DType::kFloat32;
    case ffi::DataType::F8E4M3FN:
      return DType::kFloat8E4M3;
    default:
      return std::nullopt;
  }
}

namespace {

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

}  // namespace

ffi::Error to_problem(Inputs& inputs, Attributes const& attributes, Problem* problem, bool float8) {
  auto const q = inputs.query.dimensions();
  auto const k = inputs.key.dimensions();
  auto const v = inputs.value.dimensions();
  if (q.size() != 4 || k.size() != 4 || v.size() != 4) {
    return invalid("query, key and value must have rank 4");
  }
  int64_t const batch = q[0];
  int64_t const seqlen_q = q[1];
  int64_t const seqlen_k = k[1];
  int64_t const head_dim = q[3];
  int64_t const head_dim_v = attributes.head_dim_v;
  int64_t const first_column_v = attributes.first_column_v;
  int64_t const columns_v = v[3] * per_element(inputs.value);
  std::string const query = "query " + shape_of(inputs.query);
  std::string const key = "key " + shape_of(inputs.key);
  if (k[0] != batch || v[0] != batch || v[1] != seqlen_k ||
      k[3] * per_element(inputs.key) < head_dim || first_column_v < 0 ||
      first_column_v > columns_v || head_dim_v > columns_v - first_column_v) {
    return invalid(query + ", " + key + " and value " + shape_of(inputs.value) +
                   " do not fit together");
  }
  // Without heads there is nothing to compute, and nothing to divide by.
  int64_t const num_heads_q = attributes.num_heads_q;
  int64_t const num_heads_k = attributes.num_heads_k;
  bool const no_heads = num_heads_q == 0 && num_heads_k == 0;
  if (!no_heads && (num_heads_k <= 0 || num_heads_q <= 0 || num_heads_q % num_heads_k != 0)) {
    return invalid(std::to_string(num_heads_q) + " query heads are no multiple of " +
                   std::to_string(num_heads_k) + " key/value heads");
  }
  auto const heads_fit = [](int64_t first, int64_t count, int64_t available) {
    return first >= 0 && first <= available && count <= available - first;
  };
  if (!heads_fit(attributes.first_head_q, num_heads_q, q[2]) ||
      !heads_fit(attributes.first_head_k, num_heads_k, k[2]) ||
      !heads_fit(attributes.first_head_v, num_heads_k, v[2])) {
    return invalid("the heads asked for are not all in query, key and value");
  }
  if (head_dim <= 0 || head_dim_v <= 0 || head_dim % 8 != 0 || head_dim_v % 8 != 0 ||
      head_dim > 256 || head_dim_v > 256) {
    return invalid("head dims must be positive multiples of 8 up to 256, found " +
                   std::to_string(head_dim) + " and " + std::to_string(head_dim_v));
  }
  auto const dtype = to_dtype(inputs.query.element_type());
  auto const is_of_dtype = [&](ffi::AnyBuffer const& x) {
    bool const words = !float8 && x.element_type() == ffi::DataType::U32;
    return words || x.element_type() == inputs.query.element_type();
  };
  if (!dtype || *dtype == DType::kFloat32 || (*dtype == DType::kFloat8E4M3) != float8 ||
      !is_of_dtype(inputs.key) || !is_of_dtype(inputs.value)) {
    return invalid(float8 ? "query, key and value must all be float8_e4m3fn"
                          : "query, key and value must all be bfloat16 or all float16");
  }
  float const scale = attributes.scale;
  float const soft_cap = attributes.soft_cap;
  if (!(scale > 0.f) || !std::isfinite(scale) || !(soft_cap >= 0.f) || !std::isfinite(soft_cap)) {
    return invalid("scale must be positive and finite, soft_cap finite and not negative");
  }
  constexpr int64_t kMaxTiles = int64_t{1} << 30;  // tiles and rounds are counted in 32 bits
  int64_t const longest = seqlen_q > seqlen_k ? seqlen_q : seqlen_k;
  if (longest > INT32_MAX - 256 || batch > INT32_MAX ||
      batch * num_heads_q > kMaxTiles / (longest / 64 + 1)) {
    return invalid(query + " or " + key + " is too large");
  }

  problem->batch = static_cast<int>(batch);
  problem->seqlen_q = static_cast<int>(seqlen_q);
  problem->seqlen_k = static_cast<int>(seqlen_k);
  problem->num_heads_q = static_cast<int>(num_heads_q);
  problem->num_heads_k = static_cast<int>(num_heads_k);
  problem->head_dim = static_cast<int>(head_dim);
  problem->head_dim_v = static_cast<int>(head_dim_v);
  problem->dtype = *dtype;
  problem->softmax_scale = scale;
  problem->soft_cap = soft_cap;
  int64_t const bytes = float8 ? 1 : 2;
  problem->query = to_operand(inputs.query, attributes.first_head_q, bytes);
  problem->key = to_operand(inputs.key, attributes.first_head_k, bytes);
  problem->value = to_operand(inputs.value, attributes.first_head_v, bytes, first_column_v);

  Mask& mask = problem->mask;
  mask.seqlen_q = problem->seqlen_q;
  mask.seqlen_k = problem->seqlen_k;
  auto const bounded = [](int64_t side) {
    return side > kUnbounded ? kUnbounded : (side < -kUnbounded ? -kUnbounded : side);
  };
  mask.window_left = bounded(attributes.window_left);
  mask.window_right = bounded(attributes.window_right);
  mask.query_offset_stride = inputs.query_offset.element_count() == 1 ? 0 : 1;
  int64_t const offsets = mask.query_offset_stride == 0 ? 1 : batch;
  JAX_FA3_RETURN_IF_FAILED(
      optional_array(inputs.query_offset, "query_offset", offsets, &mask.query_offset));
  JAX_FA3_RETURN_IF_FAILED(
      optional_array(inputs.query_seq_lengths, "query_seq_lengths", batch, &mask.seqlens_q));
  JAX_FA3_RETURN_IF_FAILED(optional_array(inputs.key_value_seq_lengths, "key_value_seq_lengths",
                                          batch, &mask.seqlens_k));
  JAX_FA3_RETURN_IF_FAILED(
      optional_array(inputs.key_begin, "key_begin", batch * seqlen_q, &mask.key_begin));
  return optional_array(inputs.key_end, "key_end", batch * seqlen_q, &mask.key_end);
}

}  // namespace jax_fa3
