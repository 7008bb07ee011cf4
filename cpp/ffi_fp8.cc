// XLA's FP8 calls: the forward on e4m3 operands, and what makes them.
#include "dispatch.h"
#include "ffi.h"
#include "ffi_call.h"
#include "fp8/quantize.h"
#include "plan.h"

namespace jax_fa3 {
namespace {

using AnyResult = ffi::Result<ffi::AnyBuffer>;
using FloatResult = ffi::Result<FloatBuffer>;
using ByteBuffer = ffi::Buffer<ffi::DataType::U8>;
using ByteResult = ffi::Result<ByteBuffer>;

// [b, blocks of rows, heads].
ffi::Error check_scales(View const& scales, int64_t batch, int64_t rows, int64_t heads) {
  return check_shape(scales, {batch, (rows + fp8::kBlock - 1) / fp8::kBlock, heads});
}

ffi::Error fwd_fp8_impl(Stream stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                        ffi::AnyBuffer value, FloatBuffer query_scale, FloatBuffer key_scale,
                        FloatBuffer value_scale, Int32Buffer query_offset,
                        Int32Buffer query_seq_lengths, Int32Buffer key_value_seq_lengths,
                        Int32Buffer key_begin, Int32Buffer key_end, AnyResult out, FloatResult lse,
                        ffi::Result<Int32Buffer> counters, ByteResult transposed_value,
                        Attributes attributes) {
  Inputs inputs{query,     key,    value, query_offset, query_seq_lengths, key_value_seq_lengths,
                key_begin, key_end};
  fp8::Problem problem{};
  Problem& p = problem.forward;
  JAX_FA3_RETURN_IF_FAILED(to_problem(inputs, attributes, &p, true));
  if (p.head_dim != p.head_dim_v || p.head_dim % 16 != 0 || p.head_dim < 64) {
    return invalid("the FP8 kernels take one head dim, a multiple of 16 from 64 on, found " +
                   std::to_string(p.head_dim) + " and " + std::to_string(p.head_dim_v));
  }
  JAX_FA3_RETURN_IF_FAILED(
      check_shape(view("query", query), {p.batch, p.seqlen_q, p.num_heads_q, p.head_dim}));
  for (View const& x : {view("key", key), view("value", value)}) {
    JAX_FA3_RETURN_IF_FAILED(check_shape(x, {p.batch, p.seqlen_k, p.num_heads_k, p.head_dim}));
  }
  View const scales[] = {view("query_scale", query_scale), view("key_scale", key_scale),
                         view("value_scale", value_scale)};
  JAX_FA3_RETURN_IF_FAILED(check_scales(scales[0], p.batch, p.seqlen_q, p.num_heads_q));
  JAX_FA3_RETURN_IF_FAILED(check_scales(scales[1], p.batch, p.seqlen_k, p.num_heads_k));
  JAX_FA3_RETURN_IF_FAILED(check_scales(scales[2], p.batch, p.seqlen_k, p.num_heads_k));
  JAX_FA3_RETURN_IF_FAILED(check_out(p, view("out", *out)));
  JAX_FA3_RETURN_IF_FAILED(check_rows(p, view("lse", *lse)));
  auto const out_dtype = to_dtype(out->element_type());
  if (!out_dtype || *out_dtype == DType::kFloat8E4M3) {
    return invalid("out must be bfloat16, float16 or float32");
  }
  View const workspace[] = {view("counters", *counters),
                            view("transposed_value", *transposed_value)};
  int64_t const blocks = int64_t{ceil_div(p.seqlen_k, fp8::kBlock)} * p.batch * p.num_heads_k;
  if (static_cast<int64_t>(counters->element_count()) < 2 + blocks ||
      static_cast<int64_t>(transposed_value->size_bytes()) < blocks * fp8::kBlock * p.head_dim) {
    return invalid("the workspace is too small");
  }
  JAX_FA3_RETURN_IF_FAILED(check_aligned(workspace[1]));
  JAX_FA3_RETURN_IF_FAILED(
      check_apart(inputs, {view("out", *out), view("lse", *lse), workspace[0], workspace[1]},
                  {scales[0], scales[1], scales[2]}));
  p.out_dtype = *out_dtype;
  p.out = to_operand(*out, 0, 0);
  p.lse = lse->typed_data();
  p.tile_counter = problem.counters = counters->typed_data();
  problem.query_scale = query_scale.typed_data();
  problem.key_scale = key_scale.typed_data();
  problem.value_scale = value_scale.typed_data();
  problem.transposed_value = transposed_value->typed_data();
  if (out->element_count() == 0) return ffi::Error::Success();
  JAX_FA3_RETURN_IF_FAILED(check_device(stream));
  cudaError_t error = cudaSuccess;
  return launch_fp8(problem, *stream, &error) ? cuda_status(error) : not_built(p);
}

ffi::Error quantize_impl(Stream stream, ffi::AnyBuffer x, FloatBuffer signs, Int32Buffer lengths,
                         AnyResult quantized, FloatResult scales) {
  auto const dims = x.dimensions();
  auto const dtype = to_dtype(x.element_type());
  if (dims.size() != 4 || !dtype || (*dtype != DType::kBFloat16 && *dtype != DType::kFloat16)) {
    return invalid("x " + shape_of(x) + " must be [b, t, n, h], bfloat16 or float16");
  }
  auto const [batch, seqlen, heads, head_dim] = std::tuple{dims[0], dims[1], dims[2], dims[3]};
  if (head_dim <= 0 || head_dim > 256 || head_dim % 16 != 0) {
    return invalid("head dim must be a multiple of 16 up to 256, found " +
                   std::to_string(head_dim));
  }
  View const result = view("quantized", *quantized);
  JAX_FA3_RETURN_IF_FAILED(check_vectors(view("x", x)));
  JAX_FA3_RETURN_IF_FAILED(check_optional(view("signs", signs), {head_dim}));
  JAX_FA3_RETURN_IF_FAILED(check_optional(view("lengths", lengths), {batch}));
  JAX_FA3_RETURN_IF_FAILED(check_shape(result, {batch, seqlen, heads, head_dim}));
  JAX_FA3_RETURN_IF_FAILED(check_vectors(result));
  JAX_FA3_RETURN_IF_FAILED(check_scales(view("scales", *scales), batch, seqlen, heads));
  if (result.dtype != ffi::DataType::F8E4M3FN) return invalid("quantized must be float8_e4m3fn");
  JAX_FA3_RETURN_IF_FAILED(
      check_apart({result, view("scales", *scales)},
                  {view("x", x), view("signs", signs), view("lengths", lengths)}));
  if (seqlen > INT32_MAX - 256 || batch * heads > INT32_MAX / (seqlen / fp8::kBlock + 1)) {
    return invalid("x " + shape_of(x) + " is too large");
  }
  if (is_absent(x)) return ffi::Error::Success();
  JAX_FA3_RETURN_IF_FAILED(check_device(stream));
  fp8::Quantize const problem{static_cast<int>(batch),
                              static_cast<int>(seqlen),
                              static_cast<int>(heads),
                              static_cast<int>(head_dim),
                              static_cast<int>(head_dim & -head_dim),
                              *dtype,
                              x.untyped_data(),
                              is_absent(signs) ? nullptr : signs.typed_data(),
                              is_absent(lengths) ? nullptr : lengths.typed_data(),
                              static_cast<uint8_t*>(quantized->untyped_data()),
                              scales->typed_data()};
  return cuda_status(fp8::launch_quantize(problem, *stream));
}

}  // namespace
}  // namespace jax_fa3

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_fwd_fp8, jax_fa3::fwd_fp8_impl,
                              JAX_FA3_BIND.Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<jax_fa3::FloatBuffer>()
                                  .Arg<jax_fa3::FloatBuffer>()
                                  .Arg<jax_fa3::FloatBuffer>()
                                      JAX_FA3_MASKS.Ret<xla::ffi::AnyBuffer>()
                                  .Ret<jax_fa3::FloatBuffer>()
                                  .Ret<jax_fa3::Int32Buffer>()
                                  .Ret<jax_fa3::ByteBuffer>()
                                  .Attrs<jax_fa3::Attributes>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_quantize, jax_fa3::quantize_impl,
                              JAX_FA3_BIND.Arg<xla::ffi::AnyBuffer>()
                                  .Arg<jax_fa3::FloatBuffer>()
                                  .Arg<jax_fa3::Int32Buffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<jax_fa3::FloatBuffer>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
