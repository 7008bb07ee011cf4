// Host side of the decoding kernels: Problem -> descriptors and scalars -> launches.
#pragma once

#include <algorithm>

#include "common/element.h"
#include "common/launch.h"
#include "common/tma.h"
#include "decode/cluster_kernel.h"
#include "decode/decode.h"
#include "decode/kernel.h"
#include "decode/workspace.h"

namespace jax_fa3::decode {

// Rows that TMA loads at once: as many as always lie in one page.
inline int box_rows(Problem const& p, int block_n) {
  if (p.pages_per_sequence == 1) return block_n;
  int rows = block_n;
  while (p.page_size % rows != 0) rows /= 2;
  return rows;
}

// How many CTAs share each tile by themselves, or 0: where there is one such CTA for nearly each
// SM, and pieces are equal whatever the lengths, or none can be so long that it matters.
template <class Traits>
int cluster_of(Problem const& p, int num_sms) {
  constexpr int kMostPositions = 512;  // of a CTA
  Sequences const& x = p.sequences;
  int const group = p.num_heads_q / p.num_heads_k;
  bool const one_tile = x.query_starts == nullptr && int64_t{x.rows_each} * group <= kClusterRows;
  if (!Traits::kClusters || !one_tile || p.split_size > 0) return 0;
  int64_t const tiles = int64_t{x.batch} * p.num_heads_k;
  int cluster = kLargestCluster;
  while (cluster > 1 && tiles * cluster > num_sms) cluster /= 2;
  bool const enough = cluster > 1 && tiles * cluster * 4 >= num_sms * 3;
  bool const is_short = x.capacity <= cluster * kMostPositions;
  return enough && is_short ? cluster : 0;
}

// How CTAs share tiles that have about as much to do (shares.h), if few CTAs have nothing to do
// then.
template <class Traits>
void find_shares(Problem const& p, int num_ctas, Params* params) {
  Sequences const& x = p.sequences;
  int const group = p.num_heads_q / p.num_heads_k;
  int const tiles = x.batch * p.num_heads_k;
  params->heads = Divider(p.num_heads_k);
  params->cluster = cluster_of<Traits>(p, num_ctas / Traits::kCtasPerSm);
  if (params->cluster > 0) {
    params->shares = Divider(params->cluster);
    params->tiles_of_cta = 1;
    params->always_equal = true;
    return;
  }
  bool const one_tile =
      x.query_starts == nullptr && int64_t{x.rows_each} * group <= Traits::kBlockM;
  if (!one_tile || p.split_size > 0) return;
  int const shares = std::max(num_ctas / tiles, 1);
  int const each = ceil_div(tiles, num_ctas);
  if (int64_t{tiles} * shares * 10 < int64_t{num_ctas} * each * 8) return;
  params->shares = Divider(shares);
  params->tiles_of_cta = each;
  params->always_equal = x.batch == 1;
}

// Of e4m3 caches the usual kernel has clusters, too.
template <class Traits>
constexpr auto clusters_kernel() {
  if constexpr (Traits::kFew) {
    return &decode_kernel<Traits>;
  } else {
    return &cluster_kernel<Traits>;
  }
}

template <class Traits>
cudaError_t launch_clusters(Problem const& p, Params& params, cudaStream_t stream) {
  auto const* const function = reinterpret_cast<void const*>(clusters_kernel<Traits>());
  constexpr int kBytes = sizeof(typename Traits::SharedStorage);
  JAX_FA3_RETURN_IF_ERROR(
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  JAX_FA3_RETURN_IF_ERROR(
      cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = params.cluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(p.sequences.batch * p.num_heads_k * params.cluster);
  config.blockDim = dim3(Traits::kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = p.appended ? 2 : 1;
  void* arguments[] = {&params};
  return cudaLaunchKernelExC(&config, function, arguments);
}

template <class Traits>
cudaError_t make_params(Problem const& p, int num_ctas, Params* params) {
  params->box_rows = box_rows(p, Traits::kBlockN);
  params->boxes = Traits::kBlockN / params->box_rows;
  // Without pages nothing is read, but a descriptor must point somewhere.
  Operand key = p.key_cache;
  Operand value = p.value_cache;
  if (p.num_pages == 0) key.data = value.data = const_cast<void*>(p.query);
  // Promoted to 256 bytes in the L2, loads alone take 260 us for 1 GiB on an H200, and 243 without.
  constexpr auto kPromotion = CU_TENSOR_MAP_L2_PROMOTION_NONE;
  constexpr auto kSwizzle = Traits::kWidens ? Swizzle::kNone : Swizzle::kBySlab;
  using Stored = std::conditional_t<Traits::kE4M3, uint8_t, uint16_t>;
  JAX_FA3_RETURN_IF_ERROR(make_tensor_map<Stored>(&params->key, key, p.head_dim, p.page_size,
                                                  p.num_heads_k, p.num_pages, Traits::kLoadSlab,
                                                  params->box_rows, kPromotion, kSwizzle));
  JAX_FA3_RETURN_IF_ERROR(make_tensor_map<Stored>(&params->value, value, p.head_dim_v, p.page_size,
                                                  p.num_heads_k, p.num_pages, Traits::kLoadSlabV,
                                                  params->box_rows, kPromotion, kSwizzle));
  params->query = p.query;
  params->out = p.out;
  params->lse = p.lse;
  params->sinks = p.sinks;
  params->sequences = p.sequences;
  params->tiles = {p.window, Divider(p.num_heads_q / p.num_heads_k),
                   cutlass::log2_down<Traits::kBlockM>::value,
                   cutlass::log2_down<Traits::kBlockN>::value, p.split_size / Traits::kBlockN};
  params->page_table = p.page_table;
  params->pages_per_sequence = p.pages_per_sequence;
  params->num_pages = p.num_pages;
  params->page_size = Divider(p.page_size);
  params->key_scale = p.key_scale;
  params->value_scale = p.value_scale;
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
  params->slot_rows = slot_rows(p.sequences, params->tiles.group.divisor, Traits::kBlockM);
  params->slots = slots(p.sequences, p.split_size);
  int64_t const rows = int64_t{num_ctas} * params->slots * params->slot_rows;
  params->partial_out = p.partials;
  params->partial_lse = p.partials + rows * p.head_dim_v;
  params->arrivals = p.arrivals;
  params->appended = p.appended;
  params->num_ctas = Divider(num_ctas);
  find_shares<Traits>(p, num_ctas, params);
  return cudaSuccess;
}

// is_second: of two kernels of one call.
template <class Traits>
cudaError_t launch_tile(Problem const& problem, cudaStream_t stream, bool is_second = false) {
  int num_ctas = 0;
  JAX_FA3_RETURN_IF_ERROR(count_sms(&num_ctas));
  num_ctas = std::min(num_ctas, kMostCtas) * Traits::kCtasPerSm;
  Params params{};
  JAX_FA3_RETURN_IF_ERROR(make_params<Traits>(problem, num_ctas, &params));
  if constexpr (Traits::kClusters) {
    if (params.cluster > 0) return launch_clusters<Traits>(problem, params, stream);
  }
  if (problem.sequences.tall) params.arrivals += kMostDecodeCtas;
  Start const start = is_second || params.appended ? Start::kEarly : Start::kInOrder;
  return launch_kernel(decode_kernel<Traits>, num_ctas, Traits::kThreads,
                       sizeof(typename Traits::SharedStorage), params, stream, start);
}

// Whether tall tiles may save what another kernel costs (Tiles::saved_by_tall), as far as shapes
// tell: so many sequences can have more rows than a small tile.
inline bool may_be_worth_two(Problem const& p, int most_small, int block_n) {
  double const tiles = 2.0 * p.sequences.rows / (2 * most_small + 1);
  double const blocks = double(p.sequences.capacity) / block_n + 1;
  return tiles * blocks * p.num_heads_k >= kWorthAnotherKernel;
}

template <DType kDType, int kHeadDim, int kHeadDimV, Reads kReads>
cudaError_t launch_cache(Problem const& problem, cudaStream_t stream) {
  using Element = ElementOf<kDType>;
  // 80 columns are no whole slabs: such heads take the next tile.
  constexpr auto width = [](int head_dim) { return head_dim == 80 ? 96 : head_dim; };
  constexpr int kWidth = width(kHeadDim);
  constexpr int kWidthV = width(kHeadDimV);
  int const group = problem.num_heads_q / problem.num_heads_k;
  int64_t const rows = int64_t{problem.sequences.rows} * group;
  // With splits the bits must not depend on how many rows there are; the sum of products with
  // scales of single values needs the exponents of bfloat16; and with scales of single keys few.h
  // was not run on a GPU since their place in memory is aligned.
  if constexpr (kReads == Reads::kWidened && kWidth % 64 == 0 && kWidthV % 64 == 0) {
    bool const of_positions = problem.key_scale.of_positions || problem.value_scale.of_positions;
    if (rows <= int64_t{problem.sequences.batch} * 16 && problem.split_size == 0 && !of_positions) {
      return launch_tile<Traits<Element, kWidth, kWidthV, 1, Reads::kFew>>(problem, stream);
    }
  }
  using Small = Traits<Element, kWidth, kWidthV, 1, kReads>;
  // Tall tiles read keys and values half as often, where there are rows for them; and registers for
  // scales beside a wide O.
  if constexpr (kReads == Reads::kAsComputed || kWidthV <= 192) {
    using Tall = Traits<Element, kWidth, kWidthV, 2, kReads>;
    Sequences const& x = problem.sequences;
    int const most_small = Small::kBlockM / group;  // rows of a sequence
    bool const ragged = x.query_starts != nullptr;
    if (!ragged && x.rows_each > most_small) return launch_tile<Tall>(problem, stream);
    // Which tile suits a sequence of ragged rows only the device knows: each kernel takes its own.
    // As many rows as sequences are taken to be one of each.
    if (ragged && x.rows > std::max(x.batch, most_small) &&
        may_be_worth_two(problem, most_small, Small::kBlockN)) {
      Problem each = problem;
      each.sequences.most_small = most_small;
      JAX_FA3_RETURN_IF_ERROR(launch_tile<Small>(each, stream));
      each.sequences.tall = true;
      return launch_tile<Tall>(each, stream, true);
    }
  }
  return launch_tile<Small>(problem, stream);
}

template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch(Problem const& problem, cudaStream_t stream) {
  constexpr auto kWidened = &launch_cache<kDType, kHeadDim, kHeadDimV, Reads::kWidened>;
  constexpr auto kAsComputed = &launch_cache<kDType, kHeadDim, kHeadDimV, Reads::kAsComputed>;
  return problem.e4m3_cache ? kWidened(problem, stream) : kAsComputed(problem, stream);
}

}  // namespace jax_fa3::decode
