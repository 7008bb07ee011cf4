// What XLA's calls have in common: buffers and attributes become a Problem.
//
// Python has checked everything already; what is checked again here keeps a caller of the bare
// custom call from reading out of bounds. An error is returned, never thrown, never an abort.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>
#include <string>

#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fa3 {

namespace ffi = xla::ffi;

using Int32Buffer = ffi::Buffer<ffi::DataType::S32>;
using FloatBuffer = ffi::Buffer<ffi::DataType::F32>;

ffi::Error invalid(std::string const& message);
ffi::Error cuda_status(cudaError_t error);

// The kernels hold machine code for sm_90a alone.
ffi::Error check_device();
ffi::Error not_built(Problem const& problem);

std::optional<DType> to_dtype(ffi::DataType type);

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

struct Attributes {
  float scale;
  float soft_cap;
  int64_t window_left, window_right;
  int64_t num_heads_q, num_heads_k;
  int64_t first_head_q, first_head_k, first_head_v;
};

struct Inputs {
  ffi::AnyBuffer query, key, value;
  Int32Buffer query_offset, query_seq_lengths, key_value_seq_lengths, key_begin, key_end;
};

// All of a Problem but out, lse and workspace. Operands are of 16 bits, or e4m3 where that is
// wanted.
ffi::Error to_problem(Inputs& inputs, Attributes const& attributes, Problem* problem,
                      bool float8 = false);

// Whether out is [b, t, n, v] and lse [b, n, t].
template <class Out, class Lse>
bool out_fits(Problem const& p, Out const& out, Lse const& lse) {
  auto const o = out.dimensions();
  auto const l = lse.dimensions();
  return o.size() == 4 && l.size() == 3 && o[0] == p.batch && o[1] == p.seqlen_q &&
         o[2] == p.num_heads_q && o[3] == p.head_dim_v && l[0] == p.batch &&
         l[1] == p.num_heads_q && l[2] == p.seqlen_q;
}

#define JAX_FA3_RETURN_IF_FAILED(expression)              \
  if (ffi::Error error = (expression); error.failure()) { \
    return error;                                         \
  }

}  // namespace jax_fa3

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_fa3::Attributes, xla::ffi::StructMember<float>("scale"),
                                      xla::ffi::StructMember<float>("soft_cap"),
                                      xla::ffi::StructMember<int64_t>("window_left"),
                                      xla::ffi::StructMember<int64_t>("window_right"),
                                      xla::ffi::StructMember<int64_t>("num_heads_q"),
                                      xla::ffi::StructMember<int64_t>("num_heads_k"),
                                      xla::ffi::StructMember<int64_t>("first_head_q"),
                                      xla::ffi::StructMember<int64_t>("first_head_k"),
                                      xla::ffi::StructMember<int64_t>("first_head_v"));

// The mask's arrays: query_offset, query_seq_lengths, key_value_seq_lengths, key_begin, key_end.
#define JAX_FA3_MASKS              \
  .Arg<jax_fa3::Int32Buffer>()     \
      .Arg<jax_fa3::Int32Buffer>() \
      .Arg<jax_fa3::Int32Buffer>() \
      .Arg<jax_fa3::Int32Buffer>() \
      .Arg<jax_fa3::Int32Buffer>()
#define JAX_FA3_BIND xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
