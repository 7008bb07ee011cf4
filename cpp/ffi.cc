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

// As many places as there may be CTAs, or none.
ffi::Error check_long_sums(Problem const& p, FloatBuffer const& long_sums) {
  JAX_FA3_RETURN_IF_FAILED(check_aligned(view("long_sums", long_sums)));
  int64_t const size = static_cast<int64_t>(long_sums.element_count());
  KernelSize const kernel = kernel_size(p.head_dim, p.head_dim_v);
  int const block_m = fwd_tile(kernel.head_dim, kernel.head_dim_v, false).block_m;
  int64_t const place = long_sums_of_cta(block_m, kernel.head_dim_v);
  if (size == 0 || size >= place) return ffi::Error::Success();
  return invalid("long_sums: got " + std::to_string(size) + " numbers, wanted none or at least " +
                 std::to_string(place));
}

ffi::Error fwd_impl(Stream stream, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                    Int32Buffer query_offset, Int32Buffer query_seq_lengths,
                    Int32Buffer key_value_seq_lengths, Int32Buffer key_begin, Int32Buffer key_end,
                    FloatBuffer out_before, FloatBuffer lse_before, AnyResult out, FloatResult lse,
                    FloatResult lse_low, Int32Result tile_counter, FloatResult long_sums,
                    Attributes attributes) {
  Inputs inputs{query,     key,    value, query_offset, query_seq_lengths, key_value_seq_lengths,
                key_begin, key_end};
  Problem problem{};
  JAX_FA3_RETURN_IF_FAILED(to_problem(inputs, attributes, &problem));
  JAX_FA3_RETURN_IF_FAILED(check_out(problem, view("out", *out)));
  JAX_FA3_RETURN_IF_FAILED(check_rows(problem, view("lse", *lse)));
  JAX_FA3_RETURN_IF_FAILED(check_optional(view("lse_low", *lse_low),
                                          {problem.batch, problem.num_heads_q, problem.seqlen_q}));
  JAX_FA3_RETURN_IF_FAILED(check_shape(view("tile_counter", *tile_counter), {1}));
  JAX_FA3_RETURN_IF_FAILED(check_long_sums(problem, *long_sums));
  auto const out_dtype = to_dtype(out->element_type());
  if (!out_dtype || (*out_dtype != problem.dtype && *out_dtype != DType::kFloat32)) {
    return invalid("out must have query's dtype or float32");
  }
  problem.out_dtype = *out_dtype;
  problem.out = to_operand(*out, 0, 0);
  // What is merged with, where it is not where the results are.
  View apart = view("out_before", out_before);
  if (is_absent(out_before)) {
    JAX_FA3_RETURN_IF_FAILED(check_shape(view("lse_before", lse_before), {0}));
  } else {
    JAX_FA3_RETURN_IF_FAILED(check_out(problem, view("out_before", out_before)));
    JAX_FA3_RETURN_IF_FAILED(check_rows(problem, view("lse_before", lse_before)));
    bool const out_is_its = out_before.untyped_data() == out->untyped_data();
    if (lse_before.typed_data() != lse->typed_data() ||
        out_is_its != (*out_dtype == DType::kFloat32)) {
      return invalid("what is merged with must be where the results are");
    }
    if (!is_absent(*lse_low)) return invalid("lse_low: got one of merged results, wanted none");
    problem.out_accum = out_before.typed_data();
    if (out_is_its) apart = View{};
  }
  JAX_FA3_RETURN_IF_FAILED(
      check_apart(inputs,
                  {view("out", *out), view("lse", *lse), view("lse_low", *lse_low),
                   view("tile_counter", *tile_counter), view("long_sums", *long_sums)},
                  {apart}));
  problem.lse = lse->typed_data();
  if (!is_absent(*lse_low)) problem.lse_low = lse_low->typed_data();
  problem.tile_counter = tile_counter->typed_data();
  problem.long_sums = long_sums->typed_data();
  problem.long_sums_size = static_cast<int64_t>(long_sums->element_count());
  if (out->element_count() == 0) return ffi::Error::Success();
  JAX_FA3_RETURN_IF_FAILED(check_device(stream));
  cudaError_t error = cudaSuccess;
  return launch_fwd(problem, *stream, &error) ? cuda_status(error) : not_built(problem);
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
  FloatBuffer dlse, lse_low;
  std::optional<FloatBuffer> summed_dq;  // dq_accum of the call before
};

struct Workspace {
  FloatResult row_stats;
  Int32Result row_intervals, query_blocks;
  FloatResult dq_accum;
  Int32Result turns, ranges;
  FloatResult dkv_parts;
};

ffi::Error check_workspace(Problem const& p, bool sums_dq, Workspace& workspace) {
  int const head_dim = kernel_size(p.head_dim, p.head_dim_v).head_dim;
  BwdWorkspace const needed =
      bwd_workspace(p.batch, p.seqlen_q, p.num_heads_q, p.num_heads_k, head_dim, sums_dq);
  auto const holds = [](auto& buffer, int64_t count) {
    return static_cast<int64_t>(buffer->element_count()) >= count;
  };
  if (!holds(workspace.row_stats, needed.row_stats) ||
      !holds(workspace.row_intervals, needed.row_intervals) ||
      !holds(workspace.query_blocks, needed.query_blocks) ||
      !holds(workspace.dq_accum, needed.dq_accum) ||
      (!is_absent(*workspace.turns) && !holds(workspace.turns, needed.turns)) ||
      (!is_absent(*workspace.ranges) && !holds(workspace.ranges, needed.ranges))) {
    return invalid("the workspace is too small: was this program exported for other kernels?");
  }
  JAX_FA3_RETURN_IF_FAILED(check_aligned(view("row_stats", *workspace.row_stats)));
  JAX_FA3_RETURN_IF_FAILED(check_aligned(view("row_intervals", *workspace.row_intervals)));
  JAX_FA3_RETURN_IF_FAILED(check_aligned(view("query_blocks", *workspace.query_blocks)));
  JAX_FA3_RETURN_IF_FAILED(check_aligned(view("dkv_parts", *workspace.dkv_parts)));
  return check_aligned(view("dq_accum", *workspace.dq_accum));
}

// [splits, b, s, k, h + v], or nothing.
ffi::Error check_parts(Problem const& p, FloatBuffer const& parts) {
  int64_t const splits = parts.dimensions().size() > 0 ? parts.dimensions()[0] : 0;
  if (splits > kMostSplits) {
    return invalid("dkv_parts: got " + shape_of(parts) + ", wanted at most " +
                   std::to_string(kMostSplits) + " splits");
  }
  return check_optional(view("dkv_parts", parts),
                        {splits, p.batch, p.seqlen_k, p.num_heads_k, p.head_dim + p.head_dim_v});
}

// Rows that no query head sees.
ffi::Error clear(Gradients& grads, cudaStream_t stream) {
  for (AnyResult* grad : {&grads.key, &grads.value}) {
    cudaError_t const error =
        cudaMemsetAsync((*grad)->untyped_data(), 0, (*grad)->size_bytes(), stream);
    if (error != cudaSuccess) return cuda_status(error);
  }
  return ffi::Error::Success();
}

ffi::Error launch_backward(Stream stream, Inputs inputs, BackwardInputs backward, Gradients grads,
                           Workspace workspace, Attributes attributes) {
  BackwardProblem problem{};
  Problem& forward = problem.forward;
  JAX_FA3_RETURN_IF_FAILED(to_problem(inputs, attributes, &forward));
  ffi::DataType const dtype = inputs.query.element_type();
  if (is_absent(backward.out)) {
    JAX_FA3_RETURN_IF_FAILED(
        check_optional(view("out", backward.out),
                       {forward.batch, forward.seqlen_q, forward.num_heads_q, forward.head_dim_v}));
  } else {
    JAX_FA3_RETURN_IF_FAILED(check_out(forward, view("out", backward.out)));
  }
  JAX_FA3_RETURN_IF_FAILED(check_rows(forward, view("lse", backward.lse)));
  JAX_FA3_RETURN_IF_FAILED(check_out(forward, view("dout", backward.dout)));
  JAX_FA3_RETURN_IF_FAILED(check_rows(forward, view("dlse", backward.dlse)));
  JAX_FA3_RETURN_IF_FAILED(check_optional(view("lse_low", backward.lse_low),
                                          {forward.batch, forward.num_heads_q, forward.seqlen_q}));
  JAX_FA3_RETURN_IF_FAILED(check_parts(forward, *workspace.dkv_parts));
  auto const dkv_dtype = to_dtype(grads.key->element_type());
  if (backward.out.element_type() != dtype || backward.dout.element_type() != dtype ||
      grads.query->element_type() != dtype || !dkv_dtype ||
      (*dkv_dtype != forward.dtype && *dkv_dtype != DType::kFloat32) ||
      grads.value->element_type() != grads.key->element_type()) {
    return invalid(
        "out, dout and the gradients must have query's dtype; those of key and value may be "
        "float32");
  }
  auto const q = inputs.query.dimensions();
  auto const k = inputs.key.dimensions();
  auto const v = inputs.value.dimensions();
  View const dquery = view("dquery", *grads.query);
  View const dkey = view("dkey", *grads.key);
  View const dvalue = view("dvalue", *grads.value);
  bool const finishes_dq = !is_absent(*grads.query);
  JAX_FA3_RETURN_IF_FAILED(check_optional(dquery, {q[0], q[1], q[2], forward.head_dim}));
  JAX_FA3_RETURN_IF_FAILED(check_shape(dkey, {k[0], k[1], k[2], forward.head_dim}));
  JAX_FA3_RETURN_IF_FAILED(check_shape(dvalue, {v[0], v[1], v[2], forward.head_dim_v}));
  if (finishes_dq) JAX_FA3_RETURN_IF_FAILED(check_vectors(dquery));
  JAX_FA3_RETURN_IF_FAILED(check_vectors(dkey));
  JAX_FA3_RETURN_IF_FAILED(check_vectors(dvalue));
  if (backward.summed_dq) {
    View const sum = view("summed_dq", *backward.summed_dq);
    View const accum = view("dq_accum", *workspace.dq_accum);
    if (!(sum.dims == accum.dims)) JAX_FA3_RETURN_IF_FAILED(check_shape(sum, {0}));
  }
  problem.accumulates_dq = backward.summed_dq && !is_absent(*backward.summed_dq);
  if (problem.accumulates_dq &&
      backward.summed_dq->typed_data() != workspace.dq_accum->typed_data()) {
    return invalid("the sum of dq must be continued where it is");
  }
  bool const packed = !backward.summed_dq;  // one gradient then
  View const none{};
  JAX_FA3_RETURN_IF_FAILED(check_apart(
      inputs,
      {dquery, packed ? none : dkey, packed ? none : dvalue,
       view("row_stats", *workspace.row_stats), view("row_intervals", *workspace.row_intervals),
       view("query_blocks", *workspace.query_blocks), view("dq_accum", *workspace.dq_accum),
       view("turns", *workspace.turns), view("ranges", *workspace.ranges),
       view("dkv_parts", *workspace.dkv_parts)},
      {view("out", backward.out), view("lse", backward.lse), view("dout", backward.dout),
       view("dlse", backward.dlse), view("lse_low", backward.lse_low),
       packed || problem.accumulates_dq ? none : view("summed_dq", *backward.summed_dq)}));
  if (!is_built(forward.dtype) || kernel_size(forward.head_dim, forward.head_dim_v).head_dim == 0) {
    return not_built(forward);
  }
  JAX_FA3_RETURN_IF_FAILED(
      check_workspace(forward, problem.accumulates_dq || !finishes_dq, workspace));

  if (!is_absent(backward.out)) forward.out = to_operand(backward.out, 0, 0);
  forward.lse = backward.lse.typed_data();
  if (!is_absent(backward.lse_low)) forward.lse_low = backward.lse_low.typed_data();
  problem.dout = to_operand(backward.dout, 0, 0);
  (is_absent(backward.out) ? problem.neg_delta : problem.dlse) = backward.dlse.typed_data();
  if (finishes_dq) problem.dquery = to_operand(*grads.query, grads.first_head_q, 2);
  int64_t const size = *dkv_dtype == DType::kFloat32 ? 4 : 2;
  problem.dkey = to_operand(*grads.key, grads.first_head_k, size);
  problem.dvalue = to_operand(*grads.value, grads.first_head_v, size);
  problem.dkv_dtype = *dkv_dtype;
  problem.row_stats = workspace.row_stats->typed_data();
  problem.row_intervals = workspace.row_intervals->typed_data();
  problem.query_blocks = workspace.query_blocks->typed_data();
  problem.dq_accum = workspace.dq_accum->typed_data();
  if (!is_absent(*workspace.turns)) problem.turns = workspace.turns->typed_data();
  if (!is_absent(*workspace.ranges)) problem.ranges = workspace.ranges->typed_data();
  if (!is_absent(*workspace.dkv_parts)) {
    problem.dkv_partial = workspace.dkv_parts->typed_data();
    problem.num_splits = static_cast<int>(workspace.dkv_parts->dimensions()[0]);
  }
  if (forward.batch == 0 || forward.num_heads_k == 0) return ffi::Error::Success();
  JAX_FA3_RETURN_IF_FAILED(check_device(stream));
  if (forward.num_heads_q == 0) return clear(grads, *stream);
  cudaError_t error = cudaSuccess;
  return launch_bwd(problem, *stream, &error) ? cuda_status(error) : not_built(forward);
}

ffi::Error bwd_impl(Stream stream, ffi::AnyBuffer query, ffi::AnyBuffer key, ffi::AnyBuffer value,
                    Int32Buffer query_offset, Int32Buffer query_seq_lengths,
                    Int32Buffer key_value_seq_lengths, Int32Buffer key_begin, Int32Buffer key_end,
                    ffi::AnyBuffer out, FloatBuffer lse, ffi::AnyBuffer dout, FloatBuffer dlse,
                    FloatBuffer lse_low, FloatBuffer summed_dq, AnyResult dquery, AnyResult dkey,
                    AnyResult dvalue, FloatResult row_stats, Int32Result row_intervals,
                    Int32Result query_blocks, FloatResult dq_accum, Int32Result turns,
                    Int32Result ranges, FloatResult dkv_parts, Attributes attributes) {
  auto const heads_of = [](ffi::AnyBuffer const& x) {
    return x.dimensions().size() == 4 ? x.dimensions()[2] : -1;
  };
  if (attributes.first_head_q != 0 || attributes.first_head_k != 0 ||
      attributes.first_head_v != 0 || heads_of(query) != attributes.num_heads_q ||
      heads_of(key) != attributes.num_heads_k || heads_of(value) != attributes.num_heads_k) {
    return invalid("gradients are of all heads of query, key and value");
  }
  return launch_backward(
      stream,
      {query, key, value, query_offset, query_seq_lengths, key_value_seq_lengths, key_begin,
       key_end},
      {out, lse, dout, dlse, lse_low, summed_dq}, {dquery, dkey, dvalue, 0, 0, 0},
      {row_stats, row_intervals, query_blocks, dq_accum, turns, ranges, dkv_parts}, attributes);
}

// query, key and value are heads of one array, and so are their gradients.
ffi::Error bwd_packed_impl(Stream stream, ffi::AnyBuffer qkv, Int32Buffer query_offset,
                           Int32Buffer query_seq_lengths, Int32Buffer key_value_seq_lengths,
                           Int32Buffer key_begin, Int32Buffer key_end, ffi::AnyBuffer out,
                           FloatBuffer lse, ffi::AnyBuffer dout, FloatBuffer dlse,
                           FloatBuffer lse_low, AnyResult dqkv, FloatResult row_stats,
                           Int32Result row_intervals, Int32Result query_blocks,
                           FloatResult dq_accum, Int32Result turns, Int32Result ranges,
                           FloatResult dkv_parts, Attributes attributes) {
  JAX_FA3_RETURN_IF_FAILED(check_attributes(attributes));
  auto const dims = qkv.dimensions();
  int64_t const n = attributes.num_heads_q;
  int64_t const k = attributes.num_heads_k;
  if (dims.size() != 4 || dims[2] != n + 2 * k || attributes.first_head_q != 0 ||
      attributes.first_head_k != n || attributes.first_head_v != n + k ||
      attributes.first_column_v != 0 || attributes.head_dim_v != dims[3]) {
    return invalid("qkv " + shape_of(qkv) + " must be [b, t, n + 2 k, h], in the order q, k, v");
  }
  return launch_backward(
      stream,
      {qkv, qkv, qkv, query_offset, query_seq_lengths, key_value_seq_lengths, key_begin, key_end},
      {out, lse, dout, dlse, lse_low, std::nullopt},
      {dqkv, dqkv, dqkv, attributes.first_head_q, attributes.first_head_k, attributes.first_head_v},
      {row_stats, row_intervals, query_blocks, dq_accum, turns, ranges, dkv_parts}, attributes);
}

ffi::Error segment_intervals_impl(Stream stream, Int32Buffer query_segment_ids,
                                  Int32Buffer key_value_segment_ids,
                                  ffi::Result<Int32Buffer> key_begin,
                                  ffi::Result<Int32Buffer> key_end) {
  auto const q = query_segment_ids.dimensions();
  auto const k = key_value_segment_ids.dimensions();
  if (q.size() != 2 || k.size() != 2 || q[0] != k[0]) {
    return invalid("query_segment_ids " + shape_of(query_segment_ids) +
                   " and key_value_segment_ids " + shape_of(key_value_segment_ids) +
                   " must be [B, T] and [B, S]");
  }
  View const begin = view("key_begin", *key_begin);
  View const end = view("key_end", *key_end);
  JAX_FA3_RETURN_IF_FAILED(check_shape(begin, {q[0], q[1]}));
  JAX_FA3_RETURN_IF_FAILED(check_shape(end, {q[0], q[1]}));
  JAX_FA3_RETURN_IF_FAILED(
      check_apart({begin, end}, {view("query_segment_ids", query_segment_ids),
                                 view("key_value_segment_ids", key_value_segment_ids)}));
  if (q[1] > INT32_MAX - 4096 || k[1] > INT32_MAX - 4096 || q[0] > INT32_MAX / (q[1] / 256 + 1)) {
    return invalid("query_segment_ids " + shape_of(query_segment_ids) + " is too large");
  }
  if (q[0] == 0 || q[1] == 0) return ffi::Error::Success();
  JAX_FA3_RETURN_IF_FAILED(check_device(stream));
  SegmentIntervals const problem{static_cast<int>(q[0]),
                                 static_cast<int>(q[1]),
                                 static_cast<int>(k[1]),
                                 query_segment_ids.typed_data(),
                                 key_value_segment_ids.typed_data(),
                                 key_begin->typed_data(),
                                 key_end->typed_data()};
  return cuda_status(launch_segment_intervals(problem, *stream));
}

}  // namespace
}  // namespace jax_fa3

// out, lse, dout, dlse, lse_low.
#define JAX_FA3_COTANGENTS         \
  .Arg<xla::ffi::AnyBuffer>()      \
      .Arg<jax_fa3::FloatBuffer>() \
      .Arg<xla::ffi::AnyBuffer>()  \
      .Arg<jax_fa3::FloatBuffer>() \
      .Arg<jax_fa3::FloatBuffer>()
// row_stats, row_intervals, query_blocks, dq_accum, turns, ranges, dkv_parts.
#define JAX_FA3_WORKSPACE          \
  .Ret<jax_fa3::FloatBuffer>()     \
      .Ret<jax_fa3::Int32Buffer>() \
      .Ret<jax_fa3::Int32Buffer>() \
      .Ret<jax_fa3::FloatBuffer>() \
      .Ret<jax_fa3::Int32Buffer>() \
      .Ret<jax_fa3::Int32Buffer>() \
      .Ret<jax_fa3::FloatBuffer>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_fa3_fwd, jax_fa3::fwd_impl,
                              JAX_FA3_BIND.Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                      JAX_FA3_MASKS.Arg<jax_fa3::FloatBuffer>()
                                  .Arg<jax_fa3::FloatBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<jax_fa3::FloatBuffer>()
                                  .Ret<jax_fa3::FloatBuffer>()
                                  .Ret<jax_fa3::Int32Buffer>()
                                  .Ret<jax_fa3::FloatBuffer>()
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
