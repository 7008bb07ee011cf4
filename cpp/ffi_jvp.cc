// XLA's call of the tangent of the forward.
#include "dispatch.h"
#include "ffi.h"
#include "ffi_call.h"

namespace jax_fa3 {
namespace {

// A tangent lies in its array as what it is the tangent of does.
ffi::Error check_same(Array const& x, Array const& tangent) {
  if (tangent.dims == x.dims) return ffi::Error::Success();
  return wrong(tangent, "shape " + shape_of(tangent), shape_of(x) + ", as " + x.name + " has");
}

ffi::Error jvp_impl(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                    Attributes attributes) {
  Dims dims;
  Tangent x;
  jvp::Problem problem{};
  Problem& p = problem.forward;
  JAX_FA3_RETURN_IF_FAILED(check_attributes(attributes, &dims));
  if (attributes.dropout != 0) return invalid("the kernels of tangents have no dropout");
  JAX_FA3_RETURN_IF_FAILED(unpack(kJvp, operands, results, &dims, &x));
  JAX_FA3_RETURN_IF_FAILED(to_problem(x, attributes, dims, &p));
  JAX_FA3_RETURN_IF_FAILED(check_same(x.query, x.query_dot));
  JAX_FA3_RETURN_IF_FAILED(check_same(x.key, x.key_dot));
  JAX_FA3_RETURN_IF_FAILED(check_same(x.value, x.value_dot));
  problem.query_dot = to_operand(x.query_dot, attributes.first_head_q);
  problem.key_dot = to_operand(x.key_dot, attributes.first_head_k);
  problem.value_dot = to_operand(x.value_dot, attributes.first_head_v, attributes.first_column_v);
  p.out_dtype = p.dtype;
  p.out = to_operand(x.out);
  p.lse = x.lse.floats();
  p.lse_low = x.lse_low.floats();
  p.heads.sinks = to_per_head(x.sinks);
  problem.out_dot = to_operand(x.out_dot);
  problem.lse_dot = x.lse_dot.floats();
  p.tile_counter = x.tile_counter.ints();
  if (x.out_dot.is_absent()) return ffi::Error::Success();
  JAX_FA3_RETURN_IF_FAILED(check_device(stream));
  cudaError_t error = cudaSuccess;
  return launch_jvp(problem, *stream, &error) ? cuda_status(error) : not_built(p);
}

}  // namespace
}  // namespace jax_fa3

JAX_FA3_HANDLER(jax_fa3_jvp, jax_fa3::jvp_impl, .Attrs<jax_fa3::Attributes>());
