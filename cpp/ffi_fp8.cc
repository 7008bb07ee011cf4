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

// Scales are [b, blocks of rows, heads].
template <class Buffer>
bool scales_fit(Buffer const& scales, int64_t batch, int64_t rows, int64_t heads) {
  auto const dims = scales.dimensions();
  return dims.size() == 3 && dims[0] == batch && dims[1] == ceil_div(rows, fp8::kBlock) &&
         dims[2] == heads;
}

ffi::Error fwd_fp8_impl(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                        ffi::AnyBuffer value, FloatBuffer query_scale, FloatBuffer key_scale,
                        FloatBuffer value_scale, Int32Buffer query_offset,
                        Int32Buffer query_seq_lengths, Int32Buffer key_value_seq_lengths,
                        Int32Buffer key_begin, Int32Buffer key_end, AnyResult out, FloatResult lse,
                        ffi::Result<Int32Buffer> counters, AnyResult transposed_value,
                        Attributes attributes) {
  JAX_FA3_RETURN_IF_FAILED(check_device());
  Inputs inputs{query,     key,    value, query_offset, query_seq_lengths, key_value_seq_lengths,
                key_begin, key_end};
  fp8::Problem problem{};
  Problem& p = problem.forward;
  JAX_FA3_RETURN_IF_FAILED(to_problem(inputs, attributes, &p, true));
  if (p.head_dim != p.head_dim_v || p.head_dim % 16 != 0 || p.head_dim < 64) {
    return invalid("the FP8 kernels take one head dim, a multiple of 16 from 64 on, found " +
                   std::to_string(p.head_dim) + " and " + std::to_string(p.head_dim_v));
  }
  if (attributes.first_head_q != 0 || attributes.first_head_k != 0 ||
      attributes.first_head_v != 0) {
    return invalid("FP8 operands are not packed");
  }
  if (!scales_fit(query_scale, p.batch, p.seqlen_q, p.num_heads_q) ||
      !scales_fit(key_scale, p.batch, p.seqlen_k, p.num_heads_k) ||
      !scales_fit(value_scale, p.batch, p.seqlen_k, p.num_heads_k)) {
    return invalid("scales " + shape_of(query_scale) + ", " + shape_of(key_scale) + ", " +
                   shape_of(value_scale) + " do not fit query " + shape_of(query) + " and key " +
                   shape_of(key));
  }
  auto const out_dtype = to_dtype(out->element_type());
  if (!out_fits(p, *out, *lse) || !out_dtype || *out_dtype == DType::kFloat8E4M3) {
    return invalid("out " + shape_of(*out) + " or lse " + shape_of(*lse) + " does not fit query " +
                   shape_of(query) + " and value " + shape_of(value));
  }
  int64_t const blocks = int64_t{ceil_div(p.seqlen_k, fp8::kBlock)} * p.batch * p.num_heads_k;
  if (static_cast<int64_t>(counters->element_count()) < 2 + blocks ||
      static_cast<int64_t>(transposed_value->size_bytes()) < blocks * fp8::kBlock * p.head_dim) {
    return invalid("the workspace is too small");
  }
  p.out_dtype = *out_dtype;
  p.out = to_operand(*out, 0, 0);
  p.lse = lse->typed_data();
  p.tile_counter = problem.counters = counters->typed_data();
  problem.query_scale = query_scale.typed_data();
  problem.key_scale = key_scale.typed_data();
  problem.value_scale = value_scale.typed_data();
  problem.transposed_value = static_cast<uint8_t*>(transposed_value->untyped_data());
  if (out->element_count() == 0) return ffi::Error::Success();
  cudaError_t error = cudaSuccess;
  return launch_fp8(problem, stream, &error) ? cuda_status(error) : not_built(p);
}

ffi::Error quantize_impl(cudaStream_t stream, ffi::AnyBuffer x, FloatBuffer signs,
                         Int32Buffer lengths, AnyResult quantized, FloatResult scales) {
  JAX_FA3_RETURN_IF_FAILED(check_device());
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
  auto const count = [](auto const& buffer) {
    return static_cast<int64_t>(buffer.element_count());
  };
  if ((count(signs) != 0 && count(signs) != head_dim) ||
      (count(lengths) != 0 && count(lengths) != batch) ||
      quantized->element_type() != ffi::DataType::F8E4M3FN || count(*quantized) != count(x) ||
      !scales_fit(*scales, batch, seqlen, heads)) {
    return invalid("signs " + shape_of(signs) + ", lengths " + shape_of(lengths) + ", result " +
                   shape_of(*quantized) + " or scales " + shape_of(*scales) + " does not fit x " +
                   shape_of(x));
  }
  if (count(x) == 0) return ffi::Error::Success();
  if (seqlen > INT32_MAX - 256 || batch * heads > INT32_MAX / (seqlen / fp8::kBlock + 1)) {
    return invalid("x " + shape_of(x) + " is too large");
  }
  fp8::Quantize const problem{static_cast<int>(batch),
                              static_cast<int>(seqlen),
                              static_cast<int>(heads),
                              static_cast<int>(head_dim),
                              static_cast<int>(head_dim & -head_dim),
                              *dtype,
                              x.untyped_data(),
                              count(signs) == 0 ? nullptr : signs.typed_data(),
                              count(lengths) == 0 ? nullptr : lengths.typed_data(),
                              static_cast<uint8_t*>(quantized->untyped_data()),
                              scales->typed_data()};
  return cuda_status(fp8::launch(problem, stream));
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
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attrs<jax_fa3::Attributes>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_quantize, jax_fa3::quantize_impl,
                              JAX_FA3_BIND.Arg<xla::ffi::AnyBuffer>()
                                  .Arg<jax_fa3::FloatBuffer>()
                                  .Arg<jax_fa3::Int32Buffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<jax_fa3::FloatBuffer>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
