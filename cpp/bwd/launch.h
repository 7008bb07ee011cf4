// Host side of the backward kernels: BackwardProblem -> descriptors and scalars -> launches.
#pragma once

#include <algorithm>

#include "bwd/bwd.h"
#include "bwd/dq.h"
#include "bwd/kernel.h"
#include "bwd/postprocess.h"
#include "bwd/preprocess.h"
#include "bwd/range.h"
#include "common/element.h"
#include "common/launch.h"

namespace jax_fa3::bwd {

// Traits: of the kernel that is to be launched, whose tiles the descriptors load.
template <class Traits>
cudaError_t make_params(BackwardProblem const& problem, typename Traits::Params* params) {
  Problem const& p = problem.forward;
  constexpr int kSlabQ = slab(Traits::kHeadDim);
  constexpr int kSlabV = slab(Traits::kHeadDimV);
  auto const map = [&](CUtensorMap* map, Operand operand, bool of_keys, bool of_value, int slab,
                       int box) {
    // Without rows nothing is read, but a descriptor must point somewhere.
    for (void* somewhere : {static_cast<void*>(problem.row_stats), problem.dkey.data}) {
      if (operand.data == nullptr) operand.data = somewhere;
    }
    return make_tensor_map(map, operand, of_value ? p.head_dim_v : p.head_dim,
                           of_keys ? p.seqlen_k : p.seqlen_q,
                           of_keys ? p.num_heads_k : p.num_heads_q, p.batch, slab, box);
  };
  constexpr int kBlockM = Traits::kBlockM;
  constexpr int kBlockN = Traits::kBlockN;
  JAX_FA3_RETURN_IF_ERROR(map(&params->query, p.query, false, false, kSlabQ, kBlockM));
  JAX_FA3_RETURN_IF_ERROR(map(&params->dout, problem.dout, false, true, kSlabV, kBlockM));
  JAX_FA3_RETURN_IF_ERROR(map(&params->key, p.key, true, false, Traits::kSlabK, kBlockN));
  JAX_FA3_RETURN_IF_ERROR(map(&params->value, p.value, true, true, kSlabV, kBlockN));
  params->accumulates_dq = problem.accumulates_dq;
  params->finishes_dq = problem.dquery.data != nullptr;
  params->dkv_fp32 = problem.dkv_dtype == DType::kFloat32;
  // Gradients are stored by warpgroups, dQ in boxes of 64 rows.
  if (params->finishes_dq) {
    JAX_FA3_RETURN_IF_ERROR(map(&params->dquery, problem.dquery, false, false, kSlabQ, 64));
  }
  params->dkey_rows = problem.dkey;
  params->dvalue_rows = problem.dvalue;
  params->dkv_partial = problem.dkv_partial;
  params->num_splits = problem.dkv_partial == nullptr ? 1 : problem.num_splits;
  if (!params->dkv_fp32) {
    constexpr int kRows = Traits::kGradRows;
    JAX_FA3_RETURN_IF_ERROR(map(&params->dkey, problem.dkey, true, false, kSlabQ, kRows));
    JAX_FA3_RETURN_IF_ERROR(map(&params->dvalue, problem.dvalue, true, true, kSlabV, kRows));
  }
  params->out = p.out;
  params->dout_rows = problem.dout;
  params->value_rows = p.value;
  params->lse = p.lse;
  params->lse_low = p.lse_low;
  params->dlse = problem.dlse != nullptr ? problem.dlse : problem.neg_delta;
  params->row_stats = problem.row_stats;
  params->row_intervals = reinterpret_cast<int2*>(problem.row_intervals);
  params->query_blocks = reinterpret_cast<QueryBlock*>(problem.query_blocks);
  bool const partial_dq = params->accumulates_dq || !params->finishes_dq;
  params->ranges = partial_dq ? nullptr : reinterpret_cast<uint32_t*>(problem.ranges);
  params->dq_accum = problem.dq_accum;
  params->mask = p.mask;
  constexpr BwdTile tile = Traits::kTile;
  params->num_m_blocks = ceil_div(p.seqlen_q, tile.block_m);
  params->batch = p.batch;
  params->num_heads_q = p.num_heads_q;
  params->num_heads_k = p.num_heads_k;
  params->group = p.num_heads_q / p.num_heads_k;
  params->head_dim = p.head_dim;
  params->head_dim_v = p.head_dim_v;
  ScoreScale const scale = score_scale(p);
  params->softmax_scale_log2 = scale.softmax_scale * kLog2E;
  params->score = scale.score;
  params->softmax_scale = p.softmax_scale;
  params->heads = p.heads;
  params->dsinks = problem.dsinks;
  params->dsinks_blocks = problem.dsinks_blocks;

  bool const masked = p.mask.restricts() || p.mask_bits.bits != nullptr;
  int const group = params->group;
  params->turns = tile.fused ? problem.turns : nullptr;
  params->order = bwd_order(
      {p.batch, p.seqlen_q, p.seqlen_k, p.num_heads_q, p.num_heads_k, p.head_dim, p.head_dim_v},
      Traits::kHeadDim, params->num_splits, masked, params->turns != nullptr,
      section_factor(p.mask));
  if (p.mask_bits.bits != nullptr && params->turns == nullptr) {
    // It may make some blocks of keys much longer than others, as the first keys are that every row
    // sees: those of many heads begin first.
    constexpr int kFewestHeads = 32;
    int const all = p.num_heads_k * params->num_splits * p.batch;
    params->order.section = std::max(params->order.section, std::min(kFewestHeads, all));
  }
  int64_t const heads_q =
      heads_per_section(p.seqlen_k, p.head_dim, p.head_dim_v, group) * section_factor(p.mask);
  params->dq_order = {
      ceil_div(p.seqlen_q, kBlockM), p.num_heads_q, p.batch,
      static_cast<int>(std::min(masked ? heads_q : group, int64_t{p.num_heads_q} * p.batch))};
  if constexpr (Traits::kHasBias) {
    params->softmax_scale_log2 = kLog2E;
    params->dbias = problem.dbias;
    params->dbias_batch_stride = p.bias.batch_stride;
    params->dbias_head_stride = p.bias.head_stride;
    params->dbias_row_stride = p.bias.row_stride;
    return make_bias(&params->bias, p.bias, p.batch, p.num_heads_q, p.seqlen_q, p.softmax_scale);
  }
  if constexpr (Traits::kHasBits) params->bits = p.mask_bits;
  if constexpr (Traits::kHasAlibi) {
    params->alibi = make_alibi(p);
    params->dalibi = problem.dalibi;
    params->dalibi_parts = problem.dalibi_parts;
  }
  if constexpr (Traits::kHasRelative) {
    params->relative_bias = make_relative_bias(p);
    params->drelative = problem.drelative;
    params->drelative_parts = problem.drelative_parts;
  }
  if constexpr (Traits::kHasDropout) {
    params->dropout = make_dropout(p.dropout_words, p.dropout);
    params->twice_kept = 2.f / params->dropout.scale;
    params->softmax_scale *= ds_unit<typename Traits::Element>(params->dropout);
  }
  return cudaSuccess;
}

template <class Params>
cudaError_t launch_if_any(void (*kernel)(Params), int64_t num_ctas, int num_threads,
                          int shared_bytes, Params& params, cudaStream_t stream) {
  if (num_ctas == 0) return cudaSuccess;
  return launch_kernel(kernel, num_ctas, num_threads, shared_bytes, params, stream);
}

// What comes before the main kernel. kAccumulators: preprocess's. RangeParams: with dropout, if
// there is any.
template <class Element, int kBlockM, int kHeadDimV, int kAccumulators, class RangeParams>
cudaError_t launch_before(BackwardProblem const& problem, RangeParams& range_params,
                          cudaStream_t stream) {
  Params& params = range_params;
  int const batch = problem.forward.batch;
  bool const ranged = has_ranges<Element>(params);
  auto const ctas_of_range = [](int64_t threads) {
    return (threads + kRangeThreads - 1) / kRangeThreads;
  };
  if (ranged) {
    std::size_t const bytes = sizeof(uint32_t) * kNumRanges * batch * params.num_heads_k;
    JAX_FA3_RETURN_IF_ERROR(cudaMemsetAsync(params.ranges, 0, bytes, stream));
    int64_t const chunks = range_chunks(batch, params.mask.seqlen_k, params.num_heads_k);
    JAX_FA3_RETURN_IF_ERROR(launch_if_any(range_kernel<Element, kHeadDimV, RangeParams>,
                                          ctas_of_range(chunks * 32), kRangeThreads, 0,
                                          range_params, stream));
  }
  constexpr auto kPreprocess = preprocess_kernel<Element, kBlockM, kHeadDimV, kAccumulators>;
  int64_t const blocks = int64_t{params.num_m_blocks} * params.num_heads_q * batch;
  JAX_FA3_RETURN_IF_ERROR(
      launch_if_any(kPreprocess, blocks, kPreprocessThreads, 0, params, stream));
  if (!ranged) return cudaSuccess;
  return launch_if_any(scale_delta_kernel<Element, kBlockM>, ctas_of_range(blocks * kBlockM),
                       kRangeThreads, 0, params, stream);
}

// What comes behind it where dK and dV are in parts.
template <class Element>
cudaError_t launch_sum_partial(BackwardProblem const& problem, Params& params,
                               cudaStream_t stream) {
  if (params.dkv_partial == nullptr) return cudaSuccess;
  int64_t const vectors = int64_t{problem.forward.batch} * params.mask.seqlen_k *
                          params.num_heads_k * (params.head_dim + params.head_dim_v) / 8;
  return launch_if_any(sum_partial_kernel<Element>,
                       (vectors + kPartialThreads - 1) / kPartialThreads, kPartialThreads, 0,
                       params, stream);
}

// Main: the traits of the main kernel.
template <class Main>
cudaError_t launch_kernels(BackwardProblem const& problem, cudaStream_t stream) {
  using Element = typename Main::Element;
  constexpr int kWidth = Main::kHeadDim;
  constexpr int kWidthV = Main::kHeadDimV;
  if (problem.forward.seqlen_q == 0 && problem.forward.seqlen_k == 0) return cudaSuccess;
  typename Main::Params of_main{};
  JAX_FA3_RETURN_IF_ERROR(make_params<Main>(problem, &of_main));
  Params& params = of_main;
  using RangeParams = std::conditional_t<Main::kHasDropout, typename Main::Params, Params>;
  constexpr int kAccumulators = Main::kFused ? Main::kSizedQ : 0;
  JAX_FA3_RETURN_IF_ERROR(
      (launch_before<Element, Main::kBlockM, kWidthV, kAccumulators, RangeParams>(problem, of_main,
                                                                                  stream)));
  int num_ctas = params.order.num_tiles();
  if constexpr (Main::kPersistent) {
    int num_sms = 0;
    JAX_FA3_RETURN_IF_ERROR(count_sms(&num_sms));
    // At head dim 64 tiles of split rows go better with a turn for each step, in CTAs of their own
    // (mma.h). Without query rows nobody has zeroed the counter.
    bool const pays = params.num_splits == 1 || !Main::kNarrow;
    if (num_ctas > num_sms && pays && params.num_m_blocks > 0) {
      num_ctas = num_sms;
      params.tile_counter =
          reinterpret_cast<int*>(params.row_stats + RowStats<Main::kBlockM>::kTaken);
    }
  }
  JAX_FA3_RETURN_IF_ERROR(launch_if_any(bwd_kernel<Main>, num_ctas, Main::kThreads,
                                        sizeof(typename Main::SharedStorage), of_main, stream));
  JAX_FA3_RETURN_IF_ERROR(launch_sum_partial<Element>(problem, params, stream));
  if constexpr (Main::kFused) {
    if (!params.finishes_dq) return cudaSuccess;
    // Of dropout, bits and terms by distance it knows nothing: the kernel is that without.
    using Plain =
        std::conditional_t<Main::kPaired, Main, Traits<Element, kWidth, kWidthV, Main::kHasBias>>;
    int64_t const blocks =
        int64_t{params.num_m_blocks} * params.num_heads_q * problem.forward.batch;
    return launch_if_any(postprocess_kernel<Plain>, blocks, Main::kConsumerThreads, 0, params,
                         stream);
  } else {
    using Query = QueryTraits<Element, kWidth, kWidthV>;
    JAX_FA3_RETURN_IF_ERROR(make_params<Query>(problem, &of_main));
    return launch_if_any(dq_kernel<Query>, params.dq_order.num_tiles(), Query::kThreads,
                         sizeof(typename Query::SharedStorage), of_main, stream);
  }
}

template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch(BackwardProblem const& problem, cudaStream_t stream) {
  using Element = ElementOf<kDType>;
  constexpr int kWidth = bwd_width(kHeadDim);
  constexpr int kWidthV = kHeadDimV == kHeadDim ? kWidth : kHeadDimV;
  if (problem.forward.dropout != 0) {
    if constexpr (takes_dropout(size_for(kHeadDim, kHeadDimV))) {
      return launch_kernels<Traits<Element, kWidth, kWidthV, false, true>>(problem, stream);
    }
    return cudaErrorNotSupported;  // the handlers have refused it
  }
  if (problem.forward.bias.data != nullptr) {
    if constexpr (takes_bias(kHeadDim)) {
      return launch_kernels<Traits<Element, kWidth, kWidthV, true>>(problem, stream);
    }
    return cudaErrorNotSupported;  // likewise
  }
  if (problem.forward.mask_bits.bits != nullptr) {
    if constexpr (takes_mask_bits(kHeadDim)) {
      return launch_kernels<BitsTraits<Element, kWidth, kWidthV>>(problem, stream);
    }
    return cudaErrorNotSupported;  // likewise
  }
  if (problem.forward.heads.alibi_slopes.exists()) {
    if constexpr (takes_bias(kHeadDim)) {
      return launch_kernels<AlibiTraits<Element, kWidth, kWidthV>>(problem, stream);
    }
    return cudaErrorNotSupported;  // likewise
  }
  if (problem.forward.relative_bias != nullptr) {
    if constexpr (takes_bias(kHeadDim)) {
      return launch_kernels<RelativeTraits<Element, kWidth, kWidthV>>(problem, stream);
    }
    return cudaErrorNotSupported;  // likewise
  }
  using Plain =
      std::conditional_t<is_paired(bwd_tile(kWidth)), PairedTraits<Element, kWidth, kWidthV>,
                         Traits<Element, kWidth, kWidthV>>;
  return launch_kernels<Plain>(problem, stream);
}

}  // namespace jax_fa3::bwd
