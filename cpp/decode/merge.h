// Joins what several CTAs computed of one tile, always in the same order: results are the same bit
// by bit from run to run.
#pragma once

#include "common/fragment.h"
#include "common/softmax.h"
#include "decode/parts.h"
#include "decode/schedule.h"
#include "plan.h"

namespace jax_fa3::decode {

// A warp's lanes have columns of one row, four each. Its parts take turns in so many sums, which
// are added up in the end: each by a warp of its own where there are few rows, or all by one warp.
inline constexpr int kMergeSums = 8;
inline constexpr int kMergeThreads = kMergeSums * 32;

constexpr int merge_rows(int slot_rows) { return slot_rows <= 16 ? 1 : kMergeSums; }  // of a CTA
constexpr int merge_ctas(int slot_rows) { return ceil_div(slot_rows, merge_rows(slot_rows)); }

// Where the parts of one row are. The first is in its CTA's slot 0; of each other CTA there is one,
// or with splits one for each of them.
struct Parts {
  Params const& params;
  Split const& split;
  int cta;
  int num_ctas;
  int row;

  CUTLASS_DEVICE int64_t place(int part) const {
    int in_cta = cta + part;
    int slot = part > 0;
    if (params.tiles.split > 0 && part > 0) {
      Piece const piece(split.total, num_ctas);
      int const unit = split.behind + part - 1;
      in_cta = piece.cta(unit);
      slot = 1 + unit - piece.begin(in_cta);
    }
    return (int64_t{in_cta} * params.slots + slot) * params.slot_rows + row;
  }
  CUTLASS_DEVICE float lse(int part) const { return params.partial_lse[place(part)]; }
  CUTLASS_DEVICE float4 out(int part, int column) const {
    return *reinterpret_cast<float4 const*>(params.partial_out + place(part) * params.head_dim_v +
                                            column);
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

// Part after part, as a CTA joins those that it has itself.
template <class Element>
CUTLASS_DEVICE void join_parts(Params const& params, Parts const& parts, int64_t index) {
  int const lane = threadIdx.x % 32;
  for (int first = 0; first < params.head_dim_v; first += 128) {
    int const column = first + lane * 4;
    int const read = min(column, params.head_dim_v - 4);
    float lse = parts.lse(0);
    float4 out = parts.out(0, read);
#pragma unroll 4
    for (int part = 1; part < parts.split.parts; ++part) {
      float4 const x = parts.out(part, read);
      Joined const joined(lse, parts.lse(part));
      out = {joined(out.x, x.x), joined(out.y, x.y), joined(out.z, x.z), joined(out.w, x.w)};
      lse = joined.lse;
    }
    float const scale = add_sink(params, index, &lse);
    store_merged<Element>(params, index, column, out, scale, lse);
  }
}

// merge_ctas() CTAs for the tile that is split from one CTA of the decoding kernel on.
template <class Element, int kBlockM>
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(__grid_constant__ Params const params) {
  __shared__ float4 sums[kMergeSums][32];
  cudaGridDependencySynchronize();
  bool const few_rows = merge_rows(params.slot_rows) == 1;
  int const groups = merge_ctas(params.slot_rows);
  int const cta = static_cast<int>(blockIdx.x) / groups;
  int const group = static_cast<int>(blockIdx.x) % groups;
  Split const split = params.splits[cta];
  if (split.parts == 0) return;
  int const lane = threadIdx.x % 32;
  int const warp = threadIdx.x / 32;
  int const row = few_rows ? group : group * kMergeSums + warp;
  OutRow const tile{split.first_row, split.count, split.head, split.tile};
  int64_t const index = tile.index(row, kBlockM, params.tiles.group, params.num_heads_q);
  if (index < 0) return;  // all warps of the CTA, or all that are behind

  Parts const parts{params, split, cta, static_cast<int>(gridDim.x) / groups, row};
  if (params.tiles.split > 0) {
    if (!few_rows || warp == 0) join_parts<Element>(params, parts, index);
    return;
  }
  float top = -INFINITY;
  for (int part = lane; part < split.parts; part += 32) {
    top = fmaxf(top, parts.lse(part));  // a NaN comes back by its difference
  }
  CUTLASS_PRAGMA_UNROLL
  for (int i = 16; i > 0; i /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
  if (top == -INFINITY) top = 0.f;
  auto const weight = [&](int part) { return exp2f((parts.lse(part) - top) * kLog2E); };
  float sum = 0.f;
  for (int part = lane; part < split.parts; part += 32) sum += weight(part);
  CUTLASS_PRAGMA_UNROLL
  for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
  float lse = sum == 0.f ? -INFINITY : top + logf(sum);
  float const scale = add_sink(params, index, &lse) * (sum == 0.f ? 0.f : 1.f / sum);

  for (int first = 0; first < params.head_dim_v; first += 128) {
    int const column = first + lane * 4;
    auto const summed = [&](int line) {
      float4 out{0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
      for (int part = line; part < split.parts; part += kMergeSums) {
        float const w = weight(part);
        float4 const x = parts.out(part, min(column, params.head_dim_v - 4));
        out = {fmaf(w, x.x, out.x), fmaf(w, x.y, out.y), fmaf(w, x.z, out.z), fmaf(w, x.w, out.w)};
      }
      return out;
    };
    float4 out{0.f, 0.f, 0.f, 0.f};
    auto const add = [&](float4 const& x) {
      out = {out.x + x.x, out.y + x.y, out.z + x.z, out.w + x.w};
    };
    if (few_rows) {
      __syncthreads();
      sums[warp][lane] = summed(warp);
      __syncthreads();
      if (warp > 0) continue;
      for (int line = 0; line < kMergeSums; ++line) add(sums[line][lane]);
    } else {
      for (int line = 0; line < min(kMergeSums, split.parts); ++line) add(summed(line));
    }
    store_merged<Element>(params, index, column, out, scale, lse);
  }
}

}  // namespace jax_fa3::decode
