// The FP8 mainloop of a consumer warpgroup: as in fwd/mma.h, with a scale for every block and P in
// e4m3; and a tile's first S is computed beside the epilogue of the tile before.
#pragma once

#include "common/gemm.h"
#include "common/softmax.h"
#include "common/tma.h"
#include "fp8/traits.h"
#include "fwd/epilogue.h"

namespace jax_fa3::fp8 {

template <int kHeadDim>
CUTLASS_DEVICE void consume(Traits<kHeadDim>, Params const& params,
                            typename Traits<kHeadDim>::SharedStorage& storage, int warpgroup) {
  using Traits = Traits<kHeadDim>;
  using Element = typename Traits::Element;
  constexpr int kBlockN = Traits::kBlockN;

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
  Tensor tOrO = partition_fragment_C(mma_pv, Shape<Int<Traits::kBlockM>, Int<kHeadDim>>{});
  Tensor tOrStep = make_fragment_like(tOrO);  // what a step adds to O, kSumInRegisters

  // As threadIdx.x, but read where it is asked for: what is made of it is not worth registers.
  auto const thread = [] {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
  };
  bool const elected = threadIdx.x % 32 == 0;

  int num_tiles = 0;  // done
  auto const work_stage = [&](int tile) { return tile % Traits::kWorkStages; };
  PipelineState<Traits::kStages> position;

  // The tile at hand. More of it is in `storage.work`, where it stays until its output is stored:
  // beside O and the next tile's first S there are few registers.
  bool last_tile;
  bool sees;  // whether there are blocks for this warpgroup
  float query_scale;
  BlockScale block_scale;
  Interval rows[kRowsPerThread];
  Softmax softmax;

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

  // Takes the next tile, and computes S of its last block, to which finish_first_scores() belongs.
  // What there is no tile or block for is computed of whatever stands there, and not used.
  auto const issue_first_scores = [&] {
    storage.work_pipeline.full[work_stage(num_tiles)].wait(num_tiles / Traits::kWorkStages % 2);
    WorkTile const& work = storage.work[work_stage(num_tiles)];
    BlockRange const& own = storage.warpgroup_blocks[work_stage(num_tiles)][warpgroup];
    last_tile = work.last;
    sees = !last_tile && own.begin < own.end;
    if (!last_tile) {
      int const query_block = min((work.tile.block * Traits::kBlockM + warpgroup * 64) / kBlock,
                                  params.num_query_blocks - 1);
      query_scale = __ldg(params.query_scale +
                          (int64_t{work.tile.batch} * params.num_query_blocks + query_block) *
                              params.num_heads_q +
                          work.tile.head);
      storage.query_full[warpgroup].wait(Traits::query_phase(work_stage(num_tiles)));
      if (sees) {
        skip_steps(work.blocks.end - own.end);
        wait_step();
      } else {
        if (elected) storage.query_empty[warpgroup].arrive();
        bool const visits = work.blocks.begin < work.blocks.end;
        skip_steps(visits ? work.blocks.end - work.blocks.begin + 1 : 0);
      }
    }
    issue_scores();
  };
  auto const finish_first_scores = [&] {
    if (!last_tile) {
      TileCoord const tile = storage.work[work_stage(num_tiles)].tile;
      int const tile_row = warpgroup * 64 + thread() % 128 / 32 * 16 + thread() % 32 / 4;
      CUTLASS_PRAGMA_UNROLL
      for (int row = 0; row < kRowsPerThread; ++row) {
        rows[row] =
            params.mask.row_interval(tile.batch, tile.block * Traits::kBlockM + tile_row + row * 8);
      }
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(tSrS);
    block_scale = storage.scale[position.stage];  // of no meaning if there is no block, as S
    if (sees) release_step();
  };
  // After the tile's last S, Q may be overwritten. No sum is negative, but that ptxas cannot know:
  // it may not move this, nor the wait behind it, before the exponentials that are summed already.
  auto const release_query = [&](bool last) {
    if (elected && last && !(softmax.block_sum[0] < 0.f)) storage.query_empty[warpgroup].arrive();
  };

  // Scores of a masked (or capped) block in their true size.
  auto const mask_block = [&](int n_block, float scale) {
    params.score.apply(tSrS, scale);
    mask_scores(tSrS, rows, n_block * kBlockN + thread() % 4 * 2);
  };
  // Takes a block's scores, masked if need be, into the maximum, and the unit of its V into what O
  // is multiplied by. Returns what the exponentials are to multiply the scores by.
  auto const take_block = [&](int n_block, bool masked) {
    float const score_scale = block_scale.key * query_scale;
    float const exponent_scale = params.exponents.softmax_scale_log2 * (masked ? 1.f : score_scale);
    if (masked) mask_block(n_block, score_scale);
    softmax.update_max(tSrS, exponent_scale, block_scale.exponent);
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) softmax.rescale[row] *= block_scale.ratio;
    softmax.out_scale = block_scale.unit;
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
  bool summed;
  auto const exponent = [&](int row) { return softmax.row_max[row] + log2f(softmax.out_scale); };
  auto const add_sums = [&] {
    float4 const* const sums = storage.sums(warpgroup) + thread() % 128;
    float2 const then = storage.sums_exponent[thread() - 128];
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
      cutlass::arch::NamedBarrier::sync(128,
                                        barrier_id(fwd::NamedBarrier::kOutOfWarpgroup0, warpgroup));
    }
    float4* const sums = storage.sums(warpgroup) + thread() % 128;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(tOrO); i += 4) {
      sums[i / 4 * 128] = float4{tOrO(i), tOrO(i + 1), tOrO(i + 2), tOrO(i + 3)};
    }
    clear(tOrO);
    storage.sums_exponent[thread() - 128] = float2{exponent(0), exponent(1)};
    summed = true;
  };

  // S of block n, and P V of block n + 1.
  auto const step = [&](int n_block, bool last, auto masked) {
    rescale_out();
    wait_step();
    block_scale = storage.scale[position.stage];
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
    float const scale = take_block(n_block, decltype(masked)::value);
    softmax.template exponentiate<0, 2>(tSrS, scale, block_scale.exponent);
    release_query(last);
    if constexpr (Traits::kBesideOut) {
      add_out();
      release_step();
    }
    softmax.template exponentiate<1, 2>(tSrS, scale, block_scale.exponent);
    convert();
  };

  // All of a tile but its first S and its epilogue.
  auto const run_tile = [&] {
    BlockRange const blocks = storage.warpgroup_blocks[work_stage(num_tiles)][warpgroup];
    summed = false;
    if (!is_scale(query_scale)) query_scale = NAN;
    int n_block = blocks.end - 1;
    {
      bool const masked = n_block < blocks.full_begin || n_block >= blocks.full_end;
      float const scale = take_block(n_block, masked);
      softmax.template exponentiate<0, 1>(tSrS, scale, block_scale.exponent);
      release_query(n_block == blocks.begin);
      convert();
    }
    clear(tOrO);
    --n_block;
    while (n_block >= blocks.begin) {
      // To the block after whose scores O is put away; asked in every step that would cost 4 %.
      constexpr int kSteps = Traits::kSumInMemory ? Traits::kStepsOfSum : 1 << 30;
      int const last = max(n_block / kSteps * kSteps, blocks.begin);
      while (n_block >= last) {
        if (n_block < blocks.full_end) {
          for (int const end = max(last, blocks.full_begin); n_block >= end; --n_block) {
            step(n_block, n_block == blocks.begin, false_type{});
          }
        }
        if (n_block >= last) {
          step(n_block, n_block == blocks.begin, true_type{});
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
    skip_steps(blocks.begin - storage.work[work_stage(num_tiles)].blocks.begin);
    if constexpr (Traits::kSumInMemory) {
      if (summed) add_sums();
    }
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) softmax.row_max[row] -= kShift;
  };

  if constexpr (Traits::kTransposesBeside) {
    // What the first tiles need; these warps have nothing to do before Q and K are there.
    if (params.transpose.taken != nullptr) {
      transpose_taken<kHeadDim>(params.transpose, take_units(params.transpose));
    }
  }
  issue_first_scores();
  finish_first_scores();
  while (!last_tile) {
    softmax = Softmax{};
    if (sees) run_tile();
    ++num_tiles;
    issue_first_scores();
    fwd::store<Traits>(params, storage, storage.work[work_stage(num_tiles - 1)].tile, warpgroup,
                       rows, softmax, tOrO);
    __syncwarp();
    if (elected) storage.work_pipeline.empty[work_stage(num_tiles - 1)].arrive();
    finish_first_scores();
  }
  tma_store_wait<0>();
}

}  // namespace jax_fa3::fp8
