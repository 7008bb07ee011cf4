// What XLA's calls have in common: buffers and attributes become a Problem.
//
// Python has checked everything already; what is checked again here keeps a caller of the bare
// custom call from reading out of bounds. An error is returned, never thrown, never an abort.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>
#include <string>

#include "ffi_arrays.h"
#include "ffi_targets.h"
#include "problem.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fa3 {

ffi::Error cuda_status(cudaError_t error);

// XLA's stream; none where the device is no CUDA device. There a call is checked, as tests on a CPU
// do, and then refused.
using Stream = std::optional<cudaStream_t>;
struct StreamOfDevice {};

// What stands before a launch, behind all checks of the call. The kernels hold machine code for
// sm_90a alone.
ffi::Error check_device(Stream const& stream);
ffi::Error not_built(Problem const& problem);

ffi::Error to_dtype(Array const& x, DType* dtype);

// A [b, t, n, h] operand in row-major order, from head `first_head` and of each head from column
// `first_column` on.
Operand to_operand(Array const& x, int64_t first_head = 0, int64_t first_column = 0);

// An [1 or b, n] operand.
PerHead to_per_head(Array const& x);
HeadOperands to_head_operands(HeadArrays const& x);

// The bias, if there is one, checked.
ffi::Error set_bias(Array const& bias, Problem* problem);

// A dense mask's bits, if there is one, checked; of so many rows and columns.
ffi::Error set_mask_bits(Array const& bits, Array const& blocks, int rows, int columns,
                         int columns_per_block, Problem* problem);

// Dropout, of which `dropout` is the attribute, if there is any, checked.
ffi::Error set_dropout(Array const& words, int64_t dropout, Problem* problem);

// Whether what stands in the Problem goes with slopes, if there are any.
ffi::Error check_alibi(Array const& slopes, Problem const& problem);

// A bias by distance, if there is one, checked.
ffi::Error set_relative_bias(Array const& table, Problem* problem);

struct Attributes {
  float scale;
  float soft_cap;
  int64_t window_left, window_right;
  int64_t num_heads_q, num_heads_k;
  int64_t first_head_q, first_head_k, first_head_v;
  // Of key's and value's columns the first head_dim (which is query's), and the head_dim_v from
  // first_column_v on, are meant: so they may lie side by side in one array.
  int64_t head_dim_v, first_column_v;
  int64_t dropout;  // of 2^18 weights so many are dropped
};

// Sizes are counted in 32 bits from here on. They are the dimensions n, k and v.
ffi::Error check_attributes(Attributes const& attributes, Dims* dims);

// All of a Problem but out, lse and workspace, checked.
ffi::Error to_problem(Inputs const& inputs, Attributes const& attributes, Dims const& dims,
                      Problem* problem);

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
    xla::ffi::StructMember<int64_t>("first_column_v"), xla::ffi::StructMember<int64_t>("dropout"));

// A handler of (Stream, operands, results, ...), which launches and returns: CUDA graphs can hold
// it.
#define JAX_FA3_HANDLER(symbol, function, ...)                                             \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                           \
      symbol, function,                                                                    \
      xla::ffi::Ffi::Bind().Ctx<jax_fa3::StreamOfDevice>().RemainingArgs().RemainingRets() \
          __VA_ARGS__,                                                                     \
      {xla::ffi::Traits::kCmdBufferCompatible})
