// XLA's calls: arrays and attributes become a Problem, which is launched on XLA's stream.
#include "ffi.h"

#include <algorithm>

#include "dispatch.h"
#include "ffi_call.h"
#include "fwd_splits.h"
#include "plan.h"
#include "segment_intervals.h"

namespace jax_fa3 {
namespace {

// As many places as there may be CTAs, or [splits, numbers of a split]; or none. `is_plain`: the
// call has none of what the kernel whose CTAs share keys does not take.
ffi::Error set_long_sums(Array const& long_sums, bool is_plain, Problem* problem) {
  Problem const& p = *problem;
  problem->long_sums = long_sums.floats();
  if (long_sums.dims.size() == 2) {
    int64_t const split = fwd_split_size(
        {p.batch, p.seqlen_q, p.seqlen_k, p.num_heads_q, p.num_heads_k, p.head_dim, p.head_dim_v});
    int64_t const num_splits = long_sums.dims[0];
    bool const fits = num_splits > 1 && num_splits <= kMostSplits && long_sums.dims[1] == split;
    if (!fits || !is_plain || p.mask.restricts()) {
      return wrong(long_sums, "shape " + shape_of(long_sums),
                   "some splits of " + std::to_string(split) + ", and nothing masked or added");
    }
    problem->num_splits = static_cast<int>(num_splits);
    return ffi::Error::Success();
  }
  problem->long_sums_size = long_sums.size();
  KernelSize const kernel = kernel_size(p.head_dim, p.head_dim_v);
  int const block_m = fwd_tile(kernel.head_dim, kernel.head_dim_v, false).block_m;
  int64_t const place = long_sums_of_cta(block_m, kernel.head_dim_v);
  if (long_sums.is_absent() || long_sums.size() >= place) return ffi::Error::Success();
  return wrong(long_sums, std::to_string(long_sums.size()) + " numbers",
               "none or at least " + std::to_string(place));
}

ffi::Error fwd_impl(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                    Attributes attributes) {
  Dims dims;
  Forward x;
  Problem problem{};
  JAX_FA3_RETURN_IF_FAILED(check_attributes(attributes, &dims));
  JAX_FA3_RETURN_IF_FAILED(unpack(kFwd, operands, results, &dims, &x));
  JAX_FA3_RETURN_IF_FAILED(to_problem(x, attributes, dims, &problem));
  JAX_FA3_RETURN_IF_FAILED(to_dtype(x.out, &problem.out_dtype));
  // What is merged with, where it is not where the results are.
  if (x.out_before.is_absent() != x.lse_before.is_absent()) {
    return wrong(x.lse_before, "shape " + shape_of(x.lse_before), "one that goes with out_before");
  }
  if (!x.out_before.is_absent()) {
    bool const out_is_its = x.out_before.data == x.out.data;
    if (x.lse_before.data != x.lse.data || out_is_its != (problem.out_dtype == DType::kFloat32)) {
      return invalid("what is merged with must be where the results are");
    }
    if (!x.lse_low.is_absent()) return wrong(x.lse_low, "one of merged results", "none");
    std::vector<Array> others = x.all_of_heads();
    others.insert(others.end(), {x.bias, x.mask_bits, x.dropout, x.relative_bias});
    for (Array const& other : others) {
      if (!other.is_absent()) return wrong(other, "some beside results to merge with", "none");
    }
  }
  problem.out = to_operand(x.out);
  problem.out_accum = x.out_before.floats();
  problem.lse = x.lse.floats();
  problem.lse_low = x.lse_low.floats();
  problem.tile_counter = x.tile_counter.ints();
  problem.heads = to_head_operands(x);
  JAX_FA3_RETURN_IF_FAILED(set_bias(x.bias, &problem));
  JAX_FA3_RETURN_IF_FAILED(set_mask_bits(x.mask_bits, x.mask_blocks, problem.seqlen_q,
                                         problem.seqlen_k, kMaskBlock, &problem));
  JAX_FA3_RETURN_IF_FAILED(set_dropout(x.dropout, attributes.dropout, &problem));
  JAX_FA3_RETURN_IF_FAILED(check_alibi(x.alibi_slopes, problem));
  JAX_FA3_RETURN_IF_FAILED(set_relative_bias(x.relative_bias, &problem));
  std::vector<Array> others = x.all_of_heads();
  others.insert(others.end(), {x.out_before, x.bias, x.mask_bits, x.dropout, x.relative_bias});
  bool const is_plain = std::all_of(others.begin(), others.end(),
                                    [](Array const& other) { return other.is_absent(); }) &&
                        problem.out_dtype != DType::kFloat32;
  JAX_FA3_RETURN_IF_FAILED(set_long_sums(x.long_sums, is_plain, &problem));
  if (x.out.is_absent()) return ffi::Error::Success();
  JAX_FA3_RETURN_IF_FAILED(check_device(stream));
  cudaError_t error = cudaSuccess;
  return launch_fwd(problem, *stream, &error) ? cuda_status(error) : not_built(problem);
}

ffi::Error check_workspace(Problem const& p, bool sums_dq, Backward const& x) {
  int const head_dim = kernel_size(p.head_dim, p.head_dim_v).bwd_head_dim();
  bool const has_bias = !x.bias.is_absent();
  BwdWorkspace const needed =
      bwd_workspace(p.batch, p.seqlen_q, p.num_heads_q, p.num_heads_k, head_dim, sums_dq, has_bias);
  if (x.row_stats.size() < needed.row_stats || x.row_intervals.size() < needed.row_intervals ||
      x.query_blocks.size() < needed.query_blocks || x.dq_accum.size() < needed.dq_accum ||
      (!x.turns.is_absent() && x.turns.size() < needed.turns) ||
      (!x.ranges.is_absent() && x.ranges.size() < needed.ranges)) {
    return invalid("the workspace is too small: was this program exported for other kernels?");
  }
  // Without rows or heads there are no blocks, and what has no elements is absent.
  int64_t const blocks = ceil_div(p.seqlen_q, bwd_tile(head_dim, has_bias).block_m);
  int64_t const found = x.dsinks.is_absent() ? 0 : x.dsinks.dims[2];
  bool const is_right = x.sinks.is_absent() ? found == 0 : found >= blocks || p.batch == 0;
  if (!is_right) {
    return wrong(x.dsinks, "shape " + shape_of(x.dsinks),
                 x.sinks.is_absent()
                     ? "none without sinks"
                     : "at least " + std::to_string(blocks) + " blocks of each head");
  }
  return ffi::Error::Success();
}

// The parts of the gradient of slopes: one for each consumer thread of each of a head's CTAs.
ffi::Error check_dalibi(Problem const& p, Backward const& x, int num_splits) {
  if (x.dalibi.is_absent()) return ffi::Error::Success();  // it is not wanted
  int64_t const blocks = ceil_div(p.seqlen_k, bwd_tile(p.head_dim).block_n);
  int64_t const parts = kBwdConsumerThreads * blocks * std::max(num_splits, 1);
  if (!x.alibi_slopes.is_absent() && x.dalibi.dims[2] >= parts && x.dalibi.dims[2] <= INT32_MAX) {
    return ffi::Error::Success();
  }
  return wrong(x.dalibi, "shape " + shape_of(x.dalibi),
               x.alibi_slopes.is_absent() ? "none without alibi_slopes"
                                          : std::to_string(parts) + " parts of each head");
}

// Likewise of a bias by distance: one, or one for each consumer warp.
ffi::Error check_drelative(Problem const& p, Backward const& x, int num_splits) {
  if (x.drelative.is_absent()) return ffi::Error::Success();  // it is not wanted
  int64_t const blocks = ceil_div(p.seqlen_k, bwd_tile(p.head_dim).block_n);
  int64_t const parts = kBwdConsumerThreads / 32 * blocks * std::max(num_splits, 1);
  int64_t const found = x.drelative.dims[2];
  bool const is_right = found == 1 || (found >= parts && found <= INT32_MAX);
  if (!x.relative_bias.is_absent() && x.drelative.dims[3] == x.relative_bias.dims[3] && is_right) {
    return ffi::Error::Success();
  }
  return wrong(x.drelative, "shape " + shape_of(x.drelative),
               x.relative_bias.is_absent()
                   ? "none without relative_bias"
                   : "1 or " + std::to_string(parts) + " tables of each head");
}

// [splits, b, s, k, h + v], or nothing.
ffi::Error check_parts(Problem const& p, Array const& parts, Dims dims) {
  int64_t const splits = parts.dims.size() > 0 ? parts.dims[0] : 0;
  if (splits > kMostSplits) {
    return wrong(parts, shape_of(parts), "at most " + std::to_string(kMostSplits) + " splits");
  }
  dims.set('c', splits);
  dims.set('w', p.head_dim + p.head_dim_v);
  return dims.check_shape({parts.name, kFloat32, "cbskw|0"}, parts);
}

// Rows that no query head sees.
ffi::Error clear(Backward const& x, cudaStream_t stream) {
  for (Array const& grad : {x.dkey, x.dvalue}) {
    cudaError_t const error = cudaMemsetAsync(grad.data, 0, grad.bytes, stream);
    if (error != cudaSuccess) return cuda_status(error);
  }
  return ffi::Error::Success();
}

// Of three arrays, or of the heads of one, from those on that the attributes say.
ffi::Error launch_backward(Stream stream, Backward const& x, Attributes const& attributes,
                           Dims const& dims) {
  BackwardProblem problem{};
  Problem& forward = problem.forward;
  JAX_FA3_RETURN_IF_FAILED(to_problem(x, attributes, dims, &forward));
  JAX_FA3_RETURN_IF_FAILED(check_parts(forward, x.dkv_parts, dims));
  JAX_FA3_RETURN_IF_FAILED(to_dtype(x.dkey, &problem.dkv_dtype));
  if (x.dvalue.dtype != x.dkey.dtype) {
    return invalid("dkey and dvalue must both have query's dtype, or float32");
  }
  problem.accumulates_dq = !x.summed_dq.is_absent();
  if (problem.accumulates_dq && x.summed_dq.data != x.dq_accum.data) {
    return invalid("the sum of dq must be continued where it is");
  }
  KernelSize const kernel = kernel_size(forward.head_dim, forward.head_dim_v);
  if (!is_built(forward.dtype) || !kernel.has_bwd()) {
    return not_built(forward);
  }
  bool const finishes_dq = !x.dquery.is_absent();
  JAX_FA3_RETURN_IF_FAILED(check_workspace(forward, problem.accumulates_dq || !finishes_dq, x));

  if (!x.out.is_absent()) forward.out = to_operand(x.out);
  forward.lse = x.lse.floats();
  forward.lse_low = x.lse_low.floats();
  problem.dout = to_operand(x.dout);
  if (x.out.is_absent() && x.dlse.is_absent() && x.dout.bytes != 0) {
    return invalid("without out, dlse must be given");
  }
  (x.out.is_absent() ? problem.neg_delta : problem.dlse) = x.dlse.floats();
  if (finishes_dq) problem.dquery = to_operand(x.dquery, attributes.first_head_q);
  problem.dkey = to_operand(x.dkey, attributes.first_head_k);
  problem.dvalue = to_operand(x.dvalue, attributes.first_head_v);
  problem.row_stats = x.row_stats.floats();
  problem.row_intervals = x.row_intervals.ints();
  problem.query_blocks = x.query_blocks.ints();
  problem.dq_accum = x.dq_accum.floats();
  problem.turns = x.turns.ints();
  problem.ranges = x.ranges.ints();
  problem.dkv_partial = x.dkv_parts.floats();
  forward.heads = to_head_operands(x);
  problem.dsinks = x.dsinks.floats();
  if (!x.dsinks.is_absent()) problem.dsinks_blocks = static_cast<int>(x.dsinks.dims[2]);
  if (!x.dkv_parts.is_absent()) problem.num_splits = static_cast<int>(x.dkv_parts.dims[0]);
  JAX_FA3_RETURN_IF_FAILED(set_bias(x.bias, &forward));
  JAX_FA3_RETURN_IF_FAILED(set_dropout(x.dropout, attributes.dropout, &forward));
  if (x.dbias.dims.size() == 4 && !(x.dbias.dims == x.bias.dims)) {
    return wrong(x.dbias, "shape " + shape_of(x.dbias), "that of bias, " + shape_of(x.bias));
  }
  problem.dbias = x.dbias.floats();
  int const block_m = bwd_tile(kernel.head_dim).block_m;
  JAX_FA3_RETURN_IF_FAILED(set_mask_bits(x.mask_bits, x.mask_blocks, forward.seqlen_k,
                                         forward.seqlen_q, block_m, &forward));
  int64_t const splits = problem.num_splits;
  if (forward.mask_bits.blocks_of_head != 0 && splits > 1 &&
      forward.num_heads_q / forward.num_heads_k % splits != 0) {
    return wrong(x.dkv_parts, std::to_string(splits) + " splits beside a mask of each head",
                 "a divisor of the query heads of a key head");
  }
  JAX_FA3_RETURN_IF_FAILED(check_alibi(x.alibi_slopes, forward));
  JAX_FA3_RETURN_IF_FAILED(check_dalibi(forward, x, problem.num_splits));
  problem.dalibi = x.dalibi.floats();
  if (!x.dalibi.is_absent()) problem.dalibi_parts = static_cast<int>(x.dalibi.dims[2]);
  JAX_FA3_RETURN_IF_FAILED(set_relative_bias(x.relative_bias, &forward));
  JAX_FA3_RETURN_IF_FAILED(check_drelative(forward, x, problem.num_splits));
  problem.drelative = x.drelative.floats();
  if (!x.drelative.is_absent()) problem.drelative_parts = static_cast<int>(x.drelative.dims[2]);
  if (forward.batch == 0 || forward.num_heads_k == 0) return ffi::Error::Success();
  JAX_FA3_RETURN_IF_FAILED(check_device(stream));
  for (Array const& sum : {x.dbias, x.dalibi, x.drelative}) {
    if (sum.is_absent()) continue;
    cudaError_t const error = cudaMemsetAsync(sum.data, 0, sum.bytes, *stream);
    if (error != cudaSuccess) return cuda_status(error);
  }
  if (forward.num_heads_q == 0) return clear(x, *stream);
  cudaError_t error = cudaSuccess;
  return launch_bwd(problem, *stream, &error) ? cuda_status(error) : not_built(forward);
}

ffi::Error bwd_impl(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                    Attributes attributes) {
  Dims dims;
  Backward x;
  JAX_FA3_RETURN_IF_FAILED(check_attributes(attributes, &dims));
  JAX_FA3_RETURN_IF_FAILED(unpack(kBwd, operands, results, &dims, &x));
  if (attributes.first_head_q != 0 || attributes.first_head_k != 0 ||
      attributes.first_head_v != 0) {
    return invalid("gradients are of all heads of query, key and value");
  }
  if (!(x.summed_dq.dims == x.dq_accum.dims)) {
    JAX_FA3_RETURN_IF_FAILED(dims.check_shape({x.summed_dq.name, kFloat32, "0"}, x.summed_dq));
  }
  return launch_backward(stream, x, attributes, dims);
}

// query, key and value are heads of one array, and so are their gradients.
ffi::Error bwd_packed_impl(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                           Attributes attributes) {
  Dims dims;
  Backward x;
  JAX_FA3_RETURN_IF_FAILED(check_attributes(attributes, &dims));
  int64_t const n = attributes.num_heads_q;
  int64_t const k = attributes.num_heads_k;
  dims.set('p', n + 2 * k);
  JAX_FA3_RETURN_IF_FAILED(unpack(kBwdPacked, operands, results, &dims, &x));
  if (attributes.first_head_q != 0 || attributes.first_head_k != n ||
      attributes.first_head_v != n + k || attributes.first_column_v != 0 ||
      attributes.head_dim_v != dims('h')) {
    return invalid("qkv " + shape_of(x.qkv) + " must be [b, t, n + 2 k, h], in the order q, k, v");
  }
  dims.set('s', dims('t'));
  x.query = x.key = x.value = x.qkv;
  x.dquery = x.dkey = x.dvalue = x.dqkv;
  return launch_backward(stream, x, attributes, dims);
}

ffi::Error segment_intervals_impl(Stream stream, ffi::RemainingArgs operands,
                                  ffi::RemainingRets results) {
  Dims dims;
  Segments x;
  JAX_FA3_RETURN_IF_FAILED(unpack(kSegmentIntervals, operands, results, &dims, &x));
  int64_t const batch = dims('b');
  int64_t const seqlen_q = dims('t');
  int64_t const seqlen_k = dims('s');
  if (seqlen_q > INT32_MAX - 4096 || seqlen_k > INT32_MAX - 4096 ||
      batch > INT32_MAX / (seqlen_q / 256 + 1)) {
    return invalid("query_segment_ids " + shape_of(x.query_segment_ids) + " is too large");
  }
  if (batch == 0 || seqlen_q == 0) return ffi::Error::Success();
  JAX_FA3_RETURN_IF_FAILED(check_device(stream));
  SegmentIntervals problem{};
  problem.batch = static_cast<int>(batch);
  problem.seqlen_q = static_cast<int>(seqlen_q);
  problem.seqlen_k = static_cast<int>(seqlen_k);
  problem.query_segment_ids = x.query_segment_ids.ints();
  problem.key_segment_ids = x.key_value_segment_ids.ints();
  problem.key_begin = x.key_begin.ints();
  problem.key_end = x.key_end.ints();
  return cuda_status(launch_segment_intervals(problem, *stream));
}

}  // namespace
}  // namespace jax_fa3

JAX_FA3_HANDLER(jax_fa3_fwd, jax_fa3::fwd_impl, .Attrs<jax_fa3::Attributes>());
JAX_FA3_HANDLER(jax_fa3_bwd, jax_fa3::bwd_impl, .Attrs<jax_fa3::Attributes>());
JAX_FA3_HANDLER(jax_fa3_bwd_packed, jax_fa3::bwd_packed_impl, .Attrs<jax_fa3::Attributes>());
JAX_FA3_HANDLER(jax_fa3_segment_intervals, jax_fa3::segment_intervals_impl);
