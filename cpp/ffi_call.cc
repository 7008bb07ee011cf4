// ffi_call.h: the checks that calls have in common, and what they put into a Problem.
#include "ffi_call.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernel_sizes.h"
#include "plan.h"

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

ffi::Error to_dtype(Array const& x, DType* dtype) {
  switch (x.dtype) {
    case ffi::DataType::BF16:
      *dtype = DType::kBFloat16;
      return ffi::Error::Success();
    case ffi::DataType::F16:
      *dtype = DType::kFloat16;
      return ffi::Error::Success();
    case ffi::DataType::F32:
      *dtype = DType::kFloat32;
      return ffi::Error::Success();
    case ffi::DataType::F8E4M3FN:
      *dtype = DType::kFloat8E4M3;
      return ffi::Error::Success();
    default:
      return wrong(x, "another dtype", "one that kernels compute with");
  }
}

namespace {

// Numbers of an operand in one of its array's elements: two of 16 bits make a word.
int64_t per_element(Array const& x) { return x.dtype == ffi::DataType::U32 ? 2 : 1; }

ffi::Error check_heads(Array const& x, int64_t first, int64_t count) {
  int64_t const heads = x.dims[2];
  if (first <= heads && count <= heads - first) return ffi::Error::Success();
  return wrong(x, "shape " + shape_of(x),
               std::to_string(count) + " heads from head " + std::to_string(first) + " on");
}

// `first`: of the columns that are meant.
ffi::Error check_columns(Array const& x, int64_t first, int64_t count) {
  int64_t const columns = x.dims[3] * per_element(x);
  int64_t const bytes = static_cast<int64_t>(ffi::ByteWidth(x.dtype)) / per_element(x);
  if (count <= columns - first && first * bytes % 16 == 0) return ffi::Error::Success();
  return wrong(x, "shape " + shape_of(x),
               std::to_string(count) + " columns from column " + std::to_string(first) +
                   " on, which is at a multiple of 16 bytes");
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

ffi::Error check_attributes(Attributes const& attributes, Dims* dims) {
  auto const fits = [](int64_t x) { return x >= 0 && x <= INT32_MAX; };
  float const scale = attributes.scale;
  float const soft_cap = attributes.soft_cap;
  if (!is_positive_float(scale) || !(is_zero(soft_cap) || is_positive_float(soft_cap))) {
    return invalid("scale and soft_cap: got " + std::to_string(scale) + " and " +
                   std::to_string(soft_cap) + ", wanted positive float32, or 0 for no soft cap");
  }
  int64_t const heads_q = attributes.num_heads_q;
  int64_t const heads_k = attributes.num_heads_k;
  for (int64_t const x :
       {heads_q, heads_k, attributes.first_head_q, attributes.first_head_k, attributes.first_head_v,
        attributes.head_dim_v, attributes.first_column_v}) {
    if (fits(x)) continue;
    return invalid("attributes: got " + std::to_string(x) +
                   " for heads, a head dim or a column, wanted an int32 >= 0");
  }
  if (attributes.dropout < 0 || attributes.dropout >= kDropoutWhole) {
    return invalid("dropout: got " + std::to_string(attributes.dropout) +
                   ", wanted at least 0 and less than 2^18");
  }
  dims->set('n', heads_q);
  dims->set('k', heads_k);
  dims->set('v', attributes.head_dim_v);
  // Without query heads there is nothing to compute, and nothing to divide by.
  if (heads_q == 0 || (heads_k > 0 && heads_q % heads_k == 0)) return ffi::Error::Success();
  return invalid("num_heads_q: got " + std::to_string(heads_q) + ", wanted a multiple of the " +
                 std::to_string(heads_k) + " key/value heads");
}

Operand to_operand(Array const& x, int64_t first_head, int64_t first_column) {
  int64_t const heads = x.dims[2];
  int64_t const columns = x.dims[3] * per_element(x);
  int64_t const size = static_cast<int64_t>(ffi::ByteWidth(x.dtype)) / per_element(x);
  return {static_cast<char*>(x.data) + (first_head * columns + first_column) * size,
          x.dims[1] * heads * columns, heads * columns, columns};
}

PerHead to_per_head(Array const& x) {
  bool const same_for_all = x.is_absent() || x.dims[0] == 1;
  return {x.floats(), same_for_all ? 0 : static_cast<int>(x.dims[1])};
}

HeadOperands to_head_operands(HeadArrays const& x) {
#define JAX_FA3_OPERAND(name, ...) to_per_head(x.name),
  return {JAX_FA3_PER_HEAD(JAX_FA3_OPERAND)};
#undef JAX_FA3_OPERAND
}

ffi::Error set_bias(Array const& bias, Problem* problem) {
  if (bias.dims.size() != 4) return ffi::Error::Success();  // none
  int64_t const rows = bias.dims[2];
  int64_t const columns = bias.dims[3];
  if (columns < problem->seqlen_k || columns > INT32_MAX / 2) {
    return wrong(bias, "shape " + shape_of(bias),
                 "at least " + std::to_string(problem->seqlen_k) + " columns, one for each key");
  }
  if (bias.is_absent()) return ffi::Error::Success();
  if (!takes_bias(std::max(problem->head_dim, problem->head_dim_v))) {
    return wrong(bias, "one beside so wide heads", "none");
  }
  if (problem->soft_cap != 0.f) return wrong(bias, "one beside a soft cap", "none");
  problem->bias = {bias.data,
                   bias.dims[0] == 1 ? 0 : bias.dims[1] * rows * columns,
                   bias.dims[1] == 1 ? 0 : rows * columns,
                   rows == 1 ? 0 : columns,
                   static_cast<int>(columns),
                   bias.dtype == ffi::DataType::F32};
  return ffi::Error::Success();
}

ffi::Error set_mask_bits(Array const& bits, Array const& blocks, int rows, int columns,
                         int columns_per_block, Problem* problem) {
  if (bits.is_absent() != blocks.is_absent()) {
    return wrong(blocks, "shape " + shape_of(blocks), "one that goes with mask_bits");
  }
  if (bits.is_absent()) return ffi::Error::Success();
  if (!takes_mask_bits(std::max(problem->head_dim, problem->head_dim_v))) {
    return wrong(bits, "some beside so wide heads", "none");
  }
  if (problem->bias.data != nullptr) return wrong(bits, "some beside a bias", "none");
  if (problem->dropout != 0) return wrong(bits, "some beside dropout", "none");
  int64_t const chunks = bits.dims[3] / 4;
  int64_t const row_blocks = blocks.dims[2];
  int64_t const words = blocks.dims[3];
  int64_t const least_blocks = ceil_div(rows, kMaskBlock);
  int64_t const least_words = ceil_div(ceil_div(columns, columns_per_block), 32);
  bool const rows_are_right =
      bits.dims[2] == 1 ? row_blocks == 1
                        : bits.dims[2] >= least_blocks * kMaskBlock && row_blocks >= least_blocks;
  bool const columns_are_right =
      chunks == 1 ? words == 1 : chunks >= ceil_div(columns, kMaskBlock) && words >= least_words;
  if (!rows_are_right || !columns_are_right || bits.dims[3] % 4 != 0 || blocks.dims[4] != 2 ||
      bits.dims[0] != blocks.dims[0] || bits.dims[1] != blocks.dims[1]) {
    return wrong(bits, "shapes " + shape_of(bits) + " and " + shape_of(blocks),
                 "those of a mask of " + std::to_string(rows) + " x " + std::to_string(columns));
  }
  bool const of_batch = bits.dims[0] != 1;
  bool const of_head = bits.dims[1] != 1;
  bool const of_row = bits.dims[2] != 1;
  MaskBits& mask = problem->mask_bits;
  mask.bits = static_cast<uint32_t const*>(bits.data);
  mask.blocks = static_cast<uint32_t const*>(blocks.data);
  int64_t const bits_of_head = bits.dims[2] * bits.dims[3];
  mask.bits_of_batch = of_batch ? bits.dims[1] * bits_of_head : 0;
  mask.bits_of_head = of_head ? bits_of_head : 0;
  mask.bits_of_row = of_row ? bits.dims[3] : 0;
  mask.bits_of_chunk = chunks == 1 ? 0 : 4;
  mask.blocks_of_batch = of_batch ? blocks.dims[1] * row_blocks * words : 0;
  mask.blocks_of_head = of_head ? row_blocks * words : 0;
  mask.blocks_of_row = row_blocks == 1 ? 0 : words;
  mask.blocks_of_word = words == 1 ? 0 : 1;
  return ffi::Error::Success();
}

ffi::Error set_dropout(Array const& words, int64_t dropout, Problem* problem) {
  if (dropout == 0) return words.is_absent() ? ffi::Error::Success() : wrong(words, "some", "none");
  if (words.dims.size() != 3 || words.dims[2] != 2) {
    return wrong(words, "shape " + shape_of(words), "two words for each head");
  }
  if (!takes_dropout(size_for(problem->head_dim, problem->head_dim_v))) {
    return wrong(words, "some beside head dim " + std::to_string(problem->head_dim), "none");
  }
  if (problem->bias.data != nullptr) return wrong(words, "some beside a bias", "none");
  if (problem->mask_bits.bits != nullptr) return wrong(words, "some beside a dense mask", "none");
  if (problem->seqlen_k > kMostKeysOfSum) return wrong(words, "some beside so many keys", "none");
  problem->dropout_words = words.words();
  problem->dropout = static_cast<int>(dropout);
  return ffi::Error::Success();
}

ffi::Error check_alibi(Array const& slopes, Problem const& problem) {
  if (slopes.is_absent()) return ffi::Error::Success();
  if (!takes_bias(std::max(problem.head_dim, problem.head_dim_v))) {
    return wrong(slopes, "some beside so wide heads", "none");
  }
  bool const is_excluded = problem.soft_cap != 0.f || problem.bias.data != nullptr ||
                           problem.mask_bits.bits != nullptr || problem.dropout != 0;
  if (is_excluded) {
    return wrong(slopes, "some beside a soft cap, a bias, a dense mask or dropout", "none");
  }
  if (problem.seqlen_k > kMostKeysOfSum) return wrong(slopes, "some beside so many keys", "none");
  return ffi::Error::Success();
}

ffi::Error set_relative_bias(Array const& table, Problem* problem) {
  if (table.dims.size() != 4) return ffi::Error::Success();  // none
  int64_t const size = relative_bias_size(problem->seqlen_q, problem->seqlen_k);
  if (table.dims[2] != 2 || table.dims[3] != size || size > INT32_MAX) {
    return wrong(table, "shape " + shape_of(table),
                 "twice " + std::to_string(size) + " entries of each head");
  }
  if (table.is_absent()) return ffi::Error::Success();
  if (!takes_bias(std::max(problem->head_dim, problem->head_dim_v))) {
    return wrong(table, "one beside so wide heads", "none");
  }
  bool const is_excluded = problem->soft_cap != 0.f || problem->bias.data != nullptr ||
                           problem->mask_bits.bits != nullptr || problem->dropout != 0 ||
                           problem->heads.alibi_slopes.exists();
  if (is_excluded) {
    return wrong(table, "one beside a soft cap, a bias, a dense mask, dropout or slopes", "none");
  }
  if (problem->seqlen_k > kMostKeysOfSum) return wrong(table, "one beside so many keys", "none");
  problem->relative_bias = table.floats();
  problem->relative_bias_batch_stride = table.dims[0] == 1 ? 0 : problem->num_heads_q * 2 * size;
  return ffi::Error::Success();
}

ffi::Error to_problem(Inputs const& inputs, Attributes const& attributes, Dims const& dims,
                      Problem* problem) {
  Array const& query = inputs.query;
  Array const& key = inputs.key;
  Array const& value = inputs.value;
  int64_t const num_heads_q = attributes.num_heads_q;
  int64_t const num_heads_k = attributes.num_heads_k;
  int64_t const head_dim = dims('h');
  int64_t const head_dim_v = attributes.head_dim_v;
  JAX_FA3_RETURN_IF_FAILED(check_heads(query, attributes.first_head_q, num_heads_q));
  JAX_FA3_RETURN_IF_FAILED(check_heads(key, attributes.first_head_k, num_heads_k));
  JAX_FA3_RETURN_IF_FAILED(check_heads(value, attributes.first_head_v, num_heads_k));
  JAX_FA3_RETURN_IF_FAILED(check_columns(key, 0, head_dim));
  JAX_FA3_RETURN_IF_FAILED(check_columns(value, attributes.first_column_v, head_dim_v));
  if (head_dim <= 0 || head_dim_v <= 0 || head_dim % 8 != 0 || head_dim_v % 8 != 0 ||
      !kWidest.holds(head_dim, head_dim_v)) {
    return invalid("head dims must be positive multiples of 8 up to " +
                   std::to_string(kWidest.head_dim) + " and " + std::to_string(kWidest.head_dim_v) +
                   ", found " + std::to_string(head_dim) + " and " + std::to_string(head_dim_v));
  }
  constexpr int64_t kMaxTiles = int64_t{1} << 30;  // tiles and rounds are counted in 32 bits
  int64_t const longest = std::max(dims('t'), dims('s'));
  if (longest > INT32_MAX - 256 || dims('b') * num_heads_q > kMaxTiles / (longest / 64 + 1)) {
    return invalid("query " + shape_of(query) + " or key " + shape_of(key) + " is too large");
  }

  problem->batch = static_cast<int>(dims('b'));
  problem->seqlen_q = static_cast<int>(dims('t'));
  problem->seqlen_k = static_cast<int>(dims('s'));
  problem->num_heads_q = static_cast<int>(num_heads_q);
  problem->num_heads_k = static_cast<int>(num_heads_k);
  problem->head_dim = static_cast<int>(head_dim);
  problem->head_dim_v = static_cast<int>(head_dim_v);
  JAX_FA3_RETURN_IF_FAILED(to_dtype(query, &problem->dtype));
  problem->softmax_scale = attributes.scale;
  problem->soft_cap = attributes.soft_cap;
  problem->query = to_operand(query, attributes.first_head_q);
  problem->key = to_operand(key, attributes.first_head_k);
  problem->value = to_operand(value, attributes.first_head_v, attributes.first_column_v);

  Mask& mask = problem->mask;
  mask.seqlen_q = problem->seqlen_q;
  mask.seqlen_k = problem->seqlen_k;
  auto const bounded = [](int64_t side) { return std::clamp(side, -kUnbounded, kUnbounded); };
  mask.window_left = bounded(attributes.window_left);
  mask.window_right = bounded(attributes.window_right);
  mask.query_offset = inputs.query_offset.ints();
  mask.query_offset_stride = inputs.query_offset.size() == 1 ? 0 : 1;
  mask.seqlens_q = inputs.query_seq_lengths.ints();
  mask.seqlens_k = inputs.key_value_seq_lengths.ints();
  mask.key_begin = inputs.key_begin.ints();
  mask.key_end = inputs.key_end.ints();
  return ffi::Error::Success();
}

}  // namespace jax_fa3
