// What XLA's calls have in common: buffers and attributes become a Problem.
//
// Python has checked everything already; what is checked again here keeps a caller of the bare
// custom call from reading out of bounds. An error is returned, never thrown, never an abort.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>
#include <string>

#include "ffi_checks.h"
#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fa3 {

using Int32Buffer = ffi::Buffer<ffi::DataType::S32>;
using FloatBuffer = ffi::Buffer<ffi::DataType::F32>;

ffi::Error cuda_status(cudaError_t error);

// XLA's stream; none where the device is no CUDA device. There a call is checked, as tests on a CPU
// do, and then refused.
using Stream = std::optional<cudaStream_t>;
struct StreamOfDevice {};

// What stands before a launch, behind all checks of the call. The kernels hold machine code for
// sm_90a alone.
ffi::Error check_device(Stream const& stream);
ffi::Error not_built(Problem const& problem);

std::optional<DType> to_dtype(ffi::DataType type);

// Numbers of an operand in one of its array's elements: two of 16 bits make a word of 32.
template <class Buffer>
int64_t per_element(Buffer const& buffer) {
  return buffer.element_type() == ffi::DataType::U32 ? 2 : 1;
}

// A [b, t, n, h] operand in row-major order, from head `first_head` and of each head from column
// `first_column` on. Sizes are of the operand's numbers.
template <class Buffer>
Operand to_operand(Buffer& buffer, int64_t first_head, int64_t size, int64_t first_column = 0) {
  auto const dims = buffer.dimensions();
  int64_t const heads = dims[2];
  int64_t const columns = dims[3] * per_element(buffer);
  return {static_cast<char*>(buffer.untyped_data()) + (first_head * columns + first_column) * size,
          dims[1] * heads * columns, heads * columns, columns};
}

struct Attributes {
  float scale;
  float soft_cap;
  int64_t window_left, window_right;
  int64_t num_heads_q, num_heads_k;
  int64_t first_head_q, first_head_k, first_head_v;
  // Of key's and value's columns the first head_dim (which is query's), and the head_dim_v from
  // first_column_v on, are meant: so they may lie side by side in one array.
  int64_t head_dim_v, first_column_v;
};

struct Inputs {
  ffi::AnyBuffer query, key, value;
  Int32Buffer query_offset, query_seq_lengths, key_value_seq_lengths, key_begin, key_end;
};

// Sizes are counted in 32 bits from here on.
ffi::Error check_attributes(Attributes const& attributes);

// All of a Problem but out, lse and workspace, checked. Operands are of 16 bits, key and value also
// in words of 32; or e4m3 where that is wanted.
ffi::Error to_problem(Inputs& inputs, Attributes const& attributes, Problem* problem,
                      bool float8 = false);

// check_apart, where the inputs are read, too.
ffi::Error check_apart(Inputs& inputs, std::initializer_list<View> written,
                       std::initializer_list<View> read);

}  // namespace jax_fa3

template <>
struct xla::ffi::CtxDecoding<jax_fa3::StreamOfDevice> {
  using Type = jax_fa3::Stream;

  static std::optional<Type> Decode(XLA_FFI_Api const* api, XLA_FFI_ExecutionContext* context,
                                    DiagnosticEngine&) {
    XLA_FFI_Stream_Get_Args args{};
    args.struct_size = XLA_FFI_Stream_Get_Args_STRUCT_SIZE;
    args.ctx = context;
    if (XLA_FFI_Error* error = api->XLA_FFI_Stream_Get(&args)) {
      internal::DestroyError(api, error);
      return Type{};
    }
    return Type{static_cast<cudaStream_t>(args.stream)};
  }
};

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_fa3::Attributes, xla::ffi::StructMember<float>("scale"),
    xla::ffi::StructMember<float>("soft_cap"), xla::ffi::StructMember<int64_t>("window_left"),
    xla::ffi::StructMember<int64_t>("window_right"), xla::ffi::StructMember<int64_t>("num_heads_q"),
    xla::ffi::StructMember<int64_t>("num_heads_k"), xla::ffi::StructMember<int64_t>("first_head_q"),
    xla::ffi::StructMember<int64_t>("first_head_k"),
    xla::ffi::StructMember<int64_t>("first_head_v"), xla::ffi::StructMember<int64_t>("head_dim_v"),
    xla::ffi::StructMember<int64_t>("first_column_v"));

// The mask's arrays: query_offset, query_seq_lengths, key_value_seq_lengths, key_begin, key_end.
#define JAX_FA3_MASKS              \
  .Arg<jax_fa3::Int32Buffer>()     \
      .Arg<jax_fa3::Int32Buffer>() \
      .Arg<jax_fa3::Int32Buffer>() \
      .Arg<jax_fa3::Int32Buffer>() \
      .Arg<jax_fa3::Int32Buffer>()
#define JAX_FA3_BIND xla::ffi::Ffi::Bind().Ctx<jax_fa3::StreamOfDevice>()
