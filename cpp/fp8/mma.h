// The FP8 mainloop of a consumer warpgroup: fwd/mma.h with a scale for every block, and P in e4m3.
#pragma once

#include "common/gemm.h"
#include "common/softmax.h"
#include "fp8/traits.h"

namespace jax_fa3::fp8 {

template <int kHeadDim, class Storage, class State, class Turns, class FindRows, class Out>
CUTLASS_DEVICE void mma(Traits<kHeadDim>, Params const& params, Storage& storage, State& state,
                        Turns turns, Work const& work, FindRows const& find_rows,
                        Interval (&rows)[kRowsPerThread], Softmax& softmax, Out& tOrO) {
  using Traits = Traits<kHeadDim>;
  using Element = typename Traits::Element;
  constexpr int kBlockN = Traits::kBlockN;
  int const warpgroup = turns.warpgroup;
  BlockRange const& blocks = work.own;

  typename Traits::MmaQK mma_qk;
  typename Traits::MmaPV mma_pv;
  auto const memory = [](uint8_t* p) { return make_smem_ptr(reinterpret_cast<Element*>(p)); };
  Tensor sQ = make_tensor(memory(storage.query), typename Traits::LayoutQ{});
  Tensor sK = make_tensor(memory(storage.key), typename Traits::LayoutK{});
  Tensor sVt = make_tensor(memory(storage.value), typename Traits::LayoutVt{});
  auto const group_qk = mma_qk.get_slice(warpgroup * 128);
  auto const group_pv = mma_pv.get_slice(warpgroup * 128);
  Tensor tSrQ = group_qk.partition_fragment_A(sQ)(_, _, _, 0);
  Tensor tSrK = group_qk.partition_fragment_B(sK);
  Tensor tOrV = group_pv.partition_fragment_B(sVt);
  constexpr Shape<Int<Traits::kBlockM>, Int<kBlockN>> kShapeS{};
  Tensor tSrS = partition_fragment_C(mma_qk, kShapeS);
  Tensor tOrP = make_fragment_like<Element>(group_pv.partition_A(make_tensor<Element>(kShapeS)));
  static_assert(size(tOrP) == size(tSrS));
  Tensor tOrStep = make_fragment_like(tOrO);  // what a step adds to O, kSumInRegisters

  int const lane_column = threadIdx.x % 4 * 2;
  bool const elected = threadIdx.x % 32 == 0;
  auto& position = state.step;

  auto const issue_scores = [&] {
    issue_gemm_zero(mma_qk, tSrQ, tSrK(_, _, _, position.stage), tSrS);
  };
  auto const issue_out = [&] {
    if constexpr (Traits::kSumInRegisters) {
      issue_gemm_zero(mma_pv, tOrP, tOrV(_, _, _, position.stage), tOrStep);
    } else {
      issue_gemm(mma_pv, tOrP, tOrV(_, _, _, position.stage), tOrO);
    }
  };
  auto const wait_step = [&] { storage.step_pipeline.full[position.stage].wait(position.phase); };
  auto const release_step = [&] {
    if (elected) storage.step_pipeline.empty[position.stage].arrive();
    position.advance();
  };
  // Steps of the tile with nothing to see for these rows.
  auto const skip_steps = [&](int count) {
    CUTLASS_PRAGMA_NO_UNROLL
    for (; count > 0; --count) {
      wait_step();
      release_step();
      __syncwarp();
    }
  };

  int const first_row = work.tile.m_block * Traits::kBlockM + warpgroup * 64;
  int const query_block = min(first_row / kBlock, params.num_query_blocks - 1);
  float query_scale =
      params.query_scale[(int64_t{work.tile.batch} * params.num_query_blocks + query_block) *
                             params.num_heads_q +
                         work.tile.head];

  storage.query_full[warpgroup].wait(state.query_phase);
  state.query_phase ^= 1;
  if (blocks.begin >= blocks.end) {
    if (elected) storage.query_empty[warpgroup].arrive();
    find_rows(rows);
    skip_steps(work.blocks.end - work.blocks.begin + 1);
    return;
  }
  // After the tile's last S, Q may be overwritten. No sum is negative, but that ptxas cannot know:
  // it may not move this, nor the wait behind it, before the exponentials that are summed already.
  auto const release_query = [&](int n_block) {
    bool const last = n_block == blocks.begin && !(softmax.row_sum[0] < 0.f);
    if (elected && last) storage.query_empty[warpgroup].arrive();
  };

  float out_unit;  // of O: the value scale of the block at hand

  // Scores of a masked (or capped) block in their true size.
  auto const mask_block = [&](int n_block, float scale) {
    if (params.cap_scale != 0.f) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(tSrS); ++i) {
        tSrS(i) = tanh_approx(tSrS(i) * (scale * params.cap_scale));
      }
    } else {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(tSrS); ++i) tSrS(i) *= scale;
    }
    mask_scores(tSrS, rows, n_block * kBlockN + lane_column);
  };
  // Takes a block's scores, masked if need be, into the maximum, and its scales into what O is
  // multiplied by. Returns what the exponentials are to multiply the scores by.
  auto const take_block = [&](int n_block, bool masked, BlockScale scale) {
    float const score_scale = scale.key * query_scale;
    if (masked) mask_block(n_block, score_scale);
    float const exponent_scale = masked ? softmax.scale_log2 : softmax.scale_log2 * score_scale;
    softmax.update_max(tSrS, exponent_scale);
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) softmax.rescale[row] *= scale.ratio;
    out_unit = scale.value;
    return exponent_scale;
  };
  auto const convert = [&] {
    Tensor packed = recast<uint32_t>(tOrP);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(packed); ++i) {  // [row, half of 32 keys, 32 keys]
      int const first = i / 4 * 16 + i / 2 % 2 * 8 + i % 2 * 2;
      packed(i) = pack_e4m3(tSrS(first), tSrS(first + 1), tSrS(first + 4), tSrS(first + 5));
    }
  };

  // O before a step is added to it.
  auto const rescale_out = [&] {
    if constexpr (!Traits::kSumInRegisters) {
      bool const changes = softmax.rescale[0] != 1.f || softmax.rescale[1] != 1.f;
      if (!__any_sync(~0u, changes)) return;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(tOrO); ++i) tOrO(i) *= softmax.rescale[fragment_row(i)];
    }
  };
  auto const add_out = [&] {
    warpgroup_wait<0>();
    if constexpr (Traits::kSumInRegisters) {
      warpgroup_fence_operand(tOrStep);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(tOrO); ++i) {
        tOrO(i) = tOrO(i) * softmax.rescale[fragment_row(i)] + tOrStep(i);
      }
    } else {
      warpgroup_fence_operand(tOrO);
    }
  };

  // kSumInMemory: a thread's part of the sum, as O lies in its registers, and the exponents of base
  // 2 that it is relative to.
  float4* const sums = storage.sums(warpgroup) + threadIdx.x % 128;
  float2* const sums_exponent = storage.sums_exponent + (threadIdx.x - 128);
  bool summed = false;
  auto const exponent = [&](int row) { return softmax.row_max[row] + log2f(out_unit); };
  auto const add_sums = [&] {
    float2 const then = *sums_exponent;
    float const rescale[] = {exp2f(then.x - exponent(0)), exp2f(then.y - exponent(1))};
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tOrO); i += 4) {
      float4 const sum = sums[i / 4 * 128];
      tOrO(i) += sum.x * rescale[0];
      tOrO(i + 1) += sum.y * rescale[0];
      tOrO(i + 2) += sum.z * rescale[1];
      tOrO(i + 3) += sum.w * rescale[1];
    }
  };
  auto const put_away = [&] {
    rescale_out();
    if (summed) {
      add_sums();
    } else {  // the previous tile's output may still be on its way from there
      if (threadIdx.x % 128 == 0) tma_store_wait<0>();
      cutlass::arch::NamedBarrier::sync(128, barrier_id(NamedBarrier::kOutOfWarpgroup0, warpgroup));
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tOrO); i += 4) {
      sums[i / 4 * 128] = float4{tOrO(i), tOrO(i + 1), tOrO(i + 2), tOrO(i + 3)};
    }
    clear(tOrO);
    *sums_exponent = float2{exponent(0), exponent(1)};
    summed = true;
  };

  // The last block: nothing to overlap with.
  skip_steps(work.blocks.end - blocks.end);
  int n_block = blocks.end - 1;
  wait_step();
  BlockScale const last_scale = storage.scale[position.stage];
  issue_scores();
  clear(tOrO);
  find_rows(rows);
  warpgroup_wait<0>();
  warpgroup_fence_operand(tSrS);
  release_step();
  if (!is_scale(query_scale)) query_scale = NAN;
  {
    bool const masked = n_block < blocks.full_begin || n_block >= blocks.full_end;
    float const scale = take_block(n_block, masked, last_scale);
    softmax.template exponentiate<0, 1>(tSrS, scale);
    release_query(n_block);
    convert();
  }
  --n_block;

  // S of block n, and P V of block n + 1.
  auto const step = [&](auto masked) {
    rescale_out();
    wait_step();
    BlockScale const block_scale = storage.scale[position.stage];
    if constexpr (Traits::kBesideOut) {
      issue_scores();
      issue_out();
      warpgroup_wait<1>();
    } else {
      issue_out();
      add_out();
      issue_scores();
      warpgroup_wait<0>();
    }
    warpgroup_fence_operand(tSrS);
    if constexpr (!Traits::kBesideOut) release_step();
    float const scale = take_block(n_block, decltype(masked)::value, block_scale);
    softmax.template exponentiate<0, 2>(tSrS, scale);
    release_query(n_block);
    if constexpr (Traits::kBesideOut) {
      add_out();
      release_step();
    }
    softmax.template exponentiate<1, 2>(tSrS, scale);
    convert();
  };
  while (n_block >= blocks.begin) {
    // To the block after whose scores O is put away; asked in every step that would cost 4 %.
    constexpr int kSteps = Traits::kSumInMemory ? Traits::kStepsOfSum : 1 << 30;
    int const last = max(n_block / kSteps * kSteps, blocks.begin);
    while (n_block >= last) {
      if (n_block < blocks.full_end) {
        for (int const end = max(last, blocks.full_begin); n_block >= end; --n_block) {
          step(false_type{});
        }
      }
      if (n_block >= last) {
        step(true_type{});
        --n_block;
      }
    }
    if constexpr (Traits::kSumInMemory) {
      if (n_block >= blocks.begin) put_away();
    }
  }

  rescale_out();
  wait_step();
  issue_out();
  add_out();
  release_step();
  skip_steps(blocks.begin - work.blocks.begin);
  if constexpr (Traits::kSumInMemory) {
    if (summed) add_sums();
  }
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(tOrO); ++i) tOrO(i) *= out_unit;
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row) softmax.row_max[row] -= kShift;
}

}  // namespace jax_fa3::fp8
