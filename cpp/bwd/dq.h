// dQ of wide heads, in a kernel of its own: a CTA owns 128 query rows and walks over the keys, as
// the forward does. S and dP are computed a second time; in return no dQ is summed in global
// memory.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>

#include "bwd/load.h"
#include "bwd/postprocess.h"
#include "common/gemm.h"
#include "common/softmax.h"

namespace jax_fa3::bwd {

template <class Element_, int kHeadDim_, int kHeadDimV_>
struct QueryTraits {
  using Params = bwd::Params;
  static constexpr bool kHasBias = false;
  static constexpr bool kHasDropout = false;
  static constexpr bool kHasBits = false;
  static constexpr bool kHasAlibi = false;
  static constexpr bool kHasRelative = false;
  static constexpr BwdTile kTile = bwd_tile(kHeadDim_);  // of the main kernel
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr int kBlockM = kBwdQueryRows;
  static constexpr int kBlockN = 64;
  static constexpr int kStages = 2;                        // of K
  static constexpr int kStagesV = kHeadDim > 192 ? 1 : 2;  // of V: there is no room for more
  static constexpr int kRecordRows = kTile.block_m;        // of preprocess's records
  static constexpr int kGradRows = 64;                     // that a warpgroup stores
  static constexpr int kConsumerThreads = 256;
  static constexpr int kThreads = 128 + kConsumerThreads;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters = 240;

  using LayoutQ = LayoutRows<kBlockM, kHeadDim, 1>;
  using LayoutdO = LayoutRows<kBlockM, kHeadDimV, 1>;
  using LayoutK = LayoutRows<kBlockN, kHeadDim, kStages>;
  using LayoutKt = LayoutColumns<kBlockN, kHeadDim, kStages>;
  using LayoutV = LayoutRows<kBlockN, kHeadDimV, kStagesV>;
  using TileM = Layout<Shape<_2, _1, _1>>;
  template <int kDim>
  using MmaScores = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kBlockN>, Int<kDim>>>(),
      TileM{}));
  using MmadQ = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, Shape<_64, Int<kHeadDim>, Int<kBlockN>>,
                           GMMA::Major::K, GMMA::Major::MN>(),
      TileM{}));
  static constexpr int kSlabK = slab(kHeadDim);
  static constexpr int kSizeQ = kBlockM * kHeadDim;
  static constexpr int kSizeK = kBlockN * kHeadDim;  // of one stage
  static constexpr int kSizeV = kBlockN * kHeadDimV;

  struct SharedStorage {
    alignas(1024) uint16_t query[kSizeQ];
    alignas(1024) uint16_t dout[kBlockM * kHeadDimV];
    alignas(1024) uint16_t key[kStages * kSizeK];
    alignas(1024) uint16_t value[kStagesV * kSizeV];
    FullBarrier query_full;
    FullBarrier dout_full;
    FullBarrier staged;
    Pipeline<kStages> key_pipeline;
    Pipeline<kStagesV> value_pipeline;
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

// What preprocess wrote about a tile's rows: its blocks may be smaller than this kernel's tiles.
template <class Traits>
CUTLASS_DEVICE QueryBlock query_block(Params const& params, TileCoord tile) {
  constexpr int kRecords = Traits::kBlockM / Traits::kRecordRows;
  constexpr int kMasks = Traits::kRecordRows / 32;
  QueryBlock block{};
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < kRecords; ++i) {
    int const record = tile.block * kRecords + i;
    if (record >= params.num_m_blocks) break;
    QueryBlock const& part = params.blocks_of(tile.batch)[record];
    block.hull.merge(part.hull);
    for (int rows = 0; rows < kMasks; ++rows) {
      block.blind.bits[i * kMasks + rows] = part.blind.bits[rows];
    }
  }
  return block;
}

template <class Traits>
CUTLASS_DEVICE void load_dq(Params const& params, typename Traits::SharedStorage& storage,
                            WorkTile const& work) {
  constexpr int kBlockM = Traits::kBlockM;
  constexpr int kBlockN = Traits::kBlockN;
  constexpr auto kKeep = TMA::CacheHintSm90::EVICT_LAST;
  constexpr auto kReadOnce = TMA::CacheHintSm90::EVICT_FIRST;
  Mask const& mask = params.mask;
  int const batch = work.tile.batch;
  KeySource const keys{batch, work.tile.head / params.group};
  RowCoord const rows{work.tile.block * kBlockM, work.tile.head, batch};
  int const length_k = mask.length_k(batch);
  PipelineState<Traits::kStages> key_state;
  PipelineState<Traits::kStagesV> value_state;
  uint32_t staged_phase = 0;
  auto const padding = [&](int n_block) {
    return RowSet::from(length_k < mask.seqlen_k ? length_k - n_block * kBlockN : kBlockN, kBlockN);
  };

  for (int n_block = work.blocks.end - 1; n_block >= work.blocks.begin; --n_block) {
    storage.key_pipeline.empty[key_state.stage].wait(key_state.phase ^ 1);
    load_tile<kBlockN, Traits::kHeadDim>(params.key, storage.key_pipeline.full[key_state.stage],
                                         storage.staged, staged_phase, kKeep,
                                         storage.key + key_state.stage * Traits::kSizeK,
                                         keys.block<kBlockN>(n_block), padding(n_block));
    key_state.advance();
    if (n_block == work.blocks.end - 1) {
      load_tile<kBlockM, Traits::kHeadDim>(params.query, storage.query_full, storage.staged,
                                           staged_phase, kReadOnce, storage.query, rows,
                                           query_block<Traits>(params, work.tile).blind);
      load_tile<kBlockM, Traits::kHeadDimV>(params.dout, storage.dout_full, storage.staged,
                                            staged_phase, kReadOnce, storage.dout, rows,
                                            query_block<Traits>(params, work.tile).blind);
    }
    storage.value_pipeline.empty[value_state.stage].wait(value_state.phase ^ 1);
    load_tile<kBlockN, Traits::kHeadDimV>(
        params.value, storage.value_pipeline.full[value_state.stage], storage.staged, staged_phase,
        kKeep, storage.value + value_state.stage * Traits::kSizeV, keys.block<kBlockN>(n_block),
        padding(n_block));
    value_state.advance();
  }
}

template <class Traits>
CUTLASS_DEVICE void consume_dq(Params const& params, typename Traits::SharedStorage& storage,
                               WorkTile work, int warpgroup) {
  using Element = typename Traits::Element;
  constexpr int kBlockM = Traits::kBlockM;
  constexpr int kBlockN = Traits::kBlockN;
  typename Traits::template MmaScores<Traits::kHeadDim> mma_s;
  typename Traits::template MmaScores<Traits::kHeadDimV> mma_dp;
  typename Traits::MmadQ mma_dq;
  auto const tensor = [](uint16_t* p, auto layout) {
    return make_tensor(make_smem_ptr(reinterpret_cast<Element*>(p)), layout);
  };
  int const slice = warpgroup * 128;
  auto const group_s = mma_s.get_slice(slice);
  auto const group_dp = mma_dp.get_slice(slice);
  auto const group_dq = mma_dq.get_slice(slice);
  Tensor tSrQ =
      group_s.partition_fragment_A(tensor(storage.query, typename Traits::LayoutQ{}))(_, _, _, 0);
  Tensor tSrK = group_s.partition_fragment_B(tensor(storage.key, typename Traits::LayoutK{}));
  Tensor tdPrdO =
      group_dp.partition_fragment_A(tensor(storage.dout, typename Traits::LayoutdO{}))(_, _, _, 0);
  Tensor tdPrV = group_dp.partition_fragment_B(tensor(storage.value, typename Traits::LayoutV{}));
  Tensor tdQrK = group_dq.partition_fragment_B(tensor(storage.key, typename Traits::LayoutKt{}));
  constexpr Shape<Int<kBlockM>, Int<kBlockN>> kShapeS{};
  Tensor tS = partition_fragment_C(mma_s, kShapeS);
  Tensor tdP = partition_fragment_C(mma_dp, kShapeS);
  Tensor tdQ = partition_fragment_C(mma_dq, Shape<Int<kBlockM>, Int<Traits::kHeadDim>>{});
  Tensor tdQrdS = make_fragment_like<Element>(group_dq.partition_A(make_tensor<Element>(kShapeS)));
  clear(tdQ);

  int const thread = threadIdx.x % 128;
  int const first_row = work.tile.block * kBlockM + warpgroup * 64;
  int const row = first_row + thread / 32 * 16 + thread % 32 / 4;  // the thread's first
  Interval rows[kRowsPerThread];
  float lse[kRowsPerThread];
  float delta[kRowsPerThread];
  using Stats = RowStats<Traits::kRecordRows>;
  // A warpgroup's rows have one record.
  static_assert(Traits::kRecordRows == 64);
  int const record = first_row / Traits::kRecordRows;
  bool const exists = record < params.num_m_blocks;  // the tile may reach beyond the records
  auto const stats = [&](int index, int r) {
    return params
        .row_stats[params.m_block_index(work.tile.batch, work.tile.head, record) * Stats::kSize +
                   index + row % 64 + r * 8];
  };
  bool const careful =
      exists && __float_as_int(
                    params.row_stats[params.m_block_index(work.tile.batch, work.tile.head, record) *
                                         Stats::kSize +
                                     Stats::kCareful]) != 0;
  if (careful) work.blocks.full_end = work.blocks.full_begin;
  float const softmax_scale_log2 = careful ? 1.f : params.softmax_scale_log2;
  CUTLASS_PRAGMA_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    lse[r] = exists ? stats(Stats::kLse, r) : INFINITY;
    if (careful) lse[r] = 0.f;
    delta[r] = exists ? stats(Stats::kDelta, r) : 0.f;
    rows[r] = params.mask.row_interval(work.tile.batch, row + r * 8);
  }
  float const scale = ds_scale<Element>(params, work.tile.batch, work.tile.head / params.group);
  bool const elected = threadIdx.x % 32 == 0;
  auto& keys = storage.key_pipeline;
  auto& values = storage.value_pipeline;
  PipelineState<Traits::kStages> key_state;
  PipelineState<Traits::kStagesV> value_state;

  auto const issue_s = [&] {
    keys.full[key_state.stage].wait(key_state.phase);
    issue_gemm_zero(mma_s, tSrQ, tSrK(_, _, _, key_state.stage), tS);
  };
  auto const issue_dp = [&] {
    values.full[value_state.stage].wait(value_state.phase);
    issue_gemm_zero(mma_dp, tdPrdO, tdPrV(_, _, _, value_state.stage), tdP);
  };
  // dS of a block, whose S and dP are there.
  auto const score_grad = [&](int n_block) {
    warpgroup_fence_operand(tS);
    warpgroup_fence_operand(tdP);
    if (elected) values.empty[value_state.stage].arrive();
    value_state.advance();
    float factor[kRowsPerThread] = {1.f, 1.f};
    bool const is_capped = params.score.cap_scale != 0.f;
    if (is_capped) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(tS); ++i) {
        float const capped = params.score.cap(tS(i));
        tdP(i) = Score::cap_grad(capped) * (tdP(i) * scale - delta[fragment_row(i)]);
        tS(i) = capped;
      }
      factor[0] = factor[1] = 0.f;  // delta and the scale are in already
    }
    float const scale_left = is_capped ? 1.f : scale;
    if (n_block < work.blocks.full_begin || n_block >= work.blocks.full_end) {
      if (careful) {  // every block comes here then, and its exponents are computed here
        float const lse_high[] = {stats(Stats::kLse, 0), stats(Stats::kLse, 1)};
        float const lse_low[] = {stats(Stats::kLseLow, 0), stats(Stats::kLseLow, 1)};
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < size(tS); ++i) {
          int const r = fragment_row(i);
          tS(i) = (tS(i) * params.softmax_scale_log2 - lse_high[r]) - lse_low[r];
        }
      }
      mask_scores(tS, rows, n_block * kBlockN + threadIdx.x % 4 * 2);
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tS); ++i) {
      int const r = fragment_row(i);
      tS(i) =
          exp2f(tS(i) * softmax_scale_log2 - lse[r]) * (tdP(i) * scale_left - factor[r] * delta[r]);
    }
    copy(packed<Element>(tS), recast<uint32_t>(tdQrdS));
  };

  if (work.blocks.begin < work.blocks.end) {
    storage.query_full.wait(0);
    storage.dout_full.wait(0);
    issue_s();
    issue_dp();
    warpgroup_wait<0>();
    for (int n_block = work.blocks.end - 1; n_block > work.blocks.begin; --n_block) {
      score_grad(n_block);
      issue_gemm(mma_dq, tdQrdS, tdQrK(_, _, _, key_state.stage), tdQ);
      int const last_stage = key_state.stage;
      key_state.advance();
      issue_s();
      warpgroup_wait<1>();
      warpgroup_fence_operand(tdQ);
      if (elected) keys.empty[last_stage].arrive();
      issue_dp();
      warpgroup_wait<0>();
    }
    score_grad(work.blocks.begin);
    issue_gemm(mma_dq, tdQrdS, tdQrK(_, _, _, key_state.stage), tdQ);
    warpgroup_wait<0>();
    warpgroup_fence_operand(tdQ);
  }

  mark_broken_rows(params, work.tile.batch, work.tile.head, row, tdQ);
  if (params.accumulates_dq || !params.finishes_dq) {
    int64_t const head = int64_t{work.tile.batch} * params.num_heads_q + work.tile.head;
    int64_t const index = head * params.dq_order.num_blocks + work.tile.block;
    float4* const sum =
        accum_of_thread(params.dq_accum + index * Traits::kSizeQ + warpgroup * Traits::kSizeQ / 2);
    if (params.accumulates_dq) add_accum(sum, tdQ);
    if (!params.finishes_dq) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(tdQ); i += 4) {
        sum[i / 4 * 128] = float4{tdQ(i), tdQ(i + 1), tdQ(i + 2), tdQ(i + 3)};
      }
      return;
    }
  }
  // dQ is staged in Q's memory, whose rows are read only by the warpgroup that now writes them.
  BarrierId const barrier = barrier_id(NamedBarrier::kGradOfWarpgroup0, warpgroup);
  cutlass::arch::NamedBarrier::sync(128, barrier);
  scale_grad(tdQ, params.softmax_scale / scale);
  store_grad<Element, kBlockM, Traits::kHeadDim>(
      tdQ, params.dquery, storage.query,
      GradRows{{work.tile.block * kBlockM, work.tile.head, work.tile.batch},
               params.mask.seqlen_q,
               warpgroup * 64},
      barrier);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    dq_kernel(__grid_constant__ Params const params) {
  extern __shared__ char memory[];
  auto& storage = *reinterpret_cast<typename Traits::SharedStorage*>(memory);
  int const warp = cutlass::canonical_warp_idx_sync();
  WorkTile work{};
  work.tile = params.dq_order(blockIdx.x);
  work.blocks = query_block<Traits>(params, work.tile).hull.blocks(Traits::kBlockN);
  // The soft cap is applied where the mask is: every block takes that way.
  if (params.score.cap_scale != 0.f) work.blocks.full_end = work.blocks.full_begin;
  if (warp == 0 && elect_one_sync()) {
    constexpr int kConsumerWarps = Traits::kConsumerThreads / 32;
    storage.query_full.init(1);
    storage.dout_full.init(1);
    storage.staged.init(1);
    storage.key_pipeline.init(kConsumerWarps);
    storage.value_pipeline.init(kConsumerWarps);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (warp == 0) load_dq<Traits>(params, storage, work);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    consume_dq<Traits>(params, storage, work, warp / 4 - 1);
    tma_store_wait<0>();
  }
}

}  // namespace jax_fa3::bwd
