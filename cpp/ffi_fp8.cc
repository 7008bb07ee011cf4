// XLA's FP8 calls: the forward on e4m3 operands, and what makes them.
#include "dispatch.h"
#include "ffi.h"
#include "ffi_call.h"
#include "fp8/quantize.h"
#include "plan.h"

namespace jax_fa3 {
namespace {

// That one of the two is there, and that V^T, [., ., ., whole blocks of the length], has all keys.
ffi::Error check_one(Array const& plain, Array const& transposed, int64_t blocks) {
  if (plain.is_absent() == transposed.is_absent()) {
    return wrong(transposed, plain.is_absent() ? "none" : "one",
                 "it or " + std::string(plain.name));
  }
  if (transposed.is_absent() || transposed.dims[3] == blocks * fp8::kBlock) {
    return ffi::Error::Success();
  }
  return wrong(transposed, "shape " + shape_of(transposed),
               std::to_string(blocks * fp8::kBlock) + " columns");
}

ffi::Error fwd_fp8_impl(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                        Attributes attributes) {
  Dims dims;
  Fp8Forward x;
  fp8::Problem problem{};
  Problem& p = problem.forward;
  JAX_FA3_RETURN_IF_FAILED(check_attributes(attributes, &dims));
  JAX_FA3_RETURN_IF_FAILED(unpack(kFwdFp8, operands, results, &dims, &x));
  bool const is_transposed = !x.value_transposed.is_absent();
  if (!x.key.is_absent()) {
    JAX_FA3_RETURN_IF_FAILED(check_one(x.value, x.value_transposed, dims('S')));
  }
  if (is_transposed && !x.transposed_value.is_absent()) {
    return wrong(x.transposed_value, "some", "none beside value_transposed");
  }
  if (x.value.dims.size() != 4) x.value = x.key;  // which has its shape
  JAX_FA3_RETURN_IF_FAILED(to_problem(x, attributes, dims, &p));
  if (attributes.dropout != 0) return invalid("the FP8 kernels have no dropout");
  if (p.head_dim != p.head_dim_v || p.head_dim % 16 != 0 || p.head_dim < 64 || p.head_dim > 256) {
    return invalid("the FP8 kernels take one head dim, a multiple of 16 from 64 to 256, found " +
                   std::to_string(p.head_dim) + " and " + std::to_string(p.head_dim_v));
  }
  int64_t const blocks = dims('S') * p.batch * p.num_heads_k;
  Array const& transposed = is_transposed ? x.value_transposed : x.transposed_value;
  if (x.counters.size() < 2 + blocks || transposed.size() < blocks * fp8::kBlock * p.head_dim) {
    return invalid("the workspace is too small");
  }
  JAX_FA3_RETURN_IF_FAILED(to_dtype(x.out, &p.out_dtype));
  p.out = to_operand(x.out);
  p.lse = x.lse.floats();
  p.heads.sinks = to_per_head(x.sinks);
  p.tile_counter = problem.counters = x.counters.ints();
  problem.query_scale = x.query_scale.floats();
  problem.key_scale = x.key_scale.floats();
  problem.value_scale = x.value_scale.floats();
  problem.value_mean = x.value_mean.floats();
  problem.transposed_value = static_cast<uint8_t*>(transposed.data);
  if (is_transposed) p.value = {};
  if (x.out.is_absent()) return ffi::Error::Success();
  JAX_FA3_RETURN_IF_FAILED(check_device(stream));
  cudaError_t error = cudaSuccess;
  return launch_fp8(problem, *stream, &error) ? cuda_status(error) : not_built(p);
}

ffi::Error quantize_impl(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results) {
  Dims dims;
  Quantization x;
  JAX_FA3_RETURN_IF_FAILED(unpack(kQuantize, operands, results, &dims, &x));
  int64_t const batch = dims('b');
  int64_t const seqlen = dims('t');
  int64_t const heads = dims('n');
  int64_t const head_dim = dims('h');
  if (head_dim <= 0 || head_dim > 256 || head_dim % 16 != 0) {
    return invalid("head dim must be a multiple of 16 up to 256, found " +
                   std::to_string(head_dim));
  }
  if (seqlen > INT32_MAX - 256 || batch * heads > INT32_MAX / (seqlen / fp8::kBlock + 1)) {
    return invalid("x " + shape_of(x.x) + " is too large");
  }
  if (x.x.is_absent()) return ffi::Error::Success();
  JAX_FA3_RETURN_IF_FAILED(check_one(x.quantized, x.transposed, dims('T')));
  JAX_FA3_RETURN_IF_FAILED(check_device(stream));
  fp8::Quantize problem{};
  problem.batch = static_cast<int>(batch);
  problem.seqlen = static_cast<int>(seqlen);
  problem.num_heads = static_cast<int>(heads);
  problem.head_dim = static_cast<int>(head_dim);
  problem.transform = static_cast<int>(head_dim & -head_dim);
  JAX_FA3_RETURN_IF_FAILED(to_dtype(x.x, &problem.dtype));
  problem.x = x.x.data;
  problem.signs = x.signs.floats();
  problem.lengths = x.lengths.ints();
  problem.mean = x.mean.floats();
  problem.out = static_cast<uint8_t*>(x.quantized.data);
  problem.transposed = static_cast<uint8_t*>(x.transposed.data);
  problem.scales = x.scales.floats();
  return cuda_status(fp8::launch_quantize(problem, *stream));
}

}  // namespace
}  // namespace jax_fa3

JAX_FA3_HANDLER(jax_fa3_fwd_fp8, jax_fa3::fwd_fp8_impl, .Attrs<jax_fa3::Attributes>());
JAX_FA3_HANDLER(jax_fa3_quantize, jax_fa3::quantize_impl);
