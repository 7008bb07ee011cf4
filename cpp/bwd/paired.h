// The consumers of head dims 129 to 192: a pair of warpgroups on 96 keys. One computes S, P and dV,
// the other dP, dS and dK, and of dQ each half of the columns.
//
// dK and dV of 96 keys fill the registers of both, transposed: their rows are head dims, for 96 is
// no multiple of 64. P and dS are their B operands, in shared memory, where the other warpgroup
// finds P, too. So S and dP are each computed by one warpgroup, which reads their operands once.
#pragma once

#include "bwd/lost_bits.h"
#include "bwd/mma.h"
#include "bwd/paired_store.h"
#include "common/softmax.h"

namespace jax_fa3::bwd {

// What preprocess wrote about the thread's two query rows of a step.
template <class Traits>
struct TwoRows {
  using Stats = RowStats<Traits::kBlockM>;
  float const* stats;
  int2 const* intervals;
  int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;

  CUTLASS_DEVICE TwoRows(typename Traits::SharedStorage const& storage, int stage)
      : stats(storage.stats + stage * Stats::kSize),
        intervals(storage.intervals + stage * Traits::kBlockM) {}
  CUTLASS_DEVICE float at(int offset, int r) const { return stats[offset + row + r * 8]; }
  CUTLASS_DEVICE Interval interval(int r) const {
    int2 const interval = intervals[row + r * 8];
    return {interval.x, interval.y};
  }
  CUTLASS_DEVICE bool careful() const { return __float_as_int(stats[Stats::kCareful]) != 0; }
};

// P from scores, in place; `key`: of the thread's first column. With kCareful it is masked, and
// exact however large the scores are.
template <bool kCareful, class Rows, class Scores>
CUTLASS_DEVICE void probabilities_of_rows(Params const& params, Rows const& of_rows, int key,
                                          Scores& scores) {
  using Stats = typename Rows::Stats;
  float const lse[] = {of_rows.at(Stats::kLse, 0), of_rows.at(Stats::kLse, 1)};
  if constexpr (kCareful) {
    float const low[] = {of_rows.at(Stats::kLseLow, 0), of_rows.at(Stats::kLseLow, 1)};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(scores); ++i) {
      int const r = fragment_row(i);
      scores(i) = (scores(i) * params.softmax_scale_log2 - lse[r]) - low[r];
    }
    Interval const rows[] = {of_rows.interval(0), of_rows.interval(1)};
    mask_scores(scores, rows, key);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(scores); ++i) scores(i) = exp2f(scores(i));
  } else {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(scores); ++i) {
      scores(i) = exp2f(scores(i) * params.softmax_scale_log2 - lse[fragment_row(i)]);
    }
  }
}

// P or dS of a thread, to shared memory, for wgmma.
template <class Traits, class Packed>
CUTLASS_DEVICE void stage_scores(uint16_t* smem, Packed const& packed) {
  stage_packed<Traits::kBlockM, Traits::kBlockN, slab(Traits::kBlockN)>(
      packed, smem, threadIdx.x % 128 / 32 * 16);
  cutlass::arch::fence_view_async_shared();
}
// Where a thread leaves what P lost, for the same thread of the other warpgroup: every 128th vector
// from here on.
template <class Traits>
CUTLASS_DEVICE uint4* lost_of_thread(typename Traits::SharedStorage& storage) {
  return reinterpret_cast<uint4*>(storage.weights_lost) + threadIdx.x % 128;
}

CUTLASS_DEVICE void sync_warpgroup(int warpgroup) {
  named_sync(NamedBarrier::kGradOfWarpgroup0, warpgroup, 128);
}

// A warpgroup's half of the columns of dQ = dS K.
template <class Traits, class dQuery>
CUTLASS_DEVICE void issue_half_dq(typename Traits::SharedStorage& storage, int warpgroup,
                                  dQuery& tdQ) {
  typename Traits::MmadQ const mma;
  Tensor tdQrdS = operand_a(mma, warpgroup, storage.score_grads, typename Traits::LayoutScores{});
  Tensor tdQrK = operand_b(mma, warpgroup, storage.key, typename Traits::LayoutKt{});
  issue_gemm_zero(mma, tdQrdS(_, _, _, 0), tdQrK(_, _, _, 0), tdQ);
}
template <class Traits>
CUTLASS_DEVICE auto half_dq() {
  return partition_fragment_C(typename Traits::MmadQ{},
                              Shape<Int<Traits::kBlockM>, Int<Traits::kHeadDim>>{});
}

// The one step of a tile that no row sees: it has no operands.
template <class Traits>
CUTLASS_DEVICE void pass_step(typename Traits::SharedStorage& storage,
                              PipelineState<Traits::kStages>& state) {
  if (threadIdx.x % 32 == 0) {
    storage.query_pipeline.empty[state.stage].arrive();
    storage.dout_pipeline.empty[dout_state<Traits>(state).stage].arrive();
  }
  state.advance();
}

template <class Traits>
CUTLASS_DEVICE void consume_value_of_pair(Params const& params,
                                          typename Traits::SharedStorage& storage,
                                          KeyTile const& tile, uint32_t& key_phase,
                                          PipelineState<Traits::kStages>& state) {
  using Element = typename Traits::Element;
  constexpr int kBlockN = Traits::kBlockN;
  typename Traits::template MmaScores<Traits::kHeadDim> mma_s;
  typename Traits::MmaGrad mma_dv;
  Tensor tSrQ = operand_a(mma_s, 0, storage.query, typename Traits::LayoutQ{});
  Tensor tSrK = operand_b(mma_s, 0, storage.key, typename Traits::LayoutK{})(_, _, _, 0);
  Tensor tdVrdO = operand_a(mma_dv, 0, storage.dout, typename Traits::LayoutdOt{});
  Tensor tdVrP =
      operand_b(mma_dv, 0, storage.weights, typename Traits::LayoutScoresT{})(_, _, _, 0);
  Tensor tS = partition_fragment_C(mma_s, Shape<Int<Traits::kBlockM>, Int<kBlockN>>{});
  Tensor tdV = partition_fragment_C(mma_dv, Shape<Int<Traits::kHeadDimV>, Int<kBlockN>>{});
  Tensor tdQ = half_dq<Traits>();

  int const key = tile.n_block * kBlockN + static_cast<int>(threadIdx.x % 4) * 2;
  bool const elected = threadIdx.x % 32 == 0;
  auto& queries = storage.query_pipeline;
  auto& douts = storage.dout_pipeline;
  Step step;
  auto const read_step = [&] {
    queries.full[state.stage].wait(state.phase);
    step = storage.steps[state.stage];
    step.masked |= TwoRows<Traits>(storage, state.stage).careful();
  };
  auto const issue_s = [&] { issue_gemm_zero(mma_s, tSrQ(_, _, _, state.stage), tSrK, tS); };
  auto const issue_dv = [&] {
    auto const place = dout_state<Traits>(state);
    douts.full[place.stage].wait(place.phase);
    issue_gemm(mma_dv, tdVrdO(_, _, _, place.stage), tdVrP, tdV);
  };
  auto const release_dout = [&](int stage) {
    warpgroup_fence_operand(tdV);
    if (elected) douts.empty[stage].arrive();
  };
  // P. With a soft cap dS takes P times its derivative.
  auto derivative = make_tensor<uint32_t>(Int<decltype(size(tS))::value / 2>{});
  auto const make_p = [&] {
    warpgroup_fence_operand(tS);
    TwoRows<Traits> const of_rows(storage, state.stage);
    if (params.score.cap_scale != 0.f) {
      params.score.cap_all(tS);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(tS); i += 2) {
        derivative(i / 2) = pack<Element>(Score::cap_grad(tS(i)), Score::cap_grad(tS(i + 1)));
      }
      probabilities_of_rows<true>(params, of_rows, key, tS);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(tS); i += 2) {
        derivative(i / 2) = pack<Element>(unpack<Element>(derivative(i / 2), 0) * tS(i),
                                          unpack<Element>(derivative(i / 2), 1) * tS(i + 1));
      }
    } else if (step.masked) {
      probabilities_of_rows<true>(params, of_rows, key, tS);
    } else {
      probabilities_of_rows<false>(params, of_rows, key, tS);
    }
    if (elected) queries.empty[state.stage].arrive();
  };
  // P to shared memory, for the other warpgroup and for dV.
  auto const share_p = [&] {
    named_sync(NamedBarrier::kProbabilitiesTaken, 0, 256);
    uint4* const lost = lost_of_thread<Traits>(storage);
    if (params.score.cap_scale != 0.f) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(tS); i += 16) lost[i / 16 * 128] = uint4{0, 0, 0, 0};
      stage_scores<Traits>(storage.weights, derivative);
      named_arrive(NamedBarrier::kProbabilitiesShared, 0, 256);
      named_sync(NamedBarrier::kDerivativeTaken, 0, 256);
      stage_scores<Traits>(storage.weights, packed<Element>(tS));
    } else {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(tS); i += 16) {
        lost[i / 16 * 128] = uint4{lost_bits<Element>(tS, i), lost_bits<Element>(tS, i + 4),
                                   lost_bits<Element>(tS, i + 8), lost_bits<Element>(tS, i + 12)};
      }
      stage_scores<Traits>(storage.weights, packed<Element>(tS));
      named_arrive(NamedBarrier::kProbabilitiesShared, 0, 256);
    }
    sync_warpgroup(0);
  };
  auto const make_dq = [&] {
    named_sync(NamedBarrier::kScoreGradsShared, 0, 256);
    issue_half_dq<Traits>(storage, 0, tdQ);
  };
  auto const take_dq = [&] {
    warpgroup_fence_operand(tdQ);
    named_arrive(NamedBarrier::kScoreGradsTaken, 0, 256);
  };
  auto const give_dq = [&](int stage) { hand_over_dq<Traits>(storage, 0, stage, tdQ); };

  sum_and_store<Traits, true>(params, storage, tile, tdV, [&]() __attribute__((always_inline)) {
    read_step();
    if (step.m_block < 0) {
      pass_step<Traits>(storage, state);
      return true;
    }
    storage.key_full.wait(key_phase);
    issue_s();
    warpgroup_wait<0>();
    make_p();
    share_p();
    if constexpr (!Traits::kEarlyS) issue_dv();
    while (!step.last) {
      int const last_stage = state.stage;
      int const last_dout = dout_state<Traits>(state).stage;
      if constexpr (Traits::kEarlyS) {
        // While the other warpgroup computes dS the tensor cores have dV and the next S.
        issue_dv();
        state.advance();
        read_step();
        issue_s();
        make_dq();
        warpgroup_wait<1>();
        release_dout(last_dout);
        make_p();
        warpgroup_wait<0>();
        take_dq();
        share_p();
      } else {
        // dQ of the step before, when S has left the registers. Meanwhile the other warpgroup
        // computes this step's dS.
        state.advance();
        read_step();
        issue_s();
        warpgroup_wait<1>();
        release_dout(last_dout);
        warpgroup_wait<0>();
        make_p();
        share_p();
        make_dq();
        issue_dv();
        warpgroup_wait<1>();
        take_dq();
      }
      give_dq(last_stage);
    }
    if constexpr (Traits::kEarlyS) issue_dv();
    make_dq();
    warpgroup_wait<0>();
    release_dout(dout_state<Traits>(state).stage);
    take_dq();
    give_dq(state.stage);
    state.advance();
    if (step.ends) key_phase ^= 1;
    return step.ends;
  });
}

template <class Traits>
CUTLASS_DEVICE void consume_key_of_pair(Params const& params,
                                        typename Traits::SharedStorage& storage,
                                        KeyTile const& tile, uint32_t& key_phase,
                                        PipelineState<Traits::kStages>& state) {
  using Element = typename Traits::Element;
  constexpr int kBlockN = Traits::kBlockN;
  typename Traits::template MmaScores<Traits::kHeadDimV> mma_dp;
  typename Traits::MmaGrad mma_dk;
  Tensor tdPrdO = operand_a(mma_dp, 0, storage.dout, typename Traits::LayoutdO{});
  Tensor tdPrV = operand_b(mma_dp, 0, storage.value, typename Traits::LayoutV{})(_, _, _, 0);
  Tensor tdKrQ = operand_a(mma_dk, 0, storage.query, typename Traits::LayoutQt{});
  Tensor tdKrdS =
      operand_b(mma_dk, 0, storage.score_grads, typename Traits::LayoutScoresT{})(_, _, _, 0);
  Tensor tdP = partition_fragment_C(mma_dp, Shape<Int<Traits::kBlockM>, Int<kBlockN>>{});
  Tensor tdK = partition_fragment_C(mma_dk, Shape<Int<Traits::kHeadDim>, Int<kBlockN>>{});
  Tensor tdQ = half_dq<Traits>();
  auto packed_ds = make_tensor<uint32_t>(Int<decltype(size(tdP))::value / 2>{});
  float const scale = ds_scale<Element>(params, tile.batch, tile.head_k);

  bool const elected = threadIdx.x % 32 == 0;
  Step step;
  auto const read_step = [&] {
    storage.query_pipeline.full[state.stage].wait(state.phase);
    step = storage.steps[state.stage];
  };
  auto const issue_dp = [&] {
    auto const place = dout_state<Traits>(state);
    storage.dout_pipeline.full[place.stage].wait(place.phase);
    issue_gemm_zero(mma_dp, tdPrdO(_, _, _, place.stage), tdPrV, tdP);
  };
  auto const issue_dk = [&](int stage) { issue_gemm(mma_dk, tdKrQ(_, _, _, stage), tdKrdS, tdK); };
  // dS, once P is there, or with a soft cap P times its derivative.
  auto const make_ds = [&] {
    TwoRows<Traits> const of_rows(storage, state.stage);
    using Stats = typename TwoRows<Traits>::Stats;
    float const delta[] = {of_rows.at(Stats::kDelta, 0), of_rows.at(Stats::kDelta, 1)};
    warpgroup_wait<0>();
    warpgroup_fence_operand(tdP);
    if (elected) storage.dout_pipeline.empty[dout_state<Traits>(state).stage].arrive();
    named_sync(NamedBarrier::kProbabilitiesShared, 0, 256);
    uint4 const* const lost_of_all = lost_of_thread<Traits>(storage);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tdP); i += 16) {
      auto weights = make_tensor<uint32_t>(_8{});
      load_packed<Traits::kBlockM, 32, slab(kBlockN)>(weights, storage.weights,
                                                      threadIdx.x % 128 / 32 * 16, i * 2);
      uint4 const vector = lost_of_all[i / 16 * 128];
      uint32_t const lost[] = {vector.x, vector.y, vector.z, vector.w};
      auto const ds = [&](int e) {
        float const p = with_lost_bits<Element>(weights(e / 2), e % 2, lost[e / 4], e % 4);
        return p * (tdP(i + e) * scale - delta[fragment_row(e)]);
      };
      CUTLASS_PRAGMA_UNROLL
      for (int e = 0; e < 16; e += 2) packed_ds((i + e) / 2) = pack<Element>(ds(e), ds(e + 1));
    }
    named_arrive(NamedBarrier::kProbabilitiesTaken, 0, 256);
    if (params.score.cap_scale != 0.f) named_arrive(NamedBarrier::kDerivativeTaken, 0, 256);
  };
  auto const make_grads = [&] {
    named_sync(NamedBarrier::kScoreGradsTaken, 0, 256);
    stage_scores<Traits>(storage.score_grads, packed_ds);
    named_arrive(NamedBarrier::kScoreGradsShared, 0, 256);
    sync_warpgroup(1);
    issue_half_dq<Traits>(storage, 1, tdQ);
    issue_dk(state.stage);
    warpgroup_wait<1>();
    hand_over_dq<Traits>(storage, 1, state.stage, tdQ);
  };
  auto const release_query = [&](int stage) {
    warpgroup_fence_operand(tdK);
    if (elected) storage.query_pipeline.empty[stage].arrive();
  };

  sum_and_store<Traits, false>(params, storage, tile, tdK, [&]() __attribute__((always_inline)) {
    read_step();
    if (step.m_block < 0) {
      pass_step<Traits>(storage, state);
      return true;
    }
    storage.value_full.wait(key_phase);
    storage.key_full.wait(key_phase);
    issue_dp();
    make_ds();
    while (!step.last) {
      int const last_stage = state.stage;
      make_grads();
      state.advance();
      read_step();
      issue_dp();
      warpgroup_wait<1>();
      release_query(last_stage);
      make_ds();
    }
    make_grads();
    warpgroup_wait<0>();
    release_query(state.stage);
    state.advance();
    scale_grad(tdK, params.softmax_scale / scale);
    if (step.ends) key_phase ^= 1;
    return step.ends;
  });
}

// The tiles that the loading warp announces; kOfValue: by the warpgroup that computes dV.
template <class Traits, bool kOfValue>
CUTLASS_DEVICE void consume_tiles(Params const& params, typename Traits::SharedStorage& storage) {
  PipelineState<Traits::kStages> state;
  uint32_t key_phase = 0;
  // What the other warpgroup is to write there for the first time.
  named_arrive(kOfValue ? NamedBarrier::kScoreGradsTaken : NamedBarrier::kProbabilitiesTaken, 0,
               256);
  for (;;) {
    storage.query_pipeline.full[state.stage].wait(state.phase);
    KeyTile const tile = storage.tiles[state.stage];
    if (tile.n_block < 0) return;
    if constexpr (kOfValue) {
      consume_value_of_pair<Traits>(params, storage, tile, key_phase, state);
    } else {
      consume_key_of_pair<Traits>(params, storage, tile, key_phase, state);
    }
  }
}

}  // namespace jax_fa3::bwd
