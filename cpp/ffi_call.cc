#include "ffi_call.h"

#include <cstdint>
#include <cstring>

namespace jax_fa3 {

ffi::Error cuda_status(cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_fa3: CUDA: ") + cudaGetErrorString(error));
}

ffi::Error check_device(Stream const& stream) {
  std::string const wanted = ", wanted an NVIDIA Hopper GPU (sm_90): use implementation=\"xla\"";
  auto const refused = [&](std::string const& found) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented, "jax_fa3: device: got " + found + wanted);
  };
  if (!stream) return refused("one that is no CUDA device");
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
  cudaDeviceProp properties{};
  error = cudaGetDeviceProperties(&properties, device);
  return refused("CUDA device " + std::to_string(device) + ", " +
                 (error == cudaSuccess ? properties.name : "") + " (sm_" + std::to_string(major) +
                 std::to_string(minor) + ")");
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

// The data, or null where the array is absent.
ffi::Error optional_array(char const* name, Int32Buffer& buffer,
                          std::initializer_list<int64_t> wanted, int const** data) {
  JAX_FA3_RETURN_IF_FAILED(check_optional(view(name, buffer), wanted));
  *data = is_absent(buffer) ? nullptr : buffer.typed_data();
  return ffi::Error::Success();
}

ffi::Error check_heads(char const* name, ffi::AnyBuffer const& x, int64_t first, int64_t count) {
  int64_t const heads = x.dimensions()[2];
  if (first <= heads && count <= heads - first) return ffi::Error::Success();
  return invalid(std::string(name) + ": got shape " + shape_of(x) + ", wanted " +
                 std::to_string(count) + " heads from head " + std::to_string(first) + " on");
}

// By its bits: XLA's threads may take a subnormal number for 0.
bool is_positive_float(float x) {
  uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits >= 0x00800000u && bits < 0x7f800000u;  // from the least normal number to infinity
}
bool is_zero(float x) {
  uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits == 0;
}

}  // namespace

ffi::Error check_attributes(Attributes const& attributes) {
  auto const fits = [](int64_t x) { return x >= 0 && x <= INT32_MAX; };
  auto const& [scale, soft_cap, window_left, window_right, heads_q, heads_k, first_q, first_k,
               first_v, head_dim_v, column_v] = attributes;
  if (!is_positive_float(scale) || !(is_zero(soft_cap) || is_positive_float(soft_cap))) {
    return invalid("scale and soft_cap: got " + std::to_string(scale) + " and " +
                   std::to_string(soft_cap) + ", wanted positive float32, or 0 for no soft cap");
  }
  for (int64_t const x : {heads_q, heads_k, first_q, first_k, first_v, head_dim_v, column_v}) {
    if (fits(x)) continue;
    return invalid("attributes: got " + std::to_string(x) +
                   " for heads, a head dim or a column, wanted an int32 >= 0");
  }
  // Without query heads there is nothing to compute, and nothing to divide by.
  if (heads_q == 0 || (heads_k > 0 && heads_q % heads_k == 0)) return ffi::Error::Success();
  return invalid("num_heads_q: got " + std::to_string(heads_q) + ", wanted a multiple of the " +
                 std::to_string(heads_k) + " key/value heads");
}

ffi::Error check_apart(Inputs& inputs, std::initializer_list<View> written,
                       std::initializer_list<View> read) {
  JAX_FA3_RETURN_IF_FAILED(check_apart(written, read));
  return check_apart(
      written, {view("query", inputs.query), view("key", inputs.key), view("value", inputs.value),
                view("query_offset", inputs.query_offset),
                view("query_seq_lengths", inputs.query_seq_lengths),
                view("key_value_seq_lengths", inputs.key_value_seq_lengths),
                view("key_begin", inputs.key_begin), view("key_end", inputs.key_end)});
}

ffi::Error to_problem(Inputs& inputs, Attributes const& attributes, Problem* problem, bool float8) {
  JAX_FA3_RETURN_IF_FAILED(check_attributes(attributes));
  int64_t const bytes = float8 ? 1 : 2;
  int64_t const first_column_v = attributes.first_column_v;
  JAX_FA3_RETURN_IF_FAILED(check_vectors(view("query", inputs.query)));
  JAX_FA3_RETURN_IF_FAILED(check_vectors(view("key", inputs.key)));
  JAX_FA3_RETURN_IF_FAILED(check_vectors(view("value", inputs.value), first_column_v * bytes));
  auto const q = inputs.query.dimensions();
  auto const k = inputs.key.dimensions();
  auto const v = inputs.value.dimensions();
  int64_t const batch = q[0];
  int64_t const seqlen_q = q[1];
  int64_t const seqlen_k = k[1];
  int64_t const head_dim = q[3];
  int64_t const head_dim_v = attributes.head_dim_v;
  int64_t const columns_v = v[3] * per_element(inputs.value);
  std::string const query = "query " + shape_of(inputs.query);
  std::string const key = "key " + shape_of(inputs.key);
  if (k[0] != batch || v[0] != batch || v[1] != seqlen_k ||
      k[3] * per_element(inputs.key) < head_dim || head_dim_v > columns_v - first_column_v) {
    return invalid(query + ", " + key + " and value " + shape_of(inputs.value) +
                   " do not fit together");
  }
  int64_t const num_heads_q = attributes.num_heads_q;
  int64_t const num_heads_k = attributes.num_heads_k;
  JAX_FA3_RETURN_IF_FAILED(
      check_heads("query", inputs.query, attributes.first_head_q, num_heads_q));
  JAX_FA3_RETURN_IF_FAILED(check_heads("key", inputs.key, attributes.first_head_k, num_heads_k));
  JAX_FA3_RETURN_IF_FAILED(
      check_heads("value", inputs.value, attributes.first_head_v, num_heads_k));
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
  constexpr int64_t kMaxTiles = int64_t{1} << 30;  // tiles and rounds are counted in 32 bits
  int64_t const longest = seqlen_q > seqlen_k ? seqlen_q : seqlen_k;
  if (longest > INT32_MAX - 256 || batch * num_heads_q > kMaxTiles / (longest / 64 + 1)) {
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
  problem->softmax_scale = attributes.scale;
  problem->soft_cap = attributes.soft_cap;
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
  bool const one_offset = inputs.query_offset.element_count() == 1;
  mask.query_offset_stride = one_offset ? 0 : 1;
  JAX_FA3_RETURN_IF_FAILED(optional_array("query_offset", inputs.query_offset,
                                          {one_offset ? 1 : batch}, &mask.query_offset));
  JAX_FA3_RETURN_IF_FAILED(
      optional_array("query_seq_lengths", inputs.query_seq_lengths, {batch}, &mask.seqlens_q));
  JAX_FA3_RETURN_IF_FAILED(optional_array("key_value_seq_lengths", inputs.key_value_seq_lengths,
                                          {batch}, &mask.seqlens_k));
  JAX_FA3_RETURN_IF_FAILED(
      optional_array("key_begin", inputs.key_begin, {batch, seqlen_q}, &mask.key_begin));
  return optional_array("key_end", inputs.key_end, {batch, seqlen_q}, &mask.key_end);
}

}  // namespace jax_fa3
