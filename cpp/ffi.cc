// XLA's calls: buffers and attributes become a Problem, which is launched on XLA's stream.
#include "ffi.h"

#include <optional>

#include "dispatch.h"
#include "ffi_call.h"
#include "plan.h"
#include "segment_intervals.h"

namespace jax_fa3 {
namespace {

using FloatResult = ffi::Result<FloatBuffer>;
using Int32Result = ffi::Result<Int32Buffer>;
using AnyResult = ffi::Result<ffi::AnyBuffer>;

// Optional operands and results have no elements when absent.
template <class Buffer>
bool is_absent(Buffer const& buffer) {
  return buffer.element_count() == 0;
}

ffi::Error fwd_impl(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                    ffi::AnyBuffer value, Int32Buffer query_offset, Int32Buffer query_seq_lengths,
                    Int32Buffer key_value_seq_lengths, Int32Buffer key_begin, Int32Buffer key_end,
                    FloatBuffer out_before, FloatBuffer lse_before, AnyResult out, FloatResult lse,
                    Int32Result tile_counter, Attributes attributes) {
  JAX_FA3_RETURN_IF_FAILED(check_device());
  Inputs inputs{query,     key,    value, query_offset, query_seq_lengths, key_value_seq_lengths,
                key_begin, key_end};
  Problem problem{};
  JAX_FA3_RETURN_IF_FAILED(to_problem(inputs, attributes, &problem));
  if (!out_fits(problem, *out, *lse)) {
    return invalid("out " + shape_of(*out) + " or lse " + shape_of(*lse) + " does not fit query " +
                   shape_of(query) + " and value " + shape_of(value));
  }
  if (tile_counter->element_count() != 1) return invalid("tile_counter must have one element");
  auto const out_dtype = to_dtype(out->element_type());
  if (!out_dtype || (*out_dtype != problem.dtype && *out_dtype != DType::kFloat32)) {
    return invalid("out must have query's dtype or float32");
  }
  problem.out_dtype = *out_dtype;
  problem.out = to_operand(*out, 0, 0);
  if (!is_absent(out_before)) {
    if (!out_fits(problem, out_before, lse_before)) {
      return invalid("out_before " + shape_of(out_before) + " does not fit out " + shape_of(*out));
    }
    bool const out_is_its = out_before.untyped_data() == out->untyped_data();
    if (lse_before.typed_data() != lse->typed_data() ||
        out_is_its != (*out_dtype == DType::kFloat32)) {
      return invalid("what is merged with must be where the results are");
    }
    problem.out_before = out_before.typed_data();
  }
  problem.lse = lse->typed_data();
  problem.tile_counter = tile_counter->typed_data();
  if (out->element_count() == 0) return ffi::Error::Success();
  cudaError_t error = cudaSuccess;
  return launch_fwd(problem, stream, &error) ? cuda_status(error) : not_built(problem);
}

// Gradients, each from its own head on: of three arrays, or of one.
struct Gradients {
  AnyResult query, key, value;
  int64_t first_head_q, first_head_k, first_head_v;
};

struct BackwardInputs {
  ffi::AnyBuffer out;
  FloatBuffer lse;
  ffi::AnyBuffer dout;
  FloatBuffer dlse;
  std::optional<FloatBuffer> summed_dq;  // dq_accum of the call before
};

struct Workspace {
  FloatResult row_stats;
  Int32Result row_intervals, block_hulls;
  FloatResult dq_accum;
  Int32Result turns;
};

ffi::Error check_workspace(Problem const& p, bool sums_dq, Workspace& workspace) {
  int const head_dim = kernel_size(p.head_dim, p.head_dim_v).head_dim;
  BwdWorkspace const needed = bwd_workspace(p.batch, p.seqlen_q, p.num_heads_q, head_dim, sums_dq);
  auto const holds = [](auto& buffer, int64_t count) {
    return static_cast<int64_t>(buffer->element_count()) >= count;
  };
  if (holds(workspace.row_stats, needed.row_stats) &&
      holds(workspace.row_intervals, needed.row_intervals) &&
      holds(workspace.block_hulls, needed.block_hulls) &&
      holds(workspace.dq_accum, needed.dq_accum) &&
      (workspace.turns->element_count() == 0 || holds(workspace.turns, needed.turns))) {
    return ffi::Error::Success();
  }
  return invalid("the workspace is too small: was this program exported for other kernels?");
}

ffi::Error launch_backward(cudaStream_t stream, Inputs inputs, BackwardInputs backward,
                           Gradients grads, Workspace workspace, Attributes attributes) {
  JAX_FA3_RETURN_IF_FAILED(check_device());
  BackwardProblem problem{};
  Problem& forward = problem.forward;
  JAX_FA3_RETURN_IF_FAILED(to_problem(inputs, attributes, &forward));
  ffi::DataType const dtype = inputs.query.element_type();
  auto const& out = is_absent(backward.out) ? backward.dout : backward.out;
  if (!out_fits(forward, out, backward.lse) || !out_fits(forward, backward.dout, backward.dlse) ||
      out.element_type() != dtype || backward.dout.element_type() != dtype) {
    return invalid("out " + shape_of(backward.out) + ", lse " + shape_of(backward.lse) +
                   ", dout or dlse does not fit query " + shape_of(inputs.query) + " and value " +
                   shape_of(inputs.value));
  }
  auto const has_shape_of = [](auto const& grad, auto const& x, int head_dim) {
    auto const a = grad.dimensions();
    auto const b = x.dimensions();
    return a.size() == 4 && a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == head_dim;
  };
  bool const finishes_dq = !is_absent(*grads.query);
  auto const dkv_dtype = to_dtype(grads.key->element_type());
  if ((finishes_dq && !has_shape_of(*grads.query, inputs.query, forward.head_dim)) ||
      grads.query->element_type() != dtype ||
      !has_shape_of(*grads.key, inputs.key, forward.head_dim) ||
      !has_shape_of(*grads.value, inputs.value, forward.head_dim_v) || !dkv_dtype ||
      (*dkv_dtype != forward.dtype && *dkv_dtype != DType::kFloat32) ||
      grads.value->element_type() != grads.key->element_type()) {
    return invalid(
        "the gradients must have the operands' shapes and their dtype, those of key and value may "
        "be float32");
  }
  problem.continues_dq = backward.summed_dq && !is_absent(*backward.summed_dq);
  if (problem.continues_dq &&
      backward.summed_dq->typed_data() != workspace.dq_accum->typed_data()) {
    return invalid("the sum of dq must be continued where it is");
  }
  if (!is_built(forward.dtype) || kernel_size(forward.head_dim, forward.head_dim_v).head_dim == 0) {
    return not_built(forward);
  }
  JAX_FA3_RETURN_IF_FAILED(
      check_workspace(forward, problem.continues_dq || !finishes_dq, workspace));

  if (!is_absent(backward.out)) forward.out = to_operand(backward.out, 0, 0);
  forward.lse = backward.lse.typed_data();
  problem.dout = to_operand(backward.dout, 0, 0);
  problem.dlse = backward.dlse.typed_data();
  if (finishes_dq) problem.dquery = to_operand(*grads.query, grads.first_head_q, 2);
  int64_t const size = *dkv_dtype == DType::kFloat32 ? 4 : 2;
  problem.dkey = to_operand(*grads.key, grads.first_head_k, size);
  problem.dvalue = to_operand(*grads.value, grads.first_head_v, size);
  problem.dkv_dtype = *dkv_dtype;
  problem.row_stats = workspace.row_stats->typed_data();
  problem.row_intervals = workspace.row_intervals->typed_data();
  problem.block_hulls = workspace.block_hulls->typed_data();
  problem.dq_accum = workspace.dq_accum->typed_data();
  problem.turns = workspace.turns->element_count() == 0 ? nullptr : workspace.turns->typed_data();
  if (forward.batch == 0 || forward.num_heads_q == 0) return ffi::Error::Success();
  cudaError_t error = cudaSuccess;
  return launch_bwd(problem, stream, &error) ? cuda_status(error) : not_built(forward);
}

ffi::Error bwd_impl(cudaStream_t stream, ffi::AnyBuffer query, ffi::AnyBuffer key,
                    ffi::AnyBuffer value, Int32Buffer query_offset, Int32Buffer query_seq_lengths,
                    Int32Buffer key_value_seq_lengths, Int32Buffer key_begin, Int32Buffer key_end,
                    ffi::AnyBuffer out, FloatBuffer lse, ffi::AnyBuffer dout, FloatBuffer dlse,
                    FloatBuffer summed_dq, AnyResult dquery, AnyResult dkey, AnyResult dvalue,
                    FloatResult row_stats, Int32Result row_intervals, Int32Result block_hulls,
                    FloatResult dq_accum, Int32Result turns, Attributes attributes) {
  auto const heads_of = [](ffi::AnyBuffer const& x) {
    return x.dimensions().size() == 4 ? x.dimensions()[2] : -1;
  };
  if (attributes.first_head_q != 0 || attributes.first_head_k != 0 ||
      attributes.first_head_v != 0 || heads_of(query) != attributes.num_heads_q ||
      heads_of(key) != attributes.num_heads_k || heads_of(value) != attributes.num_heads_k) {
    return invalid("gradients are of all heads of query, key and value");
  }
  return launch_backward(stream,
                         {query, key, value, query_offset, query_seq_lengths, key_value_seq_lengths,
                          key_begin, key_end},
                         {out, lse, dout, dlse, summed_dq}, {dquery, dkey, dvalue, 0, 0, 0},
                         {row_stats, row_intervals, block_hulls, dq_accum, turns}, attributes);
}

// query, key and value are heads of one array, and so are their gradients.
ffi::Error bwd_packed_impl(cudaStream_t stream, ffi::AnyBuffer qkv, Int32Buffer query_offset,
                           Int32Buffer query_seq_lengths, Int32Buffer key_value_seq_lengths,
                           Int32Buffer key_begin, Int32Buffer key_end, ffi::AnyBuffer out,
                           FloatBuffer lse, ffi::AnyBuffer dout, FloatBuffer dlse, AnyResult dqkv,
                           FloatResult row_stats, Int32Result row_intervals,
                           Int32Result block_hulls, FloatResult dq_accum, Int32Result turns,
                           Attributes attributes) {
  auto const dims = qkv.dimensions();
  int64_t const n = attributes.num_heads_q;
  int64_t const k = attributes.num_heads_k;
  if (dims.size() != 4 || dims[2] != n + 2 * k || attributes.first_head_q != 0 ||
      attributes.first_head_k != n || attributes.first_head_v != n + k) {
    return invalid("qkv " + shape_of(qkv) + " must be [b, t, n + 2 k, h], in the order q, k, v");
  }
  return launch_backward(
      stream,
      {qkv, qkv, qkv, query_offset, query_seq_lengths, key_value_seq_lengths, key_begin, key_end},
      {out, lse, dout, dlse, std::nullopt},
      {dqkv, dqkv, dqkv, attributes.first_head_q, attributes.first_head_k, attributes.first_head_v},
      {row_stats, row_intervals, block_hulls, dq_accum, turns}, attributes);
}

ffi::Error segment_intervals_impl(cudaStream_t stream, Int32Buffer query_segment_ids,
                                  Int32Buffer key_value_segment_ids,
                                  ffi::Result<Int32Buffer> key_begin,
                                  ffi::Result<Int32Buffer> key_end) {
  JAX_FA3_RETURN_IF_FAILED(check_device());
  auto const q = query_segment_ids.dimensions();
  auto const k = key_value_segment_ids.dimensions();
  if (q.size() != 2 || k.size() != 2 || q[0] != k[0] ||
      key_begin->element_count() != query_segment_ids.element_count() ||
      key_end->element_count() != query_segment_ids.element_count()) {
    return invalid("query_segment_ids " + shape_of(query_segment_ids) +
                   " and key_value_segment_ids " + shape_of(key_value_segment_ids) +
                   " must be [B, T] and [B, S], the results [B, T]");
  }
  if (q[1] > INT32_MAX - 4096 || k[1] > INT32_MAX - 4096 || q[0] > INT32_MAX / (q[1] / 256 + 1)) {
    return invalid("query_segment_ids " + shape_of(query_segment_ids) + " is too large");
  }
  if (q[0] == 0 || q[1] == 0) return ffi::Error::Success();
  SegmentIntervals const problem{static_cast<int>(q[0]),
                                 static_cast<int>(q[1]),
                                 static_cast<int>(k[1]),
                                 query_segment_ids.typed_data(),
                                 key_value_segment_ids.typed_data(),
                                 key_begin->typed_data(),
                                 key_end->typed_data()};
  return cuda_status(launch(problem, stream));
}

}  // namespace
}  // namespace jax_fa3

// out, lse, dout, dlse.
#define JAX_FA3_COTANGENTS         \
  .Arg<xla::ffi::AnyBuffer>()      \
      .Arg<jax_fa3::FloatBuffer>() \
      .Arg<xla::ffi::AnyBuffer>()  \
      .Arg<jax_fa3::FloatBuffer>()
// row_stats, row_intervals, block_hulls, dq_accum, turns.
#define JAX_FA3_WORKSPACE          \
  .Ret<jax_fa3::FloatBuffer>()     \
      .Ret<jax_fa3::Int32Buffer>() \
      .Ret<jax_fa3::Int32Buffer>() \
      .Ret<jax_fa3::FloatBuffer>() \
      .Ret<jax_fa3::Int32Buffer>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_fwd, jax_fa3::fwd_impl,
                              JAX_FA3_BIND.Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                      JAX_FA3_MASKS.Arg<jax_fa3::FloatBuffer>()
                                  .Arg<jax_fa3::FloatBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<jax_fa3::FloatBuffer>()
                                  .Ret<jax_fa3::Int32Buffer>()
                                  .Attrs<jax_fa3::Attributes>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_bwd, jax_fa3::bwd_impl,
                              JAX_FA3_BIND.Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                      JAX_FA3_MASKS JAX_FA3_COTANGENTS.Arg<jax_fa3::FloatBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                      JAX_FA3_WORKSPACE.Attrs<jax_fa3::Attributes>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_fa3_bwd_packed, jax_fa3::bwd_packed_impl,
    JAX_FA3_BIND.Arg<xla::ffi::AnyBuffer>()
        JAX_FA3_MASKS JAX_FA3_COTANGENTS.Ret<xla::ffi::AnyBuffer>()
            JAX_FA3_WORKSPACE.Attrs<jax_fa3::Attributes>(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_segment_intervals, jax_fa3::segment_intervals_impl,
                              JAX_FA3_BIND.Arg<jax_fa3::Int32Buffer>()
                                  .Arg<jax_fa3::Int32Buffer>()
                                  .Ret<jax_fa3::Int32Buffer>()
                                  .Ret<jax_fa3::Int32Buffer>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
