#include <cutlass/arch/memory_sm80.h>
#include <cutlass/bfloat16.h>

#include <algorithm>
#include <cute/arch/mma_sm80.hpp>

#include "common/element.h"
#include "common/fragment.h"
#include "common/launch.h"
#include "fp8/quantize.h"
#include "fp8/softmax.h"
#include "plan.h"

namespace jax_fa3::fp8 {
namespace {

// A warp's piece is 8 rows by 32 columns; lane 4 r + q has the 8 columns from 8 q on of row r.
constexpr int kRowsOfPiece = 8;
constexpr int kColumnsOfPiece = 32;
constexpr int kPieces = 8;         // of a warp
constexpr int kThreadsOfSm = 512;  // of all its CTAs
constexpr float kLargest = 448.f;

template <int kAcross>  // pieces that make a row
constexpr int kThreads = kBlock / kRowsOfPiece * kAcross / kPieces * 32;

// The Hadamard matrix over bits 0, 2, 3 and 4 of a column's number, as operand B of two
// mma.m16n8k16. Its row 8 w + 2 q + i is column 8 q + 4 w + i of a piece, or that + 2: so the four
// words of a lane are operand A as they stand, with bit 1 among the 16 rows.
template <class Element>
struct Matrix16 {
  uint32_t words[2][2];  // [half of the results][w]

  // With a transform of 16 columns, bit 4 is left out.
  __device__ explicit Matrix16(int transform) {
    int const lane = threadIdx.x % 32;
    int const bits = transform < 32 ? 7 : 15;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        float entries[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int const row = lane % 4 << 2 | w << 1 | i;  // bits 4, 3, 2, 0 of its column
          int const column = lane / 8 << 2 | half << 1 | lane / 4 % 2;
          bool const zero = ((row ^ column) & ~bits) != 0;
          entries[i] = zero ? 0.f : __popc(row & column & bits) % 2 == 0 ? 1.f : -1.f;
        }
        words[half][w] = pack<Element>(entries[0], entries[1]);
      }
    }
  }

  // A lane's 8 columns.
  __device__ void multiply(uint4 const& x, float (&out)[8]) const {
    using Mma = std::conditional_t<std::is_same_v<Element, cutlass::bfloat16_t>,
                                   cute::SM80_16x8x16_F32BF16BF16F32_TN,
                                   cute::SM80_16x8x16_F32F16F16F32_TN>;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* const part = out + 4 * half;
      Mma::fma(part[0], part[1], part[2], part[3], x.x, x.y, x.z, x.w, words[half][0],
               words[half][1], 0.f, 0.f, 0.f, 0.f);
    }
  }
};

__device__ __forceinline__ void butterfly(float& a, float& b) {
  float const sum = a + b;
  b = a - b;
  a = sum;
}

// The rest of the Walsh-Hadamard transform of each `size` columns, a power of two from 16 on.
template <int kAcross>
__device__ __forceinline__ void finish_hadamard(float (&x)[kPieces][8], int size) {
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if ((i & 2) == 0) butterfly(x[piece][i], x[piece][i + 2]);
    }
  }
#pragma unroll
  for (int step = 1; step < kAcross; step *= 2) {
    if (size >= 2 * step * kColumnsOfPiece) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if ((piece & step) == 0) butterfly(x[piece][i], x[piece + step][i]);
        }
      }
    }
  }
}

// A CTA takes one block of rows of one head after the other. The next block's numbers come while it
// works, each into the shared memory of the thread that wants it.
template <class Element, int kAcross>
__global__ void __launch_bounds__(kThreads<kAcross>, kThreadsOfSm / kThreads<kAcross>)
    quantize_kernel(__grid_constant__ Quantize const p) {
  constexpr int kRowsOfWarp = kPieces / kAcross * kRowsOfPiece;
  constexpr int kWarps = kThreads<kAcross> / 32;
  extern __shared__ uint4 arrived[];    // [2 blocks][piece][thread]
  __shared__ uint4 flips[kAcross * 4];  // sign bits, of 8 columns each
  __shared__ float of_warp[2][kWarps];
  int const lane = threadIdx.x % 32;
  int const warp = threadIdx.x / 32;
  int const num_blocks = (p.seqlen + kBlock - 1) / kBlock;
  int const count = num_blocks * p.num_heads * p.batch;
  int64_t const stride = int64_t{p.num_heads} * p.head_dim;  // of rows

  // Of this thread, its piece 0.
  struct Place {
    int batch, row;
    int64_t offset;
  };
  int const first_column = lane % 4 * 8;
  auto const place_of = [&](int number) {
    int const rest = number / p.num_heads;
    int const batch = rest / num_blocks;
    int const row = rest % num_blocks * kBlock + warp * kRowsOfWarp + lane / 4;
    int64_t const offset = (int64_t{batch} * p.seqlen + row) * stride +
                           number % p.num_heads * p.head_dim + first_column;
    return Place{batch, row, offset};
  };
  auto const row_of = [](int piece) { return piece / kAcross * kRowsOfPiece; };  // behind piece 0's
  auto const column_of = [](int piece) { return piece % kAcross * kColumnsOfPiece; };
  auto const exists = [&](Place const& place, int piece, int length) {
    return first_column + column_of(piece) < p.head_dim && place.row + row_of(piece) < length;
  };
  auto const slot_of = [&](int stage, int piece) {
    return arrived + (stage * kPieces + piece) * kThreads<kAcross> + threadIdx.x;
  };
  auto const load = [&](Place const& place, int stage) {
    int length = p.seqlen;
    if (p.lengths != nullptr) length = min(max(p.lengths[place.batch], 0), p.seqlen);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
          slot_of(stage, piece),
          static_cast<uint16_t const*>(p.x) + place.offset + row_of(piece) * stride +
              column_of(piece),
          exists(place, piece, length));
    }
  };

  Place next = place_of(blockIdx.x);
  load(next, 0);
  cutlass::arch::cp_async_fence();
  if (p.signs != nullptr && threadIdx.x < kAcross * 4) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int const column = threadIdx.x * 8 + 2 * i;
      bool const counts = column < p.head_dim;
      uint32_t const even = counts ? __float_as_uint(p.signs[column]) : 0;
      uint32_t const odd = counts ? __float_as_uint(p.signs[column + 1]) : 0;
      words[i] = (even & 0x80000000u) >> 16 | (odd & 0x80000000u);
    }
    flips[threadIdx.x] = uint4{words[0], words[1], words[2], words[3]};
  }
  __syncthreads();
  Matrix16<Element> const matrix(p.transform);

  int stage = 0;
  for (int number = blockIdx.x; number < count; number += gridDim.x, stage ^= 1) {
    Place const place = next;
    if (number + gridDim.x < count) {
      next = place_of(number + gridDim.x);
      load(next, stage ^ 1);
    }
    cutlass::arch::cp_async_fence();
    cutlass::arch::cp_async_wait<1>();
    asm volatile("" ::: "memory");  // that alone does not keep the reads behind it

    float x[kPieces][8];
    float norm = 1.f;
    if (p.signs != nullptr) {
#pragma unroll
      for (int across = 0; across < kAcross; ++across) {
        uint4 const flip = flips[across * 4 + lane % 4];
#pragma unroll
        for (int piece = across; piece < kPieces; piece += kAcross) {
          uint4 const words = *slot_of(stage, piece);
          matrix.multiply(
              uint4{words.x ^ flip.x, words.y ^ flip.y, words.z ^ flip.z, words.w ^ flip.w},
              x[piece]);
        }
      }
      finish_hadamard<kAcross>(x, p.transform);
      norm = rsqrtf(static_cast<float>(p.transform));
    } else {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        uint4 const loaded = *slot_of(stage, piece);
        uint32_t const words[] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) x[piece][i] = unpack<Element>(words[i / 2], i % 2);
      }
    }

    // As integers, three at a time: signed ones for the greatest positive number, unsigned ones for
    // the negative number farthest from 0. A NaN is beyond all others.
    constexpr int kChains = 4;  // side by side, for a maximum waits for the one before it
    int above[kChains] = {};
    unsigned below[kChains] = {};
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        int const a = __float_as_int(x[piece][i]);
        int const b = __float_as_int(x[piece][i + 1]);
        above[i / 2] = __vimax3_s32(above[i / 2], a, b);
        below[i / 2] = __vimax3_u32(below[i / 2], a, b);
      }
    }
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < kChains; ++i) {
      largest = max_or_nan(largest, __int_as_float(above[i]));
      largest = max_or_nan(largest, fabsf(__uint_as_float(below[i])));
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      largest = max_or_nan(largest, __shfl_xor_sync(~0u, largest, step));
    }
    if (lane == 0) of_warp[stage][warp] = largest;
    __syncthreads();
#pragma unroll
    for (int other = 0; other < kWarps; ++other) {
      largest = max_or_nan(largest, of_warp[stage][other]);
    }

    // Not below the smallest normal number, whose inverse is still finite.
    largest *= norm;
    float const scale = largest == 0.f ? 1.f : fmaxf(largest * (1 / kLargest), 0x1p-126f);
    float const checked = largest < INFINITY ? scale : NAN;  // a comparison with NaN is false
    float const factor = norm * __frcp_rn(checked);
    if (threadIdx.x == 0) p.scales[number] = checked;  // [b, blocks, n], as `number` counts them
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      uint32_t packed[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float const* const four = &x[piece][4 * i];
        packed[i] =
            pack_e4m3(four[0] * factor, four[1] * factor, four[2] * factor, four[3] * factor);
      }
      if (exists(place, piece, p.seqlen)) {
        *reinterpret_cast<uint2*>(p.out + place.offset + row_of(piece) * stride +
                                  column_of(piece)) = uint2{packed[0], packed[1]};
      }
    }
  }
}

template <class Element, int kAcross>
cudaError_t launch_size(Quantize problem, cudaStream_t stream) {
  int num_sms = 0;
  JAX_FA3_RETURN_IF_ERROR(count_sms(&num_sms));
  int64_t const blocks =
      int64_t{ceil_div(problem.seqlen, kBlock)} * problem.num_heads * problem.batch;
  if (blocks == 0) return cudaSuccess;
  int64_t const ctas = std::min<int64_t>(blocks, num_sms * (kThreadsOfSm / kThreads<kAcross>));
  int const bytes = 2 * kPieces * kThreads<kAcross> * static_cast<int>(sizeof(uint4));
  return launch_kernel(quantize_kernel<Element, kAcross>, ctas, kThreads<kAcross>, bytes, problem,
                       stream);
}

template <class Element>
cudaError_t launch_dtype(Quantize const& problem, cudaStream_t stream) {
  if (problem.head_dim <= 64) return launch_size<Element, 2>(problem, stream);
  if (problem.head_dim <= 128) return launch_size<Element, 4>(problem, stream);
  return launch_size<Element, 8>(problem, stream);
}

}  // namespace

cudaError_t launch(Quantize const& problem, cudaStream_t stream) {
  if (problem.dtype == DType::kBFloat16) {
    return launch_dtype<ElementOf<DType::kBFloat16>>(problem, stream);
  }
  if (problem.dtype == DType::kFloat16) {
    return launch_dtype<ElementOf<DType::kFloat16>>(problem, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_fa3::fp8
