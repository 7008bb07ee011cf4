// The fused mainloop of a consumer warpgroup: dK and dV of its 64 keys, and its part of every dQ.
//
// Everything is transposed (keys are the rows of S^T), so that P^T and dS^T are A operands of dV
// and dK where they stand, in registers; only dS goes through shared memory, for dQ, which sums
// over the keys of both warpgroups. The exponentials of a step run beside dQ of the last or
// beside dP, by the registers that there are.
#pragma once

#include "bwd/scores.h"
#include "bwd/traits.h"
#include "common/gemm.h"

namespace jax_fa3::bwd {

// The steps of one part. Returns whether they are the CTA's last.
template <class Traits, class State, class dKey, class dValue>
CUTLASS_DEVICE bool mma(Params const& params, typename Traits::SharedStorage& storage,
                        TileCoord tile, int warpgroup, State& state, float scale, dKey& tdK,
                        dValue& tdV) {
  using Element = typename Traits::Element;
  constexpr int kBlockM = Traits::kBlockM;
  constexpr int kBlockN = Traits::kBlockN;
  typename Traits::template MmaScores<Traits::kHeadDim> mma_s;
  typename Traits::template MmaScores<Traits::kHeadDimV> mma_dp;
  typename Traits::template MmaGrad<Traits::kHeadDim> mma_dk;
  typename Traits::template MmaGrad<Traits::kHeadDimV> mma_dv;
  typename Traits::MmadQ mma_dq;

  auto const memory = [](uint16_t* p) { return make_smem_ptr(reinterpret_cast<Element*>(p)); };
  auto const tensor = [&](uint16_t* p, auto layout) { return make_tensor(memory(p), layout); };
  // The warpgroup's first thread stands for all: descriptors are the same across a warpgroup.
  int const thread = warpgroup * 128;
  auto const a = [&](auto& mma, auto const& s) {
    return mma.get_slice(thread).partition_fragment_A(s);
  };
  auto const b = [&](auto& mma, auto const& s) {
    return mma.get_slice(thread).partition_fragment_B(s);
  };
  Tensor tSrK = a(mma_s, tensor(storage.key, typename Traits::LayoutK{}))(_, _, _, 0);
  Tensor tSrQ = b(mma_s, tensor(storage.query, typename Traits::LayoutQ{}));
  Tensor tdPrV = a(mma_dp, tensor(storage.value, typename Traits::LayoutV{}))(_, _, _, 0);
  Tensor tdPrdO = b(mma_dp, tensor(storage.dout, typename Traits::LayoutdO{}));
  Tensor tdVrdO = b(mma_dv, tensor(storage.dout, typename Traits::LayoutdOt{}));
  Tensor tdKrQ = b(mma_dk, tensor(storage.query, typename Traits::LayoutQt{}));
  Tensor tdQrdS = a(mma_dq, tensor(storage.exchange, typename Traits::LayoutdS{}));
  Tensor tdQrK = b(mma_dq, tensor(storage.key, typename Traits::LayoutKt{}))(_, _, _, 0);

  constexpr Shape<Int<kBlockN>, Int<kBlockM>> kShapeS{};
  Tensor tS = partition_fragment_C(mma_s, kShapeS);
  Tensor tdP = partition_fragment_C(mma_dp, kShapeS);
  Tensor tdQ = partition_fragment_C(mma_dq, Shape<Int<kBlockM>, Int<Traits::kHeadDim>>{});
  Tensor tdVrP = make_fragment_like<Element>(
      mma_dv.get_slice(thread).partition_A(make_tensor<Element>(kShapeS)));
  Tensor tdKrdS = make_fragment_like<Element>(tdVrP);
  static_assert(size(tdVrP) == size(tS));
  Tensor packed_p = recast<uint32_t>(tdVrP);
  Tensor packed_ds = recast<uint32_t>(tdKrdS);

  int const lane_warp = threadIdx.x % 128 / 32;
  int const key = tile.m_block * kBlockN + warpgroup * 64 + lane_warp * 16 + threadIdx.x % 32 / 4;
  bool const elected = threadIdx.x % 32 == 0;
  auto const sync = [](NamedBarrier barrier, int offset, int threads) {
    cutlass::arch::NamedBarrier::sync(threads, barrier_id(barrier, offset));
  };
  auto const arrive = [](NamedBarrier barrier, int offset, int threads) {
    cutlass::arch::NamedBarrier::arrive(threads, barrier_id(barrier, offset));
  };

  auto& queries = storage.query_pipeline;
  auto& douts = storage.dout_pipeline;

  auto const issue_s = [&] { issue_gemm_zero(mma_s, tSrK, tSrQ(_, _, _, state.stage), tS); };
  auto const issue_dp = [&] {
    douts.full[state.stage].wait(state.phase);
    issue_gemm_zero(mma_dp, tdPrV, tdPrdO(_, _, _, state.stage), tdP);
  };
  auto const issue_dv = [&](int stage) { issue_gemm(mma_dv, tdVrP, tdVrdO(_, _, _, stage), tdV); };
  auto const issue_dk = [&](int stage) { issue_gemm(mma_dk, tdKrdS, tdKrQ(_, _, _, stage), tdK); };
  auto const records = [&] {
    return RowRecords<kBlockM>{storage.stats + state.stage * RowStats<kBlockM>::kSize,
                               storage.intervals + state.stage * kBlockM, key};
  };
  // S^T to P^T, once S^T is there. With a soft cap just to tanh, for both are needed later.
  auto const make_p = [&](Step const& step) {
    warpgroup_fence_operand(tS);
    if (params.score.cap_scale != 0.f) {
      params.score.cap_all(tS);
    } else if (step.masked) {
      probabilities<true>(params, records(), tS);
    } else {
      probabilities<false>(params, records(), tS);
    }
  };
  // dS^T, once dP^T is there, and both packed.
  auto const make_ds = [&] {
    warpgroup_fence_operand(tdP);
    if (params.score.cap_scale != 0.f) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(tS); ++i) tdP(i) *= scale * Score::cap_grad(tS(i));
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(tS); i += 4) {
        float2 const delta = records().delta_of(i);
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < 4; ++e) {
          tdP(i + e) -= RowRecords<kBlockM>::of(delta, e) * Score::cap_grad(tS(i + e));
        }
      }
      probabilities<true>(params, records(), tS);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(tS); ++i) tdP(i) *= tS(i);
    } else {
      score_grads(records(), scale, tS, tdP);
    }
    copy(packed<Element>(tS), packed_p);
    copy(packed<Element>(tdP), packed_ds);
  };
  // dS for dQ. It has two buffers, that of a step is its stage's: one is free again when the other
  // warpgroup has written the other.
  auto const share_ds = [&] {
    stage_packed<kBlockN, kBlockM, 64>(packed_ds, storage.exchange + state.stage * Traits::kSizedS,
                                       warpgroup * 64 + lane_warp * 16);
    cutlass::arch::fence_view_async_shared();
    arrive(NamedBarrier::kDScoresWritten, warpgroup * 2 + state.stage, 256);
  };
  // dQ = dS K, as soon as the other warpgroup has written its part, too.
  auto const issue_dq = [&](int stage) {
    sync(NamedBarrier::kDScoresWritten, (1 - warpgroup) * 2 + stage, 256);
    issue_gemm_zero(mma_dq, tdQrdS(_, _, _, stage), tdQrK, tdQ);
  };
  auto const hand_over_dq = [&](int stage) {
    warpgroup_fence_operand(tdQ);
    sync(NamedBarrier::kDQueryEmpty, warpgroup, 128 + 32);
    auto* const part = reinterpret_cast<float4*>(storage.dquery + warpgroup * Traits::kSizeQ / 2) +
                       threadIdx.x % 128;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tdQ); i += 4) {
      part[i / 4 * 128] = float4{tdQ(i), tdQ(i + 1), tdQ(i + 2), tdQ(i + 3)};
    }
    cutlass::arch::fence_view_async_shared();
    arrive(NamedBarrier::kDQueryFull, warpgroup * 2 + stage, 128 + 32);
  };

  Step step;
  auto const read_step = [&] {
    queries.full[state.stage].wait(state.phase);
    step = storage.steps[state.stage];
    step.masked |= records().careful();
  };
  read_step();
  auto const take_next = [&] {
    state.advance();
    read_step();
  };
  auto const release_dout = [&](int stage) {
    warpgroup_fence_operand(tdV);
    if (elected) douts.empty[stage].arrive();
  };
  auto const release_query = [&](int stage) {
    warpgroup_fence_operand(tdK);
    if (elected) queries.empty[stage].arrive();
  };
  if (step.m_block < 0) return true;
  storage.key_full.wait(0);
  issue_s();
  storage.value_full.wait(0);
  issue_dp();
  warpgroup_wait<1>();
  make_p(step);
  warpgroup_wait<0>();
  make_ds();
  if constexpr (Traits::kNarrow) share_ds();

  // dV, dK and dQ of a step, S and dP of the next. Nothing is in flight between iterations.
  while (!step.last) {
    int const last_stage = state.stage;
    if constexpr (Traits::kNarrow) {
      // dQ waits for the other warpgroup last, behind all that does not, and runs beside the
      // exponentials.
      issue_dv(last_stage);
      issue_dk(last_stage);
      take_next();
      warpgroup_wait<1>();
      release_dout(last_stage);
      issue_s();
      issue_dq(last_stage);
      warpgroup_wait<1>();
      release_query(last_stage);
      make_p(step);
      warpgroup_wait<0>();
      hand_over_dq(last_stage);
      issue_dp();
    } else {
      // Fewer registers: dQ has left them when S comes. dP runs beside the exponentials.
      issue_dv(last_stage);
      share_ds();
      issue_dq(last_stage);
      issue_dk(last_stage);
      warpgroup_wait<1>();
      release_dout(last_stage);
      take_next();
      hand_over_dq(last_stage);
      issue_s();
      warpgroup_wait<1>();
      release_query(last_stage);
      issue_dp();
      warpgroup_wait<1>();
      make_p(step);
    }
    warpgroup_wait<0>();
    make_ds();
    // A fence waits for the wgmmas in flight (README.md): here there are none.
    if constexpr (Traits::kNarrow) share_ds();
  }

  issue_dv(state.stage);
  if constexpr (!Traits::kNarrow) share_ds();
  issue_dq(state.stage);
  issue_dk(state.stage);
  warpgroup_wait<1>();
  hand_over_dq(state.stage);
  warpgroup_wait<0>();
  release_dout(state.stage);
  release_query(state.stage);
  state.advance();
  return step.ends;
}

}  // namespace jax_fa3::bwd
