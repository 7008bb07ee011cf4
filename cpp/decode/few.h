// Few query rows on an e4m3 cache. Keys and values go from the ring that TMA fills straight to
// registers, one byte for each number, and are widened there, in the order in which mma.sync wants
// its B operand: widening them in shared memory (widen.h) is slower than the memory they come from.
// The rows of a tile are one m16; each of the four warps has 16 positions of each block, and a
// softmax and an O of its own until the end of a work.
#pragma once

#include <cute/arch/mma_sm80.hpp>

#include "common/softmax.h"
#include "decode/barriers.h"
#include "decode/epilogue.h"
#include "decode/merge.h"
#include "decode/mma.h"
#include "decode/params.h"
#include "decode/parts.h"
#include "decode/traits.h"

namespace jax_fa3::decode {

// float16 has all numbers of e4m3, and of a bfloat16 query, whose rows are multiplied by a power of
// 2, all that matter.
using FewElement = cutlass::half_t;
using FewMma = SM80_16x8x16_F32F16F16F32_TN;

// Two e4m3 numbers, exactly.
CUTLASS_DEVICE uint32_t halves_of(uint32_t word, int half) {
  uint32_t pair;
  auto const bits = static_cast<uint16_t>(half == 0 ? word : word >> 16);
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(bits));
  return pair;
}

// What a lane reads at once of a block's row, which is many such parts.
template <class Traits, int kColumns, class Vector>
CUTLASS_DEVICE Vector row_part(uint8_t const* block, int row, int part) {
  constexpr int kOfVector = 16 / sizeof(Vector);
  int const vector = swizzled_vector<Traits::kBlockN, slab8(kColumns) / 2>(row, part / kOfVector);
  return reinterpret_cast<Vector const*>(block)[vector * kOfVector + part % kOfVector];
}

// The A operand: k index 2 q + {0, 1} and + {8, 9} of step 4 j + s is dims 4 s + {0 .. 3} of
// the row's vector of 16 numbers that has the index kVectors q + j. As lane q of four reads keys.
template <class Traits>
struct FewQuery {
  static constexpr int kVectors = Traits::kHeadDim / 64;
  uint32_t operand[Traits::kHeadDim / 16][4];
  float row_scale[kRowsPerThread] = {1.f, 1.f};  // what scores are to be multiplied with

  CUTLASS_DEVICE explicit FewQuery(uint16_t const* smem) {
    using Element = typename Traits::Element;
    int const lane = threadIdx.x % 32;
    CUTLASS_PRAGMA_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 2 * kVectors; ++i) {
        int const vector = swizzled_vector<Traits::kBlockM, Traits::kSlab>(
            lane / 4 + row * 8, lane % 4 * 2 * kVectors + i);
        uint4 const x = reinterpret_cast<uint4 const*>(smem)[vector];
        operand[2 * i][row] = x.x;
        operand[2 * i][row + 2] = x.y;
        operand[2 * i + 1][row] = x.z;
        operand[2 * i + 1][row + 2] = x.w;
      }
      if constexpr (!std::is_same_v<Element, FewElement>) to_halves<Element>(row);
    }
  }

 private:
  // The largest number of a row becomes 2^14 or more.
  template <class Element>
  CUTLASS_DEVICE void to_halves(int row) {
    float largest = 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Traits::kHeadDim / 8; ++i) {
      uint32_t const pair = operand[i / 2][row + i % 2 * 2];
      largest =
          fmaxf(largest, fmaxf(fabsf(unpack<Element>(pair, 0)), fabsf(unpack<Element>(pair, 1))));
    }
    int const exponent = static_cast<int>(__float_as_uint(quad_max(largest)) >> 23);
    int const up = min(2 * 127 + 14 - exponent, 253);  // at least 13
    float const factor = __uint_as_float(static_cast<uint32_t>(up) << 23);
    row_scale[row] = __uint_as_float(static_cast<uint32_t>(2 * 127 - up) << 23);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < Traits::kHeadDim / 8; ++i) {
      uint32_t& pair = operand[i / 2][row + i % 2 * 2];
      pair = pack<FewElement>(unpack<Element>(pair, 0) * factor, unpack<Element>(pair, 1) * factor);
    }
  }
};

// O (not yet divided by the row sums) and the softmax statistics of one work, of this warp's
// positions. O's column 8 j + n of the accumulators is column n V / 8 + j.
template <class Traits, class Out>
CUTLASS_DEVICE void mma_few(Params const& params, typename Traits::SharedStorage& storage,
                            typename Traits::ConsumerState& state, Work const& work,
                            Interval const (&rows)[kRowsPerThread], Softmax& softmax, Out& tOrO) {
  constexpr int kBlockN = Traits::kBlockN;
  constexpr int kVectors = Traits::kHeadDim / 64;
  constexpr int kBytesV = Traits::kHeadDimV / 8;  // of a value that a lane reads
  using VectorV = std::conditional_t<kBytesV % 16 == 0, uint4, uint2>;
  constexpr int kPartsV = kBytesV / sizeof(VectorV);
  int const lane = threadIdx.x % 32;
  int const first_key = threadIdx.x % 128 / 32 * 16;  // of this warp in a block
  int const lane_column = first_key + lane % 4 * 2;
  auto const release = [&](auto& barrier) {
    __syncwarp();
    if (elect_one_sync()) barrier.arrive();
  };

  clear(tOrO);
  storage.query_full.wait(state.query_phase);
  state.query_phase ^= 1;
  FewQuery<Traits> query(storage.query);
  release(storage.query_empty);
  bool const of_positions = params.key_scale.of_positions;
  if (!of_positions) {
    float const scale = *params.key_scale.at(work.index, work.head);
    for (float& x : query.row_scale) x *= scale;
  }
  bool const capped = params.score.cap_scale != 0.f;

  CUTLASS_PRAGMA_NO_UNROLL
  for (int n_block = work.begin; n_block < work.end; ++n_block) {
    storage.pipeline.full[state.ring.stage].wait(state.ring.phase);
    uint8_t const* const keys = storage.ring[state.ring.stage];
    Tensor scores = make_tensor<float>(Int<8>{});
    Tensor others = make_tensor<float>(Int<8>{});
    clear(scores);
    clear(others);
    CUTLASS_PRAGMA_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        uint4 const x = row_part<Traits, Traits::kHeadDim, uint4>(
            keys, first_key + half * 8 + lane / 4, lane % 4 * kVectors + j);
        uint32_t const words[] = {x.x, x.y, x.z, x.w};
        CUTLASS_PRAGMA_UNROLL
        for (int s = 0; s < 4; ++s) {
          auto const& a = query.operand[4 * j + s];
          // Two chains for each half, where registers allow: a step waits less.
          auto& c = s % 2 == 0 || Traits::kHeadDim > 192 ? scores : others;
          FewMma::fma(c(4 * half), c(4 * half + 1), c(4 * half + 2), c(4 * half + 3), a[0], a[1],
                      a[2], a[3], halves_of(words[s], 0), halves_of(words[s], 1), c(4 * half),
                      c(4 * half + 1), c(4 * half + 2), c(4 * half + 3));
        }
      }
    }
    float const* const scales = storage.load_scales()[state.ring.stage] + lane_column;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(scores); ++i) {
      scores(i) = (scores(i) + others(i)) * query.row_scale[fragment_row(i)];
    }
    if (of_positions) scale_columns(scales, scores);
    release(storage.pipeline.empty[state.ring.stage]);
    state.ring.advance();
    if (capped || n_block < work.full_begin || n_block >= work.full_end) {
      params.score.apply(scores);
      mask_scores(scores, rows, n_block * kBlockN + lane_column);
    }
    softmax.update_max(scores);
    softmax.template exponentiate<0, 1>(scores);
    bool const rescales = softmax.rescale[0] != 1.f || softmax.rescale[1] != 1.f;
    if (__builtin_expect(__any_sync(~0u, rescales), 0)) softmax.rescale_out(tOrO);
    auto const p = packed<FewElement>(scores);

    storage.pipeline.full[state.ring.stage].wait(state.ring.phase);
    uint8_t const* const values = storage.ring[state.ring.stage];
    int const seen_begin = work.positions.begin - n_block * kBlockN;
    int const seen_end = work.positions.end - n_block * kBlockN;
    CUTLASS_PRAGMA_UNROLL
    for (int part = 0; part < kPartsV; ++part) {
      constexpr int kWords = sizeof(VectorV) / 4;
      uint32_t words[4][kWords];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        int const key = lane_column + i / 2 * 8 + i % 2;
        auto x =
            row_part<Traits, Traits::kHeadDimV, VectorV>(values, key, lane / 4 * kPartsV + part);
        // What no row sees may be anything, and a probability of 0 does not silence NaN.
        if (key < seen_begin || key >= seen_end) x = VectorV{};
        words[i][0] = x.x;
        words[i][1] = x.y;
        if constexpr (kWords == 4) {
          words[i][2] = x.z;
          words[i][3] = x.w;
        }
      }
      CUTLASS_PRAGMA_UNROLL
      for (int word = 0; word < kWords; ++word) {
        CUTLASS_PRAGMA_UNROLL
        for (int pair = 0; pair < 2; ++pair) {
          // Bytes 2 pair and 2 pair + 1 of two keys, key by key.
          int const order = pair == 0 ? 0x5140 : 0x7362;
          uint32_t const low = __byte_perm(words[0][word], words[1][word], order);
          uint32_t const high = __byte_perm(words[2][word], words[3][word], order);
          CUTLASS_PRAGMA_UNROLL
          for (int i = 0; i < 2; ++i) {
            int const at = 4 * ((part * kWords + word) * 4 + 2 * pair + i);
            FewMma::fma(tOrO(at), tOrO(at + 1), tOrO(at + 2), tOrO(at + 3), p(0), p(1), p(2), p(3),
                        halves_of(low, i), halves_of(high, i), tOrO(at), tOrO(at + 1), tOrO(at + 2),
                        tOrO(at + 3));
          }
        }
      }
    }
    release(storage.pipeline.empty[state.ring.stage]);
    state.ring.advance();
  }
}

// A row of a tile, of which a lane has four columns from `column` on.
template <class Traits>
CUTLASS_DEVICE void store_row(Params const& params, Work const& work, int row, int64_t index,
                              int column, float4 out, float lse) {
  if (work.slot == Work::kNone) {
    float const share = add_sink(params, index, &lse);
    store_merged<typename Traits::Element>(params, index, column, out, share, lse);
    return;
  }
  int64_t const place = (int64_t{blockIdx.x} * params.slots + work.slot) * params.slot_rows + row;
  *reinterpret_cast<float4*>(params.partial_out + place * params.head_dim_v + column) = out;
  if (column == 0) params.partial_lse[place] = lse;
}

// The end of a work: the warps' parts become one, which is stored.
template <class Traits, class Out>
CUTLASS_DEVICE void store_few(Params const& params, typename Traits::SharedStorage& storage,
                              Work const& work, bool lacks_page,
                              Interval const (&rows)[kRowsPerThread], Softmax& softmax, Out& tOrO) {
  constexpr int kWarps = 4;
  constexpr int kVectors = Traits::kHeadDimV / 4;
  int const warp = threadIdx.x % 128 / 32;
  int const lane = threadIdx.x % 32;
  auto& few = storage.few;
  auto const meet = [] {
    cutlass::arch::NamedBarrier::sync(128, barrier_id(NamedBarrier::kWarpsMet, 0));
  };
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row) {
    float const sum = quad_sum(softmax.row_sum[row]);
    if (lane % 4 == 0) {
      few.statistics[warp][row * 8 + lane / 4] = {softmax.row_max[row], softmax.offset[row], sum};
    }
  }
  meet();
  auto const of_warp = [&](int w, int row) -> auto const& {
    return few.statistics[w][row * 8 + lane / 4];
  };
  Tensor maxima = make_tensor<float>(Int<4 * kWarps>{});
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < size(maxima); ++i) maxima(i) = of_warp(i / 4, fragment_row(i)).maximum;
  softmax.update_max(maxima);
  softmax.rescale_out(tOrO);
  CUTLASS_PRAGMA_UNROLL
  for (int row = 0; row < kRowsPerThread; ++row) {
    float sum = 0.f;
    CUTLASS_PRAGMA_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      auto const& x = of_warp(w, row);
      sum += x.sum * exp2f(x.offset - softmax.offset[row]);
    }
    softmax.row_sum[row] = lane % 4 == 0 ? sum : 0.f;
  }
  float lse[kRowsPerThread];
  finish<FewElement>(params, work, lacks_page, rows, softmax, tOrO, lse);
  SharedTile<Traits> const shared(storage, params);
  if (params.cluster > 0) shared.wait_until_others_run();

  OutRow const tile{work.sequence.first_row, work.sequence.count, work.head, work.tile};
  // Vectors of 16 bytes are permuted, so that lanes write and read as many banks as there are.
  auto const place = [](int row, int vector) { return vector ^ (vector / 8 % 4 + row % 2 * 4); };
  CUTLASS_PRAGMA_UNROLL
  for (int half = 0; half < kRowsPerThread; ++half) {  // of the rows
    if (half * 8 >= params.slot_rows) break;
    int const row = lane / 4;
    if (lane % 4 == 0 && warp == 0) few.lse[row] = lse[half];
    CUTLASS_PRAGMA_UNROLL
    for (int n = 0; n < 2; ++n) {
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < Traits::kHeadDimV / 8; j += 4) {
        int const at = 4 * j + 2 * half + n;
        int const vector = ((lane % 4 * 2 + n) * (Traits::kHeadDimV / 8) + j) / 4;
        few.out[warp][row][place(row, vector)] =
            float4{tOrO(at), tOrO(at + 4), tOrO(at + 8), tOrO(at + 12)};
      }
    }
    meet();
    CUTLASS_PRAGMA_NO_UNROLL
    for (int r = warp; r < 8; r += kWarps) {
      int64_t const index =
          tile.index(half * 8 + r, Traits::kBlockM, params.tiles.group, params.num_heads_q);
      if (index < 0) break;
      CUTLASS_PRAGMA_NO_UNROLL
      for (int vector = lane; vector < kVectors; vector += 32) {
        float4 out{0.f, 0.f, 0.f, 0.f};
        CUTLASS_PRAGMA_UNROLL
        for (int w = 0; w < kWarps; ++w) {
          float4 const x = few.out[w][r][place(r, vector)];
          out = {out.x + x.x, out.y + x.y, out.z + x.z, out.w + x.w};
        }
        if (params.cluster > 0) {
          shared.send_out(r, vector * 4, {out.x, out.y, out.z, out.w});
          if (vector < params.cluster) shared.send_lse(r, vector, few.lse[r]);
        } else if (vector * 4 < params.head_dim_v) {
          store_row<Traits>(params, work, half * 8 + r, index, vector * 4, out, few.lse[r]);
        }
      }
    }
    meet();
  }
  if (params.cluster > 0) shared.join(params, work);
}

}  // namespace jax_fa3::decode
