// The consumers of wide heads, where dK and dV of 64 keys fill two warpgroups: one computes S, P
// and dV, hands P over through shared memory, and the other computes dP, dS and dK.
#pragma once

#include "bwd/partial.h"
#include "bwd/range.h"
#include "bwd/scores.h"
#include "bwd/traits.h"
#include "common/gemm.h"

namespace jax_fa3::bwd {

// Where a thread leaves P, 16 bits an element, for the same thread of the other warpgroup: all
// threads' first 16 bytes, then all threads' next. It takes every 128th vector from here on.
template <class Traits>
CUTLASS_DEVICE uint4* handover(typename Traits::SharedStorage& storage, int buffer) {
  return reinterpret_cast<uint4*>(storage.exchange + buffer * Traits::kSizedS) + threadIdx.x % 128;
}

template <class Traits>
CUTLASS_DEVICE void consume_value(Params const& params, typename Traits::SharedStorage& storage,
                                  KeyTile const& tile) {
  using Element = typename Traits::Element;
  constexpr int kBlockM = Traits::kBlockM;
  constexpr int kBlockN = Traits::kBlockN;
  typename Traits::template MmaScores<Traits::kHeadDim> mma_s;
  typename Traits::template MmaGrad<Traits::kHeadDimV> mma_dv;
  Tensor tSrK = operand_a(mma_s, 0, storage.key, typename Traits::LayoutK{})(_, _, _, 0);
  Tensor tSrQ = operand_b(mma_s, 0, storage.query, typename Traits::LayoutQ{});
  Tensor tdVrdO = operand_b(mma_dv, 0, storage.dout, typename Traits::LayoutdOt{});
  constexpr Shape<Int<kBlockN>, Int<kBlockM>> kShapeS{};
  Tensor tS = partition_fragment_C(mma_s, kShapeS);
  Tensor tdV = partition_fragment_C(mma_dv, Shape<Int<kBlockN>, Int<Traits::kHeadDimV>>{});
  Tensor tdVrP =
      make_fragment_like<Element>(mma_dv.get_slice(0).partition_A(make_tensor<Element>(kShapeS)));
  Tensor p_for_dv = recast<uint32_t>(tdVrP);

  int const key = tile.n_block * kBlockN + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  bool const elected = threadIdx.x % 32 == 0;
  auto& queries = storage.query_pipeline;
  auto& douts = storage.dout_pipeline;
  PipelineState<Traits::kStages> state;
  auto const issue_s = [&] { issue_gemm_zero(mma_s, tSrK, tSrQ(_, _, _, state.stage), tS); };
  auto const issue_dv = [&](int stage) { issue_gemm(mma_dv, tdVrP, tdVrdO(_, _, _, stage), tdV); };
  auto const records_of_step = [&] {
    return RowRecords<kBlockM>{storage.stats + state.stage * RowStats<kBlockM>::kSize,
                               storage.intervals + state.stage * kBlockM, key};
  };
  Step step;
  auto const read_step = [&] {
    queries.full[state.stage].wait(state.phase);
    step = storage.steps[state.stage];
    step.masked |= records_of_step().careful();
  };
  // S^T to P^T. The other warpgroup gets what it is to multiply dP - delta by: P, and with a soft
  // cap its derivative times P.
  auto const make_p = [&](Step const& step) {
    warpgroup_fence_operand(tS);
    auto const records = records_of_step();
    auto p_for_ds = make_tensor<uint32_t>(Int<decltype(size(p_for_dv))::value>{});
    if (params.score.cap_scale != 0.f) {
      params.score.cap_all(tS);
      Tensor factor = make_fragment_like(tS);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(tS); ++i) factor(i) = Score::cap_grad(tS(i));
      probabilities<true>(params, records, tS);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(tS); ++i) factor(i) *= tS(i);
      copy(packed<Element>(factor), p_for_ds);
    } else {
      if (step.masked) {
        probabilities<true>(params, records, tS);
      } else {
        probabilities<false>(params, records, tS);
      }
      copy(packed<Element>(tS), p_for_ds);
    }
    if (elected) queries.empty[state.stage].arrive();
    named_sync(NamedBarrier::kProbabilitiesEmpty, state.stage, 256);
    uint4* const out = handover<Traits>(storage, state.stage);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(p_for_ds); i += 4) {
      out[i / 4 * 128] = uint4{p_for_ds(i), p_for_ds(i + 1), p_for_ds(i + 2), p_for_ds(i + 3)};
    }
    named_arrive(NamedBarrier::kProbabilitiesFull, state.stage, 256);
  };

  GradRows const rows = rows_of_keys<Traits>(params, tile);
  bool ends;
  bool first = true;
  do {  // the steps of one sum in the accumulators
    clear(tdV);
    read_step();
    ends = true;
    if (step.m_block >= 0) {
      storage.key_full.wait(0);
      issue_s();
      warpgroup_wait<0>();
      make_p(step);
      copy(packed<Element>(tS), p_for_dv);
      while (!step.last) {
        int const last_stage = state.stage;
        uint32_t const last_phase = state.phase;
        // dV before S: so dO of this step is released, and that of the step after next loaded,
        // early.
        douts.full[last_stage].wait(last_phase);
        issue_dv(last_stage);
        state.advance();
        read_step();
        issue_s();
        warpgroup_wait<1>();
        warpgroup_fence_operand(tdV);
        if (elected) douts.empty[last_stage].arrive();
        warpgroup_wait<0>();
        make_p(step);
        copy(packed<Element>(tS), p_for_dv);
      }
      douts.full[state.stage].wait(state.phase);
      issue_dv(state.stage);
      warpgroup_wait<0>();
      warpgroup_fence_operand(tdV);
      if (elected) douts.empty[state.stage].arrive();
      state.advance();
      ends = step.ends;
    }
    if (params.dkv_partial == nullptr) break;
    accumulate_partial(tdV, dkv_partial(params, tile.split, true), rows, params.head_dim_v, first);
    first = false;
  } while (!ends);
  if (params.dkv_partial != nullptr) return;
  if (params.dkv_fp32) return store_grad_fp32(tdV, params.dvalue_rows, rows, params.head_dim_v);
  // dV is staged in V's memory, which the other warpgroup has read when it has computed its last
  // dP.
  named_arrive(NamedBarrier::kKeyMemoryFree, 0, 256);
  named_sync(NamedBarrier::kValueMemoryFree, 0, 256);
  store_grad<Element, kBlockN, Traits::kHeadDimV>(tdV, params.dvalue, storage.value, rows,
                                                  barrier_id(NamedBarrier::kGradOfWarpgroup0));
}

template <class Traits>
CUTLASS_DEVICE void consume_key(Params const& params, typename Traits::SharedStorage& storage,
                                KeyTile const& tile) {
  using Element = typename Traits::Element;
  constexpr int kBlockM = Traits::kBlockM;
  constexpr int kBlockN = Traits::kBlockN;
  typename Traits::template MmaScores<Traits::kHeadDimV> mma_dp;
  typename Traits::template MmaGrad<Traits::kHeadDim> mma_dk;
  Tensor tdPrV = operand_a(mma_dp, 0, storage.value, typename Traits::LayoutV{})(_, _, _, 0);
  Tensor tdPrdO = operand_b(mma_dp, 0, storage.dout, typename Traits::LayoutdO{});
  Tensor tdKrQ = operand_b(mma_dk, 0, storage.query, typename Traits::LayoutQt{});
  constexpr Shape<Int<kBlockN>, Int<kBlockM>> kShapeS{};
  Tensor tdP = partition_fragment_C(mma_dp, kShapeS);
  Tensor tdK = partition_fragment_C(mma_dk, Shape<Int<kBlockN>, Int<Traits::kHeadDim>>{});
  Tensor tdKrdS =
      make_fragment_like<Element>(mma_dk.get_slice(0).partition_A(make_tensor<Element>(kShapeS)));
  Tensor packed_ds = recast<uint32_t>(tdKrdS);
  float const scale = ds_scale<Element>(params, tile.batch, tile.head_k);

  bool const elected = threadIdx.x % 32 == 0;
  auto& queries = storage.query_pipeline;
  auto& douts = storage.dout_pipeline;
  PipelineState<Traits::kStages> state;
  auto const issue_dp = [&] { issue_gemm_zero(mma_dp, tdPrV, tdPrdO(_, _, _, state.stage), tdP); };
  auto const issue_dk = [&](int stage) { issue_gemm(mma_dk, tdKrdS, tdKrQ(_, _, _, stage), tdK); };
  auto const take_p = [&](auto& p) {
    named_sync(NamedBarrier::kProbabilitiesFull, state.stage, 256);
    uint4 const* const in = handover<Traits>(storage, state.stage);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(p); i += 8) {
      uint4 const vector = in[i / 8 * 128];
      uint32_t const pairs[] = {vector.x, vector.y, vector.z, vector.w};
      CUTLASS_PRAGMA_UNROLL
      for (int e = 0; e < 8; ++e) p(i + e) = unpack<Element>(pairs[e / 2], e % 2);
    }
    named_arrive(NamedBarrier::kProbabilitiesEmpty, state.stage, 256);
  };
  auto const make_ds = [&] {
    warpgroup_fence_operand(tdP);
    if (elected) douts.empty[state.stage].arrive();
    Tensor p = make_fragment_like(tdP);
    take_p(p);
    RowRecords<kBlockM> const records{storage.stats + state.stage * RowStats<kBlockM>::kSize,
                                      nullptr, 0};
    score_grads(records, scale, p, tdP);
  };

  named_arrive(NamedBarrier::kProbabilitiesEmpty, 0, 256);
  named_arrive(NamedBarrier::kProbabilitiesEmpty, 1, 256);
  GradRows const rows = rows_of_keys<Traits>(params, tile);
  bool ends;
  bool first = true;
  do {  // the steps of one sum in the accumulators
    clear(tdK);
    queries.full[state.stage].wait(state.phase);
    Step step = storage.steps[state.stage];
    ends = true;
    if (step.m_block >= 0) {
      storage.value_full.wait(0);
      douts.full[state.stage].wait(state.phase);
      issue_dp();
      warpgroup_wait<0>();
      make_ds();
      copy(packed<Element>(tdP), packed_ds);
      while (!step.last) {
        int const last_stage = state.stage;
        issue_dk(last_stage);
        state.advance();
        queries.full[state.stage].wait(state.phase);
        step = storage.steps[state.stage];
        douts.full[state.stage].wait(state.phase);
        issue_dp();
        warpgroup_wait<1>();
        warpgroup_fence_operand(tdK);
        if (elected) queries.empty[last_stage].arrive();
        warpgroup_wait<0>();
        make_ds();
        copy(packed<Element>(tdP), packed_ds);
      }
      issue_dk(state.stage);
      warpgroup_wait<0>();
      warpgroup_fence_operand(tdK);
      if (elected) queries.empty[state.stage].arrive();
      state.advance();
      scale_grad(tdK, params.softmax_scale / scale);
      ends = step.ends;
    }
    if (params.dkv_partial == nullptr) break;
    accumulate_partial(tdK, dkv_partial(params, tile.split, false), rows, params.head_dim, first);
    first = false;
  } while (!ends);
  if (params.dkv_partial != nullptr) return;
  if (params.dkv_fp32) return store_grad_fp32(tdK, params.dkey_rows, rows, params.head_dim);
  named_arrive(NamedBarrier::kValueMemoryFree, 0, 256);
  named_sync(NamedBarrier::kKeyMemoryFree, 0, 256);
  store_grad<Element, kBlockN, Traits::kHeadDim>(tdK, params.dkey, storage.key, rows,
                                                 barrier_id(NamedBarrier::kGradOfWarpgroup1));
}

}  // namespace jax_fa3::bwd
