// Host side of the forward kernel: Problem -> descriptors and scalars -> launch.
#pragma once

#include <algorithm>
#include <climits>
#include <type_traits>

#include "common/element.h"
#include "common/launch.h"
#include "fwd/fwd.h"
#include "fwd/kernel.h"

namespace jax_fa3::fwd {

// Whether the last tile of so many query rows has none for the last of its warpgroups.
constexpr bool has_idle_warpgroup(int seqlen_q, int block_m) {
  int const rows = seqlen_q % block_m;
  return rows > 0 && rows <= block_m - 64;
}

// Whether rows see so few keys that their tiles should be small: under a causal mask they see half
// of them.
template <int kHeadDim>
bool takes_few_keys_tile(Mask const& mask) {
  if (!has_small_tile(kHeadDim)) return few_keys(mask);
  return most_visible_keys(mask) <= (mask.window_right == kUnbounded ? 256 : 1024);
}

template <Kind kKind>
using KindIs = std::integral_constant<Kind, kKind>;

// Whether one block holds all keys, of which nothing is masked.
inline bool takes_short_keys_tile(Problem const& problem) {
  return problem.seqlen_k <= kShortKeys && !problem.mask.restricts() &&
         problem.out_accum == nullptr && problem.out_dtype != DType::kFloat32;
}

// Whether the last block has so few keys that it should be short. (With a soft cap all blocks are
// treated as masked.)
inline bool takes_rest_kernel(Problem const& problem) {
  int const rest = problem.seqlen_k % Traits<cutlass::half_t, 128, 128, Kind::kRest>::kBlockN;
  return problem.seqlen_k > rest && 0 < rest && rest <= kRestKeys && !problem.mask.restricts() &&
         score_scale(problem).score.cap_scale == 0.f;
}

// What tiles of equal length take, in hundredths of a step of 128 x 128: the rounds in which they
// are dealt out, times a tile's steps and what it takes besides. A last tile with rows for some of
// its warpgroups takes about three fifths. (cpp/README.md has the measured numbers.)
constexpr int64_t time_of_rounds(Problem const& p, int block_m, int64_t time_of_tile) {
  int64_t const heads = int64_t{p.batch} * p.num_heads_q;
  int const shorter = has_idle_warpgroup(p.seqlen_q, block_m) && block_m > 128;
  int64_t const fifths = heads * (5 * ceil_div(p.seqlen_q, block_m) - 2 * shorter);
  return ceil_div(fifths, 5 * kMostCtas) * time_of_tile;
}

// The kernel of those that have larger tiles, or kUsual. With a soft cap, which is applied where
// the mask is, all of them are treated as masked: there larger ones were not timed.
template <int kHeadDim>
Kind kind_by_tile(Problem const& p) {
  constexpr FwdTile kTall = tall_tile(kHeadDim);
  constexpr int kUsualKeys = fwd_tile(kHeadDim, kHeadDim, false).block_n;
  // High tiles of different lengths, for all CTAs to end together.
  constexpr int kLeastTilesOfCta = 5;
  constexpr int kLeastKeys = kHeadDim == 96 ? 2048 : 8192;
  if (score_scale(p).score.cap_scale != 0.f) return Kind::kUsual;
  Mask const& mask = p.mask;
  if (mask.restricts()) {
    bool const is_causal = mask.window_right != kUnbounded && mask.window_left == kUnbounded &&
                           mask.key_begin == nullptr && mask.key_end == nullptr;
    int64_t const tiles = int64_t{p.batch} * p.num_heads_q * ceil_div(p.seqlen_q, kTall.block_m);
    bool const many = p.seqlen_k >= kLeastKeys && tiles >= kLeastTilesOfCta * kMostCtas;
    return is_causal && many ? Kind::kTall : Kind::kUsual;
  }
  int const rest = p.seqlen_k % kUsualKeys;
  int64_t const usual_blocks = p.seqlen_k / kUsualKeys * 100 +
                               (rest == 0 ? 0 : (kHeadDim == 128 && rest <= kRestKeys ? 30 : 100));
  int64_t const usual = time_of_rounds(p, 128, usual_blocks + 300);
  int64_t const high = time_of_rounds(
      p, kTall.block_m, ceil_div(p.seqlen_k, kTall.block_n) * (kHeadDim == 96 ? 103 : 89) + 500);
  int64_t const with_long =
      kHeadDim == 128 ? time_of_rounds(p, 128, ceil_div(p.seqlen_k, kLongTile.block_n) * 133 + 340)
                      : usual;
  if (high < usual - usual / 100 && high <= with_long) return Kind::kTall;
  return with_long < usual - usual / 100 ? Kind::kLong : Kind::kUsual;
}

// All but the descriptors.
inline void set_common(Problem const& p, int block_m, Params* params) {
  if (p.out_dtype == DType::kFloat32) params->out_fp32 = static_cast<float*>(p.out.data);
  params->out_batch_stride = p.out.batch_stride;
  params->out_seqlen_stride = p.out.seqlen_stride;
  params->out_head_stride = p.out.head_stride;
  params->lse = p.lse;
  params->lse_low = p.lse_low;
  params->out_accum = p.out_accum;
  params->mask = p.mask;
  params->num_heads_q = p.num_heads_q;
  params->group = p.num_heads_q / p.num_heads_k;
  params->head_dim_v = p.head_dim_v;
  // Without a mask all tiles are equally long: they are dealt out in fixed rounds, head by head.
  bool const masked = p.mask.restricts() || p.mask_bits.bits != nullptr;
  params->tile_counter = masked ? p.tile_counter : nullptr;
  int64_t section = masked ? heads_per_section(p.seqlen_k, p.head_dim, p.head_dim_v, params->group)
                           : params->group;
  section *= section_factor(p.mask);
  params->order = {{ceil_div(p.seqlen_q, block_m), p.num_heads_q, p.batch,
                    static_cast<int>(std::min(section, int64_t{p.num_heads_q} * p.batch))}};
  ScoreScale const scale = score_scale(p);
  params->softmax_scale = scale.softmax_scale;
  params->exponents = exponents_of(scale.softmax_scale * kLog2E);
  params->score = scale.score;
  params->heads = p.heads;
}

template <class Traits>
cudaError_t make_params(Problem const& problem, typename Traits::Params* params) {
  Problem const& p = problem;
  // Without keys nothing is read, but a descriptor must point somewhere.
  Operand key = p.key;
  Operand value = p.value;
  if (p.seqlen_k == 0) key.data = value.data = p.query.data;
  // Wide rows are fetched as they are asked for: more of them at a time into the L2 cache costs
  // short sequences 1 to 4 % at head dim 256, and is as fast at 64 and 128.
  constexpr auto kPromotion = Traits::kHeadDim > 128 ? CU_TENSOR_MAP_L2_PROMOTION_L2_64B
                                                     : CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  JAX_FA3_RETURN_IF_ERROR(make_tensor_map(&params->query, p.query, p.head_dim, p.seqlen_q,
                                          p.num_heads_q, p.batch, Traits::kSlab, 64, kPromotion));
  JAX_FA3_RETURN_IF_ERROR(make_tensor_map(&params->key, key, p.head_dim, p.seqlen_k, p.num_heads_k,
                                          p.batch, Traits::kSlab, Traits::kBlockN, kPromotion));
  JAX_FA3_RETURN_IF_ERROR(make_tensor_map(&params->value, value, p.head_dim_v, p.seqlen_k,
                                          p.num_heads_k, p.batch, Traits::kSlabV, Traits::kBlockN,
                                          kPromotion));
  if (p.out_dtype != DType::kFloat32) {
    JAX_FA3_RETURN_IF_ERROR(make_tensor_map(&params->out, p.out, p.head_dim_v, p.seqlen_q,
                                            p.num_heads_q, p.batch, Traits::kSlabV, 64));
  }
  set_common(p, Traits::kBlockM, params);
  // Not where rows have a key_begin, whose tiles are in no order of their length.
  bool const sorted = params->tile_counter != nullptr && p.mask.key_begin == nullptr;
  if (sorted) params->order.make_early(params->group);
  if constexpr (Traits::kHasBias) {
    float const factor = params->softmax_scale;
    params->softmax_scale = 1.f;
    params->exponents = exponents_of(kLog2E);
    return make_bias(&params->bias, p.bias, p.batch, p.num_heads_q, p.seqlen_q, factor);
  }
  // If a head's last tile has so few rows that a warpgroup gets none, it takes less time than
  // others and comes last. (Under a mask tiles differ anyway.)
  if constexpr (Traits::kBlocksByWarpgroup) {
    params->order.short_last =
        !p.mask.restricts() && has_idle_warpgroup(p.seqlen_q, Traits::kBlockM);
  }
  if constexpr (Traits::kHasBits) params->bits = p.mask_bits;
  if constexpr (Traits::kHasAlibi) params->alibi = make_alibi(p);
  if constexpr (Traits::kHasRelative) params->relative_bias = make_relative_bias(p);
  if constexpr (Traits::kSharesKeys) {
    params->batch = p.batch;
    params->num_splits = std::max(p.num_splits, 1);
    params->order.batch = p.batch * params->num_splits;
  }
  if constexpr (Traits::kHasDropout) params->dropout = make_dropout(p.dropout_words, p.dropout);
  return cudaSuccess;
}

inline cudaError_t reset_counter(Params const& params, cudaStream_t stream) {
  if (params.tile_counter == nullptr) return cudaSuccess;
  return cudaMemsetAsync(params.tile_counter, 0, sizeof(int), stream);
}

template <class Traits>
cudaError_t launch_persistent(typename Traits::Params& params, cudaStream_t stream,
                              Start start = Start::kInOrder, int most_ctas = INT_MAX) {
  int num_ctas = 0;
  JAX_FA3_RETURN_IF_ERROR(count_sms(&num_ctas));
  num_ctas = std::min(num_ctas * Traits::kCtasPerSm, most_ctas);
  return launch_kernel(fwd_kernel<Traits>, std::min(num_ctas, params.order.num_tiles()),
                       Traits::kThreads, sizeof(typename Traits::SharedStorage), params, stream,
                       start);
}

template <class Traits>
cudaError_t launch_tile(Problem const& problem, cudaStream_t stream) {
  typename Traits::Params params{};
  JAX_FA3_RETURN_IF_ERROR(make_params<Traits>(problem, &params));
  JAX_FA3_RETURN_IF_ERROR(reset_counter(params, stream));
  int64_t most_ctas = INT_MAX;
  if (problem.long_sums_size > 0) {
    params.long_sums = problem.long_sums;
    most_ctas = problem.long_sums_size / long_sums_of_cta(Traits::kBlockM, Traits::kHeadDimV);
  }
  return launch_persistent<Traits>(params, stream, Start::kInOrder, static_cast<int>(most_ctas));
}

// The parts of the keys, and their kernel's successor, which joins them.
template <class Traits>
cudaError_t launch_splits(Problem const& problem, cudaStream_t stream) {
  Problem of_parts = problem;
  int64_t const rows = int64_t{problem.batch} * problem.num_heads_q * problem.seqlen_q;
  int64_t const row = int64_t{problem.num_heads_q} * problem.head_dim_v;
  of_parts.out_dtype = DType::kFloat32;
  of_parts.out = {problem.long_sums, row * problem.seqlen_q, row, problem.head_dim_v};
  of_parts.lse = problem.long_sums + rows * problem.num_splits * problem.head_dim_v;
  of_parts.lse_low = of_parts.lse + rows * problem.num_splits;
  of_parts.long_sums_size = 0;
  JAX_FA3_RETURN_IF_ERROR(launch_tile<Traits>(of_parts, stream));
  Parts parts{problem.long_sums, of_parts.lse,     of_parts.lse_low,    problem.num_splits,
              problem.batch,     problem.seqlen_q, problem.num_heads_q, problem.head_dim_v,
              problem.out,       problem.lse,      problem.lse_low};
  int64_t const vectors = rows * problem.head_dim_v / 8;
  return launch_kernel(join_parts_kernel<typename Traits::Element>, ceil_div(vectors, kJoinThreads),
                       kJoinThreads, 0, parts, stream, Start::kEarly);
}

template <DType kDType, int kHeadDim, int kHeadDimV>
cudaError_t launch(Problem const& problem, cudaStream_t stream) {
  using Element = ElementOf<kDType>;
  constexpr bool kTwoTiles =
      few_keys_tile(kHeadDim, kHeadDimV).block_m != fwd_tile(kHeadDim, kHeadDimV, false).block_m;
  // Of a kind that not all head dims have; the handlers have refused what is not built.
  auto const launch_kind = [&](auto kind, auto is_built) {
    if constexpr (decltype(is_built)::value) {
      using Traits = Traits<Element, kHeadDim, kHeadDimV, decltype(kind)::value>;
      return launch_tile<Traits>(problem, stream);
    } else {
      return cudaErrorNotSupported;
    }
  };
  constexpr std::bool_constant<takes_bias(kHeadDim)> kTakesTerms{};
  if (problem.bias.data != nullptr) return launch_kind(KindIs<Kind::kBias>{}, kTakesTerms);
  if (problem.mask_bits.bits != nullptr) {
    return launch_kind(KindIs<Kind::kBits>{}, std::bool_constant<takes_mask_bits(kHeadDim)>{});
  }
  if (problem.dropout != 0) {
    constexpr bool kTakesDropout = takes_dropout(size_for(kHeadDim, kHeadDimV));
    return launch_kind(KindIs<Kind::kDropout>{}, std::bool_constant<kTakesDropout>{});
  }
  if (problem.heads.alibi_slopes.exists()) {
    return launch_kind(KindIs<Kind::kAlibi>{}, kTakesTerms);
  }
  if (problem.relative_bias != nullptr) {
    return launch_kind(KindIs<Kind::kRelative>{}, kTakesTerms);
  }
  if (problem.num_splits > 1) {
    return launch_splits<Traits<Element, kHeadDim, kHeadDimV, Kind::kMany>>(problem, stream);
  }
  bool const sees_few_keys = takes_few_keys_tile<kHeadDim>(problem.mask);
  if (problem.long_sums_size > 0 && !sees_few_keys) {
    return launch_kind(KindIs<Kind::kMany>{}, std::true_type{});
  }
  if constexpr (has_small_tile(kHeadDim)) {
    if (takes_short_keys_tile(problem)) {
      return launch_kind(KindIs<Kind::kShort>{}, std::true_type{});
    }
  }
  if constexpr (has_tall_tile(kHeadDim, kHeadDimV)) {
    constexpr std::bool_constant<has_long_tile(kHeadDim, kHeadDimV)> kHasLong{};
    Kind const kind = kind_by_tile<kHeadDim>(problem);
    if (kind == Kind::kTall) return launch_kind(KindIs<Kind::kTall>{}, std::true_type{});
    if (kind == Kind::kLong) return launch_kind(KindIs<Kind::kLong>{}, kHasLong);
  }
  if constexpr (has_rest_kernel(kHeadDim, kHeadDimV)) {
    if (takes_rest_kernel(problem)) return launch_kind(KindIs<Kind::kRest>{}, std::true_type{});
  }
  if (kTwoTiles && sees_few_keys) {
    return launch_kind(KindIs<Kind::kFew>{}, std::bool_constant<kTwoTiles>{});
  }
  return launch_kind(KindIs<Kind::kUsual>{}, std::true_type{});
}

}  // namespace jax_fa3::fwd
