// XLA's calls that write new rows into a cache, alone or with attention behind.
#include <algorithm>

#include "append.h"
#include "decode/workspace.h"
#include "ffi.h"
#include "ffi_decode.h"

namespace jax_fa3 {

struct AppendAttributes {
  int64_t kv_layout;
  int64_t rotary_interleaved;
};

struct AppendAndAttendAttributes : DecodeAttributes {
  int64_t rotary_interleaved;
};

namespace {

// That the result is the operand, which is written where it is.
ffi::Error check_same(Array const& before, Array const& after) {
  bool const same =
      before.bytes == after.bytes && before.dtype == after.dtype &&
      std::equal(before.dims.begin(), before.dims.end(), after.dims.begin(), after.dims.end());
  if (!same) return wrong(after, "shape " + shape_of(after), shape_of(before));
  if (before.bytes > 0 && before.data != after.data) {
    return wrong(after, "memory of its own", std::string("that of ") + before.name);
  }
  return ffi::Error::Success();
}

ffi::Error check_dtypes(Appending const& x) {
  bool const converts = x.key.dtype != x.key_cache.dtype;
  bool const computes = x.key.dtype == ffi::DataType::BF16 || x.key.dtype == ffi::DataType::F16;
  if (x.value.dtype != x.key.dtype) return wrong(x.value, "another dtype", "key's");
  if (converts && (!computes || x.key_cache.dtype != ffi::DataType::F8E4M3FN)) {
    return wrong(x.key_cache, "another dtype", "key's, or float8_e4m3fn for 16 bits");
  }
  if (!converts && !(x.key_scale.is_absent() && x.value_scale.is_absent()) &&
      x.key.dtype != ffi::DataType::F8E4M3FN) {
    Array const& given = x.key_scale.is_absent() ? x.value_scale : x.key_scale;
    return wrong(given, "shape " + shape_of(given), "none: caches of key's dtype");
  }
  if (!computes && !x.rotary_cos.is_absent()) {
    return wrong(x.key, "what is not 16 bits", "bfloat16 or float16, to be rotated");
  }
  return ffi::Error::Success();
}

ffi::Error to_tables(Appending const& x, Dims const& dims, int64_t interleaved,
                     RotaryTables* tables) {
  if (x.rotary_cos.is_absent() != x.rotary_sin.is_absent() ||
      x.rotary_cos.dtype != x.rotary_sin.dtype) {
    return wrong(x.rotary_sin, "another shape or dtype", "those of rotary_cos");
  }
  if (x.rotary_cos.is_absent()) return ffi::Error::Success();
  int64_t const positions = x.rotary_cos.dims[0];
  int64_t const pairs = x.rotary_cos.dims[1];
  if (2 * pairs > dims('h') || positions > INT32_MAX) {
    return wrong(x.rotary_cos, "shape " + shape_of(x.rotary_cos),
                 "at most half of the head dim " + std::to_string(dims('h')) + " as columns");
  }
  bool const is_fp32 = x.rotary_cos.dtype == ffi::DataType::F32;
  *tables = {x.rotary_cos.data,           x.rotary_sin.data,       is_fp32,
             static_cast<int>(positions), static_cast<int>(pairs), interleaved != 0};
  return ffi::Error::Success();
}

// query: what is rotated, or an absent one.
ffi::Error to_problem(Appending const& x, Dims const& dims, Cache const& cache, int64_t interleaved,
                      Array const& query, AppendProblem* problem) {
  JAX_FA3_RETURN_IF_FAILED(check_dtypes(x));
  JAX_FA3_RETURN_IF_FAILED(to_cache_problem(x, x.key, cache, dims, problem));
  problem->sequences.key_begin = nullptr;
  constexpr int64_t kMostNumbers = 1 << 25;  // of a row, so that those of a CTA's rows fit 32 bits
  int64_t const heads_q = query.is_absent() ? 0 : dims('n');
  double const numbers =
      double(dims('k')) * double(dims('h') + dims('v')) + double(heads_q) * double(dims('h'));
  if (numbers > kMostNumbers) {
    return wrong(x.key, "shape " + shape_of(x.key), "fewer heads or columns");
  }
  problem->num_heads_q = static_cast<int>(heads_q);
  JAX_FA3_RETURN_IF_FAILED(to_dtype(x.key, &problem->dtype));
  problem->key = x.key.data;
  problem->value = x.value.data;
  JAX_FA3_RETURN_IF_FAILED(to_tables(x, dims, interleaved, &problem->tables));
  if (query.is_absent() != x.rotated_query.is_absent() ||
      (problem->tables.cos == nullptr && !x.rotated_query.is_absent())) {
    return wrong(x.rotated_query, "shape " + shape_of(x.rotated_query),
                 "query's where it is rotated, else none");
  }
  problem->query = query.data;
  problem->rotated_query = x.rotated_query.data;
  problem->positions = x.positions.ints();
  return ffi::Error::Success();
}

ffi::Error append_impl(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                       AppendAttributes attributes) {
  Dims dims;
  Appending x;
  JAX_FA3_RETURN_IF_FAILED(unpack(kAppend, operands, results, &dims, &x));
  JAX_FA3_RETURN_IF_FAILED(check_same(x.key_cache, x.new_key_cache));
  JAX_FA3_RETURN_IF_FAILED(check_same(x.value_cache, x.new_value_cache));
  if (x.key.is_absent() || x.value.is_absent()) return wrong(x.key, "nothing", "new rows");
  if (dims('b') == 0) return wrong(x.lengths, "no sequences", "at least one");
  Cache cache{};
  AppendProblem problem{};
  JAX_FA3_RETURN_IF_FAILED(
      to_cache(x, attributes.kv_layout, dims('k'), dims('h'), dims('v'), &cache));
  JAX_FA3_RETURN_IF_FAILED(
      to_problem(x, dims, cache, attributes.rotary_interleaved, x.query, &problem));
  JAX_FA3_RETURN_IF_FAILED(check_device(stream));
  return cuda_status(launch_append(problem, *stream));
}

ffi::Error append_and_attend_impl(Stream stream, ffi::RemainingArgs operands,
                                  ffi::RemainingRets results,
                                  AppendAndAttendAttributes attributes) {
  Dims dims;
  Appending x;
  Cache cache{};
  decode::Problem problem{};
  AppendProblem append{};
  JAX_FA3_RETURN_IF_FAILED(check_attributes(attributes, &dims));
  JAX_FA3_RETURN_IF_FAILED(unpack(kAppendAndAttend, operands, results, &dims, &x));
  JAX_FA3_RETURN_IF_FAILED(check_same(x.key_cache, x.new_key_cache));
  JAX_FA3_RETURN_IF_FAILED(check_same(x.value_cache, x.new_value_cache));
  if (x.out.is_absent()) return wrong(x.out, "nothing", "rows");
  JAX_FA3_RETURN_IF_FAILED(to_problem(x, attributes, dims, &cache, &problem));
  Array const query = x.rotary_cos.is_absent() ? x.rotary_cos : x.query;
  JAX_FA3_RETURN_IF_FAILED(
      to_problem(x, dims, cache, attributes.rotary_interleaved, query, &append));
  problem.appended = true;
  if (!query.is_absent()) problem.query = x.rotated_query.data;
  JAX_FA3_RETURN_IF_FAILED(check_device(stream));
  cudaError_t const error = launch_append(append, *stream);
  return error == cudaSuccess ? launch(problem, *stream) : cuda_status(error);
}

}  // namespace
}  // namespace jax_fa3

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa3::AppendAttributes,
                                      xla::ffi::StructMember<int64_t>("kv_layout"),
                                      xla::ffi::StructMember<int64_t>("rotary_interleaved"));

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa3::AppendAndAttendAttributes, JAX_FA3_DECODE_ATTRIBUTES,
                                      xla::ffi::StructMember<int64_t>("rotary_interleaved"));

JAX_FA3_HANDLER(jax_fa3_append, jax_fa3::append_impl, .Attrs<jax_fa3::AppendAttributes>());
JAX_FA3_HANDLER(jax_fa3_append_and_attend, jax_fa3::append_and_attend_impl,
                .Attrs<jax_fa3::AppendAndAttendAttributes>());
