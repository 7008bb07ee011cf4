// A dense bias, [1 or b, 1 or n, 1 or t, s], on its way to the scores: a warp of the producer loads
// each consumer warpgroup what its next block of scores needs, slab by slab, and the consumers read
// a slab in the order of their accumulators, which ldmatrix gives for 16 bits as it is.
//
// A slab is 64 query rows of 128 bytes: 64 keys in 16 bits, 32 in fp32. A dimension that is
// broadcast has one coordinate, and of a bias that is the same for all rows a slab's first row
// alone is loaded, and read for all.
#pragma once

#include <cute/arch/copy_sm75.hpp>

#include "common/fragment.h"
#include "common/tma.h"

namespace jax_fa3 {

inline constexpr int kBiasRows = 64;              // of a slab
inline constexpr int kBiasSlab = kBiasRows * 64;  // in elements of 16 bits
inline constexpr int kBiasSlabBytes = kBiasSlab * 2;

struct Bias {
  CUtensorMap map;  // its elements as 16 bits: two for each of fp32
  bool is_fp32;
  bool of_batch, of_head, of_row;
  float factor;   // of q.k: softmax_scale
  uint32_t zero;  // 0, which the compiler does not know

  CUTLASS_DEVICE int slabs(int keys) const { return ((is_fp32 ? 2 : 1) * keys + 63) / 64; }
};

inline cudaError_t make_bias(Bias* bias, DenseBias const& dense, int batch, int num_heads,
                             int seqlen_q, float factor) {
  int const width = dense.is_fp32 ? 2 : 1;
  Operand const words{dense.data, dense.batch_stride * width, dense.row_stride * width,
                      dense.head_stride * width};
  bias->is_fp32 = dense.is_fp32;
  bias->of_batch = dense.batch_stride != 0;
  bias->of_head = dense.head_stride != 0;
  bias->of_row = dense.row_stride != 0;
  bias->factor = factor;
  bias->zero = 0;
  return make_tensor_map(&bias->map, words, dense.columns * width, bias->of_row ? seqlen_q : 1,
                         bias->of_head ? num_heads : 1, bias->of_batch ? batch : 1, 64,
                         bias->of_row ? kBiasRows : 1);
}

// A warpgroup's ring of slabs.
template <int kStages>
struct BiasRing {
  Pipeline<kStages> pipeline;

  CUTLASS_DEVICE void init() { pipeline.init(4); }  // warps
};

// By one thread: the slabs of a block of kKeys keys for 64 query rows.
template <int kKeys, int kStages>
CUTLASS_DEVICE void load_bias(Bias const& bias, BiasRing<kStages>& ring, uint16_t* slabs,
                              PipelineState<kStages>& state, int first_key, RowCoord const& rows) {
  int const count = bias.slabs(kKeys);
  int const column = first_key * (bias.is_fp32 ? 2 : 1);
  for (int slab = 0; slab < count; ++slab) {
    FullBarrier& full = ring.pipeline.full[state.stage];
    ring.pipeline.empty[state.stage].wait(state.phase ^ 1);
    full.arrive_and_expect_tx(bias.of_row ? kBiasSlabBytes : 128);
    cute::SM90_TMA_LOAD_4D::copy(&bias.map, reinterpret_cast<uint64_t*>(&full),
                                 static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                 slabs + state.stage * kBiasSlab, column + slab * 64,
                                 bias.of_row ? rows.row : 0, bias.of_head ? rows.head : 0,
                                 bias.of_batch ? rows.batch : 0);
    state.advance();
  }
}

namespace detail {

// `read` reads one slab at a shared-memory address, when it has landed, and returns a word that all
// of its loads have part in. Loads wait behind what wgmmas in flight read, a microsecond and more,
// and an arrival does not wait for loads: so where it arrives depends on what they have found.
// (Else a slab that is asked for at once is there before they are done.)
template <int kStages, class Read>
CUTLASS_DEVICE void with_slab(Bias const& bias, BiasRing<kStages>& ring, uint16_t const* slabs,
                              PipelineState<kStages>& state, Read const& read) {
  ring.pipeline.full[state.stage].wait(state.phase);
  uint32_t const found = read(cute::cast_smem_ptr_to_uint(slabs + state.stage * kBiasSlab));
  __syncwarp();
  if (threadIdx.x % 32 == 0) ring.pipeline.empty[state.stage + (found & bias.zero)].arrive();
  state.advance();
}

CUTLASS_DEVICE float2 load_shared_float2(uint32_t address) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address));
  return pair;
}
CUTLASS_DEVICE float load_shared_float(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address));
  return x;
}
template <bool kTransposed>
CUTLASS_DEVICE void load_matrices(uint32_t address, uint32_t (&x)[4]) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.x4.trans.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
  } else {
    asm volatile("ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
  }
}

// Eight elements of an accumulator, from the i-th on.
template <class Element, class Scores>
CUTLASS_DEVICE void add_matrices(uint32_t const (&x)[4], float factor, int i, Scores& scores) {
  CUTLASS_PRAGMA_UNROLL
  for (int e = 0; e < 8; ++e) {
    scores(i + e) = fmaf(scores(i + e), factor, unpack<Element>(x[e / 2], e % 2));
  }
}

}  // namespace detail

// Scores [64 query rows, keys] become factor * score + bias.
template <class Element, int kStages, class Scores>
CUTLASS_DEVICE void add_bias(Bias const& bias, BiasRing<kStages>& ring, uint16_t const* slabs,
                             PipelineState<kStages>& state, Scores& scores) {
  constexpr int kKeys = decltype(size(scores))::value * 2;
  static_assert(kKeys % 16 == 0);
  int const lane = threadIdx.x % 32;
  int const warp_row = threadIdx.x % 128 / 32 * 16;
  if (!bias.is_fp32) {
    int const row = bias.of_row ? warp_row + lane % 16 : 0;
    uint32_t const place = row * 128 + (lane / 16 ^ row % 8) * 16;
    CUTLASS_PRAGMA_UNROLL
    for (int first = 0; first < kKeys; first += 64) {
      detail::with_slab(bias, ring, slabs, state, [&](uint32_t slab) {
        uint32_t found = 0;
        CUTLASS_PRAGMA_UNROLL
        for (int key = 0; key < cute::min(64, kKeys - first); key += 16) {
          uint32_t x[4];
          detail::load_matrices<false>((slab + place) ^ key * 2, x);
          detail::add_matrices<Element>(x, bias.factor, (first + key) / 2, scores);
          found ^= x[0];
        }
        return found;
      });
    }
  } else {
    int const row = bias.of_row ? warp_row + lane / 4 : 0;
    int const next_row = bias.of_row ? 8 * 128 : 0;
    uint32_t const place = row * 128 + (lane % 4 / 2 ^ row % 8) * 16 + lane % 2 * 8;
    CUTLASS_PRAGMA_UNROLL
    for (int first = 0; first < kKeys; first += 32) {
      detail::with_slab(bias, ring, slabs, state, [&](uint32_t slab) {
        uint32_t found = 0;
        CUTLASS_PRAGMA_UNROLL
        for (int key = 0; key < cute::min(32, kKeys - first); key += 8) {
          CUTLASS_PRAGMA_UNROLL
          for (int r = 0; r < kRowsPerThread; ++r) {
            uint32_t const address = ((slab + place) ^ key * 4) + r * next_row;
            float2 const x = detail::load_shared_float2(address);
            int const i = (first + key) / 2 + r * 2;
            scores(i) = fmaf(scores(i), bias.factor, x.x);
            scores(i + 1) = fmaf(scores(i + 1), bias.factor, x.y);
            found ^= __float_as_uint(x.x);
          }
        }
        return found;
      });
    }
  }
}

// The same of scores [64 keys, 64 query rows].
template <class Element, int kStages, class Scores>
CUTLASS_DEVICE void add_bias_transposed(Bias const& bias, BiasRing<kStages>& ring,
                                        uint16_t const* slabs, PipelineState<kStages>& state,
                                        Scores& scores) {
  static_assert(decltype(size(scores))::value == kBiasRows / 2);
  int const lane = threadIdx.x % 32;
  int const warp = threadIdx.x % 128 / 32;
  int const row_bytes = bias.of_row ? 128 : 0;
  if (!bias.is_fp32) {
    int const row = bias.of_row ? lane / 16 * 8 + lane % 8 : 0;
    uint32_t const place = row * 128 + (warp * 2 + lane / 8 % 2 ^ row % 8) * 16;
    detail::with_slab(bias, ring, slabs, state, [&](uint32_t slab) {
      uint32_t found = 0;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(scores); i += 8) {  // 16 query rows
        uint32_t x[4];
        detail::load_matrices<true>(slab + place + i * 2 * row_bytes, x);
        detail::add_matrices<Element>(x, bias.factor, i, scores);
        found ^= x[0];
      }
      return found;
    });
  } else {
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      detail::with_slab(bias, ring, slabs, state, [&](uint32_t slab) {
        uint32_t found = 0;
        if (warp / 2 != half) return found;
        CUTLASS_PRAGMA_UNROLL
        for (int e = 0; e < 4; ++e) {
          int const row = bias.of_row ? lane % 4 * 2 + e % 2 : 0;
          int const key = warp % 2 * 16 + fragment_row(e) * 8 + lane / 4;
          uint32_t const place = row * 128 + (key / 4 ^ row) * 16 + key % 4 * 4;
          CUTLASS_PRAGMA_UNROLL
          for (int i = e; i < size(scores); i += 4) {
            float const x = detail::load_shared_float(slab + place + i / 4 * 8 * row_bytes);
            scores(i) = fmaf(scores(i), bias.factor, x);
            found ^= __float_as_uint(x);
          }
        }
        return found;
      });
    }
  }
}

}  // namespace jax_fa3
