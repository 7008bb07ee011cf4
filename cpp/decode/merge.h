// Joins what several CTAs computed of one tile: the last of them that is done does it, always in
// the same order, so results are the same bit by bit from run to run.
#pragma once

#include "common/fragment.h"
#include "common/softmax.h"
#include "decode/barriers.h"
#include "decode/parts.h"
#include "decode/schedule.h"

namespace jax_fa3::decode {

// Where the parts of one row are. The first is in its CTA's slot 0; of each other CTA there is one,
// or with splits one for each of them.
template <bool kSplits>
struct Parts {
  Params const& params;
  Work const& work;
  int row;

  CUTLASS_DEVICE int64_t place(int part) const {
    int in_cta = work.owner + part;
    int slot = part > 0;
    if (kSplits && part > 0) {
      Piece const piece(work.units, static_cast<int>(gridDim.x));
      int const unit = piece.begin(work.owner + 1) + part - 1;
      in_cta = piece.cta(unit);
      slot = 1 + unit - piece.begin(in_cta);
    }
    return (int64_t{in_cta} * params.slots + slot) * params.slot_rows + row;
  }
  // Past the L1, which does not know what other SMs write.
  CUTLASS_DEVICE float lse(int part) const { return __ldcg(params.partial_lse + place(part)); }
  CUTLASS_DEVICE float4 out(int part, int column) const {
    float const* const at = params.partial_out + place(part) * params.head_dim_v + column;
    return __ldcg(reinterpret_cast<float4 const*>(at));
  }
};

template <class Element>
CUTLASS_DEVICE void store_merged(Params const& params, int64_t index, int column, float4 out,
                                 float scale, float lse) {
  if (column >= params.head_dim_v) return;
  auto* const target = static_cast<uint16_t*>(params.out) + index * params.head_dim_v + column;
  *reinterpret_cast<uint2*>(target) = uint2{pack<Element>(out.x * scale, out.y * scale),
                                            pack<Element>(out.z * scale, out.w * scale)};
  if (column == 0) params.lse[index] = lse;
}

// One row by one warp, whose lanes have four columns each. With splits part after part, as a CTA
// joins those that it has itself.
template <class Element>
CUTLASS_DEVICE void join(Params const& params, Parts<true> const& parts, int64_t index) {
  int const lane = threadIdx.x % 32;
  CUTLASS_PRAGMA_NO_UNROLL
  for (int first = 0; first < params.head_dim_v; first += 128) {
    int const column = first + lane * 4;
    int const read = min(column, params.head_dim_v - 4);
    float lse = parts.lse(0);
    float4 out = parts.out(0, read);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int part = 1; part < parts.work.parts; ++part) {
      float4 const x = parts.out(part, read);
      Joined const joined(lse, parts.lse(part));
      out = {joined(out.x, x.x), joined(out.y, x.y), joined(out.z, x.z), joined(out.w, x.w)};
      lse = joined.lse;
    }
    float const scale = add_sink(params, index, &lse);
    store_merged<Element>(params, index, column, out, scale, lse);
  }
}

// Otherwise 32 parts at once.
template <class Element>
CUTLASS_DEVICE void join(Params const& params, Parts<false> const& parts, int64_t index) {
  int const lane = threadIdx.x % 32;
  int const count = parts.work.parts;
  CUTLASS_PRAGMA_NO_UNROLL
  for (int first = 0; first < params.head_dim_v; first += 128) {
    int const column = first + lane * 4;
    int const read = min(column, params.head_dim_v - 4);
    float top = -INFINITY;
    float sum = 0.f;  // of this lane's parts
    float4 out{0.f, 0.f, 0.f, 0.f};
    CUTLASS_PRAGMA_NO_UNROLL
    for (int chunk = 0; chunk < count; chunk += 32) {
      int const in_chunk = min(count - chunk, 32);
      float const own = lane < in_chunk ? parts.lse(chunk + lane) : -INFINITY;
      float largest = fmaxf(top, own);  // a NaN comes back by its difference
      CUTLASS_PRAGMA_UNROLL
      for (int i = 16; i > 0; i /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, i));
      float const offset = largest == -INFINITY ? 0.f : largest;
      float const before = exp2f((top - offset) * kLog2E);
      float const weight = exp2f((own - offset) * kLog2E);
      top = largest;
      sum = fmaf(sum, before, weight);
      out = {out.x * before, out.y * before, out.z * before, out.w * before};
#pragma unroll 16
      for (int i = 0; i < in_chunk; ++i) {
        float const w = __shfl_sync(~0u, weight, i);
        float4 const x = parts.out(chunk + i, read);
        out = {fmaf(w, x.x, out.x), fmaf(w, x.y, out.y), fmaf(w, x.z, out.z), fmaf(w, x.w, out.w)};
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    float lse = sum == 0.f ? -INFINITY : top + logf(sum);
    float const scale = add_sink(params, index, &lse) * (sum == 0.f ? 0.f : 1.f / sum);
    store_merged<Element>(params, index, column, out, scale, lse);
  }
}

// All consumers, when this CTA's part of a tile is stored.
template <class Traits>
CUTLASS_DEVICE void join_if_last(Params const& params, typename Traits::SharedStorage& storage,
                                 Work const& work) {
  constexpr int kThreads = Traits::kWarpgroups * 128;
  int const thread = threadIdx.x - (Traits::kThreads - kThreads);
  auto const meet = [] {
    cutlass::arch::NamedBarrier::sync(kThreads, barrier_id(NamedBarrier::kPartsStored, 0));
  };
  __threadfence();
  meet();
  if (thread == 0) {
    cudaGridDependencySynchronize();  // the counters are zero
    storage.is_last = atomicAdd(params.arrivals + work.owner, 1) == work.parts - 1;
  }
  meet();
  if (!storage.is_last) return;
  __threadfence();
  OutRow const tile{work.sequence.first_row, work.sequence.count, work.head, work.tile};
  CUTLASS_PRAGMA_NO_UNROLL
  for (int row = thread / 32; row < params.slot_rows; row += kThreads / 32) {
    int64_t const index = tile.index(row, Traits::kBlockM, params.tiles.group, params.num_heads_q);
    if (index < 0) break;
    using Element = typename Traits::Element;
    if (params.tiles.split > 0) {
      join<Element>(params, Parts<true>{params, work, row}, index);
    } else {
      join<Element>(params, Parts<false>{params, work, row}, index);
    }
  }
}

// Launched in front, and overtaken: the counters are needed last.
static __global__ void __launch_bounds__(256) reset_kernel(__grid_constant__ Params const params) {
  cudaTriggerProgrammaticLaunchCompletion();
  for (int i = threadIdx.x; i < params.num_ctas; i += 256) params.arrivals[i] = 0;
}

}  // namespace jax_fa3::decode
