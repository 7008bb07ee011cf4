// The FP8 mainloop of a consumer warpgroup: fwd/mma.h with a scale for every block, and P in e4m3.
#pragma once

#include "common/gemm.h"
#include "common/softmax.h"
#include "fp8/traits.h"

namespace jax_fa3::fp8 {

// The scales of 32 blocks of keys, of one each lane. A load of one alone would be waited for in
// every step, for ptxas moves what is the same in all lanes to a uniform register at once.
struct BlockScales {
  float key;  // times query's, after prepare()
  float value;
  float ratio;  // after prepare(): of the value scale of the block behind to this one's

  CUTLASS_DEVICE BlockScales(Params const& params, int batch, int head, int chunk) {
    int const n_block = chunk * 32 + threadIdx.x % 32;
    bool const exists = chunk >= 0 && n_block < params.num_key_blocks;
    int64_t const index =
        (int64_t{batch} * params.num_key_blocks + n_block) * params.num_heads_k + head;
    key = exists ? __ldg(params.key_scale + index) : 1.f;
    value = exists ? __ldg(params.value_scale + index) : 1.f;
  }

  // A scale that is none makes NaN of the rows that see the block, and only of those: the key's
  // scale meets scores before the mask does. `value_behind`: of the block behind the last of these.
  CUTLASS_DEVICE void prepare(float query_scale, float value_behind) {
    bool const valid = is_scale(value);
    key = valid && is_scale(key) ? key * query_scale : NAN;
    if (!valid) value = 1.f;
    float const behind = __shfl_down_sync(~0u, value, 1);
    // Finite: the first block's is to one that is not read, whose scale may be any, and meets an O
    // of 0.
    ratio = fminf(__fdividef(threadIdx.x % 32 == 31 ? value_behind : behind, value), 0x1p127f);
  }
};

template <int kHeadDim, class Storage, class State, class Turns, class FindRows, class Out>
CUTLASS_DEVICE void mma(Traits<kHeadDim>, Params const& params, Storage& storage, State& state,
                        Turns turns, fwd::Work const& work, FindRows const& find_rows,
                        Interval (&rows)[kRowsPerThread], Softmax& softmax, Out& tOrO) {
  using Traits = Traits<kHeadDim>;
  using Element = typename Traits::Element;
  constexpr int kBlockN = Traits::kBlockN;
  BlockRange const& blocks = work.blocks;

  typename Traits::MmaQK mma_qk;
  typename Traits::MmaPV mma_pv;
  auto const memory = [](uint8_t* p) { return make_smem_ptr(reinterpret_cast<Element*>(p)); };
  Tensor sQ = make_tensor(memory(storage.query), typename Traits::LayoutQ{});
  Tensor sK = make_tensor(memory(storage.key), typename Traits::LayoutK{});
  Tensor sVt = make_tensor(memory(storage.value), typename Traits::LayoutVt{});
  auto const group_qk = mma_qk.get_slice(turns.warpgroup * 128);
  auto const group_pv = mma_pv.get_slice(turns.warpgroup * 128);
  Tensor tSrQ = group_qk.partition_fragment_A(sQ)(_, _, _, 0);
  Tensor tSrK = group_qk.partition_fragment_B(sK);
  Tensor tOrV = group_pv.partition_fragment_B(sVt);
  constexpr Shape<Int<Traits::kBlockM>, Int<kBlockN>> kShapeS{};
  Tensor tSrS = partition_fragment_C(mma_qk, kShapeS);
  Tensor tOrP = make_fragment_like<Element>(group_pv.partition_A(make_tensor<Element>(kShapeS)));
  static_assert(size(tOrP) == size(tSrS));
  Tensor tOrStep = make_fragment_like(tOrO);  // what a step adds to O

  int const lane_column = threadIdx.x % 4 * 2;
  bool const elected = threadIdx.x % 32 == 0;
  auto& position = state.step;
  int const batch = work.tile.batch;
  int const head_k = work.tile.head / params.group;

  auto const issue_scores = [&] {
    issue_gemm_zero(mma_qk, tSrQ, tSrK(_, _, _, position.stage), tSrS);
  };
  auto const issue_out = [&] {
    if constexpr (Traits::kTwoLevels) {
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
  // After the tile's last S, Q may be overwritten. No sum is negative, but that ptxas cannot know:
  // it may not move this, nor the wait behind it, before the exponentials that are summed already.
  auto const release_query = [&](int n_block) {
    bool const last = n_block == blocks.begin && !(softmax.row_sum[0] < 0.f);
    if (elected && last) storage.query_empty[turns.warpgroup].arrive();
  };

  int const first_row = work.tile.m_block * Traits::kBlockM + turns.warpgroup * 64;
  int const query_block = min(first_row / kBlock, params.num_query_blocks - 1);
  float query_scale = params.query_scale[(int64_t{batch} * params.num_query_blocks + query_block) *
                                             params.num_heads_q +
                                         work.tile.head];
  int const last_chunk = (blocks.end - 1) / 32;
  BlockScales scales{params, batch, head_k, last_chunk};
  BlockScales next{params, batch, head_k, last_chunk - 1};
  float factor[kRowsPerThread];  // of O before a step's P V is added to it

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
  auto const convert = [&] {
    Tensor packed = recast<uint32_t>(tOrP);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(packed); ++i) {  // [row, half of 32 keys, 32 keys]
      int const first = i / 4 * 16 + i / 2 % 2 * 8 + i % 2 * 2;
      packed(i) = pack_e4m3(tSrS(first), tSrS(first + 1), tSrS(first + 4), tSrS(first + 5));
    }
  };
  // Takes a block's scores, masked if need be, into the maximum, and its scales into what O is
  // multiplied by. Returns what the exponentials are to multiply the scores by.
  auto const take_block = [&](int n_block, bool masked) {
    float const scale = __shfl_sync(~0u, scales.key, n_block % 32);
    float const ratio = __shfl_sync(~0u, scales.ratio, n_block % 32);
    if (masked) mask_block(n_block, scale);
    float const exponent_scale = masked ? softmax.scale_log2 : softmax.scale_log2 * scale;
    softmax.update_max(tSrS, exponent_scale);
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) softmax.rescale[row] *= ratio;
    return exponent_scale;
  };
  auto const keep_factor = [&] {
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) factor[row] = softmax.rescale[row];
  };
  auto const rescale_out = [&] {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tOrO); ++i) tOrO(i) *= softmax.rescale[fragment_row(i)];
  };
  auto const add_step = [&] {
    if constexpr (Traits::kTwoLevels) {
      warpgroup_fence_operand(tOrStep);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(tOrO); ++i) {
        tOrO(i) = tOrO(i) * factor[fragment_row(i)] + tOrStep(i);
      }
    } else {
      warpgroup_fence_operand(tOrO);
    }
  };

  // The last block: nothing to overlap with.
  int n_block = blocks.end - 1;
  storage.query_full[turns.warpgroup].wait(state.query_phase);
  state.query_phase ^= 1;
  wait_step();
  turns.wait();
  issue_scores();
  turns.pass();
  clear(tOrO);
  find_rows(rows);
  warpgroup_wait<0>();
  warpgroup_fence_operand(tSrS);
  release_step();
  // Not before: as what is the same in all lanes it would be waited for at once (BlockScales).
  query_scale = __shfl_sync(~0u, is_scale(query_scale) ? query_scale : NAN, 0);
  scales.prepare(query_scale, 1.f);
  {
    bool const masked = n_block < blocks.full_begin || n_block >= blocks.full_end;
    float const scale = take_block(n_block, masked);
    softmax.template exponentiate<0, 1>(tSrS, scale);
    release_query(n_block);
    convert();
  }
  --n_block;

  auto const add_out = [&] {
    warpgroup_wait<0>();
    add_step();
  };

  // S of block n, and P V of block n + 1.
  auto const step = [&](auto masked) {
    wait_step();
    turns.wait();
    if constexpr (Traits::kBesideOut) issue_scores();
    if constexpr (!Traits::kTwoLevels) rescale_out();
    issue_out();
    keep_factor();
    if constexpr (!Traits::kBesideOut) {
      add_out();
      issue_scores();
    }
    turns.pass();
    warpgroup_wait<Traits::kBesideOut ? 1 : 0>();
    warpgroup_fence_operand(tSrS);
    if constexpr (!Traits::kBesideOut) release_step();
    if (n_block % 32 == 31) {
      float const value_behind = __shfl_sync(~0u, scales.value, 0);
      scales = next;
      scales.prepare(query_scale, value_behind);
      next = BlockScales{params, batch, head_k, n_block / 32 - 1};
    }
    float const scale = take_block(n_block, decltype(masked)::value);
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
    if (n_block < blocks.full_end) {
      for (; n_block >= blocks.full_begin; --n_block) step(false_type{});
    }
    if (n_block >= blocks.begin) {
      step(true_type{});
      --n_block;
    }
  }

  if constexpr (!Traits::kTwoLevels) rescale_out();
  wait_step();
  issue_out();
  keep_factor();
  add_out();
  release_step();
  float const value_scale = __shfl_sync(~0u, scales.value, blocks.begin % 32);
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(tOrO); ++i) tOrO(i) *= value_scale;
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row) softmax.row_max[row] -= kShift;
}

}  // namespace jax_fa3::fp8
