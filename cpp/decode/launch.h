// Host side of the decoding kernels: Problem -> descriptors and scalars -> launches.
#pragma once

#include <algorithm>

#include "common/element.h"
#include "common/launch.h"
#include "common/tma.h"
#include "decode/decode.h"
#include "decode/kernel.h"
#include "decode/merge.h"
#include "decode/workspace.h"

namespace jax_fa3::decode {

// Rows that TMA loads at once: as many as always lie in one page.
inline int box_rows(Problem const& p, int block_n) {
  if (p.pages_per_sequence == 1) return block_n;
  int rows = block_n;
  while (p.page_size % rows != 0) rows /= 2;
  return rows;
}

template <class Traits>
cudaError_t make_params(Problem const& p, int num_ctas, Params* params) {
  params->box_rows = box_rows(p, Traits::kBlockN);
  // Without pages nothing is read, but a descriptor must point somewhere.
  Operand key = p.key;
  Operand value = p.value;
  if (p.num_pages == 0) key.data = value.data = const_cast<void*>(p.query);
  // Promoted to 256 bytes in the L2, loads alone take 260 us for 1 GiB on an H200, and 243 without.
  constexpr auto kPromotion = CU_TENSOR_MAP_L2_PROMOTION_NONE;
  JAX_FA3_RETURN_IF_ERROR(make_tensor_map(&params->key, key, p.head_dim, p.page_size, p.num_heads_k,
                                          p.num_pages, Traits::kSlab, params->box_rows,
                                          kPromotion));
  JAX_FA3_RETURN_IF_ERROR(make_tensor_map(&params->value, value, p.head_dim_v, p.page_size,
                                          p.num_heads_k, p.num_pages, Traits::kSlabV,
                                          params->box_rows, kPromotion));
  params->query = p.query;
  params->out = p.out;
  params->lse = p.lse;
  params->sinks = p.sinks;
  params->sequences = p.sequences;
  params->tiles = {p.window, p.num_heads_q / p.num_heads_k,
                   cutlass::log2_down<Traits::kBlockM>::value,
                   cutlass::log2_down<Traits::kBlockN>::value, p.split_size / Traits::kBlockN};
  params->page_table = p.page_table;
  params->pages_per_sequence = p.pages_per_sequence;
  params->num_pages = p.num_pages;
  params->page_size = p.page_size;
  params->num_heads_q = p.num_heads_q;
  params->num_heads_k = p.num_heads_k;
  params->head_dim = p.head_dim;
  params->head_dim_v = p.head_dim_v;
  jax_fa3::Problem scores{};
  scores.softmax_scale = p.softmax_scale;
  scores.soft_cap = p.soft_cap;
  ScoreScale const scale = score_scale(scores);
  params->softmax_scale = scale.softmax_scale;
  params->exponents = exponents_of(scale.softmax_scale * kLog2E);
  params->score = scale.score;
  params->slot_rows = slot_rows(p.sequences, params->tiles.group, Traits::kBlockM);
  params->slots = slots(p.sequences, p.split_size);
  int64_t const rows = int64_t{num_ctas} * params->slots * params->slot_rows;
  params->partial_out = p.partials;
  params->partial_lse = p.partials + rows * p.head_dim_v;
  params->splits = reinterpret_cast<Split*>(p.splits);
  return cudaSuccess;
}

template <class Traits>
cudaError_t launch_tile(Problem const& problem, cudaStream_t stream) {
  int num_ctas = 0;
  JAX_FA3_RETURN_IF_ERROR(count_sms(&num_ctas));
  num_ctas = std::min(num_ctas, kMostCtas) * Traits::kCtasPerSm;
  Params params{};
  JAX_FA3_RETURN_IF_ERROR(make_params<Traits>(problem, num_ctas, &params));
  JAX_FA3_RETURN_IF_ERROR(launch_kernel(decode_kernel<Traits>, num_ctas, Traits::kThreads,
                                        sizeof(typename Traits::SharedStorage), params, stream));
  return launch_kernel(merge_kernel<typename Traits::Element, Traits::kBlockM>,
                       num_ctas * merge_ctas(params.slot_rows), kMergeThreads, 0, params, stream,
                       Start::kEarly);
}

template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch(Problem const& problem, cudaStream_t stream) {
  using Element = ElementOf<kDType>;
  // 80 columns are no whole slabs: such heads take the next tile.
  constexpr auto width = [](int head_dim) { return head_dim == 80 ? 96 : head_dim; };
  constexpr int kWidth = width(kHeadDim);
  constexpr int kWidthV = width(kHeadDimV);
  int const group = problem.num_heads_q / problem.num_heads_k;
  // Tall tiles read keys and values half as often, where there are rows for them.
  if (int64_t{problem.sequences.rows} * group > int64_t{problem.sequences.batch} * 64) {
    return launch_tile<Traits<Element, kWidth, kWidthV, 2>>(problem, stream);
  }
  return launch_tile<Traits<Element, kWidth, kWidthV, 1>>(problem, stream);
}

}  // namespace jax_fa3::decode
