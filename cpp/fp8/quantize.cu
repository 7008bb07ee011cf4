// The kernel of quantize.h.
#include <cutlass/arch/memory_sm80.h>
#include <cutlass/bfloat16.h>

#include <algorithm>

#include "common/element.h"
#include "common/fragment.h"
#include "common/launch.h"
#include "fp8/hadamard.h"
#include "fp8/quantize.h"
#include "fp8/softmax.h"
#include "fp8/transpose.h"
#include "plan.h"

namespace jax_fa3::fp8 {
namespace {

constexpr int kThreadsPerSm = 512;  // of all its CTAs
constexpr float kLargestE4m3 = 448.f;

template <int kFragmentsPerRow>
constexpr int kThreads = kBlock / kFragmentRows * kFragmentsPerRow / kFragments * 32;

// Where a thread's elements are: in global memory, and on their way from there in shared memory, in
// slots that no other thread uses.
template <int kFragmentsPerRow>
struct Tiling {
  static constexpr int kWarpRows = kFragments / kFragmentsPerRow * kFragmentRows;
  Quantize const& p;
  uint4* const loaded;  // shared memory, [2 stages][kFragments][thread]
  int const lane = threadIdx.x % 32;
  int const warp = threadIdx.x / 32;
  int const blocks_per_head = (p.seqlen + kBlock - 1) / kBlock;
  int const num_blocks = blocks_per_head * p.num_heads * p.batch;
  int64_t const row_stride = int64_t{p.num_heads} * p.head_dim;
  int const first_column = lane % 4 * 8;  // of fragment 0

  // A block of rows of one head, and this thread's row of fragment 0 in it.
  struct Coord {
    int batch, row;
    int64_t offset;
  };
  __device__ Coord coord(int block) const {
    int const rest = block / p.num_heads;
    int const batch = rest / blocks_per_head;
    int const row = rest % blocks_per_head * kBlock + warp * kWarpRows + lane / 4;
    int64_t const offset = (int64_t{batch} * p.seqlen + row) * row_stride +
                           block % p.num_heads * p.head_dim + first_column;
    return Coord{batch, row, offset};
  }

  // From fragment 0 to another.
  __device__ static int rows_to(int fragment) {
    return fragment / kFragmentsPerRow * kFragmentRows;
  }
  __device__ static int columns_to(int fragment) {
    return fragment % kFragmentsPerRow * kFragmentColumns;
  }
  __device__ int64_t offset(Coord const& coord, int fragment) const {
    return coord.offset + rows_to(fragment) * row_stride + columns_to(fragment);
  }
  __device__ bool exists(Coord const& coord, int fragment, int length) const {
    return first_column + columns_to(fragment) < p.head_dim &&
           coord.row + rows_to(fragment) < length;
  }
  // Where rows of a batch entry begin not to count.
  __device__ int length(int batch) const {
    return p.lengths == nullptr ? p.seqlen : min(max(p.lengths[batch], 0), p.seqlen);
  }
  __device__ uint4* slot(int stage, int fragment) const {
    return loaded + (stage * kFragments + fragment) * kThreads<kFragmentsPerRow> + threadIdx.x;
  }
  using Tile = ValueTile<kFragmentsPerRow * kFragmentColumns / 4>;
  static_assert(sizeof(uint32_t) * Tile::kWords <=
                sizeof(uint4) * kFragments * kThreads<kFragmentsPerRow>);

  // Starts to load the thread's elements, rows past the length as 0.
  __device__ void load(Coord const& coord, int stage) const {
    int const length = this->length(coord.batch);
#pragma unroll
    for (int fragment = 0; fragment < kFragments; ++fragment) {
      cutlass::arch::cp_async_zfill<16, cutlass::arch::CacheOperation::Global>(
          slot(stage, fragment), static_cast<uint16_t const*>(p.x) + offset(coord, fragment),
          exists(coord, fragment, length));
    }
  }

  // Stores 8 e4m3 elements.
  __device__ void store(Coord const& coord, int fragment, uint2 const& elements) const {
    if (exists(coord, fragment, p.seqlen)) {
      *reinterpret_cast<uint2*>(p.out + offset(coord, fragment)) = elements;
    }
  }

  // Stores a block of a head, transposed, by way of the memory of a stage that all have read.
  __device__ __forceinline__ void store_transposed(int block, int batch, int stage,
                                                   uint2 const (&elements)[kFragments],
                                                   bool valid) const {
    static_assert(kThreads<kFragmentsPerRow> == Tile::kVec4s * 8);
    int thread;  // read anew: else ptxas keeps what is computed of it in registers throughout
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    auto* const tile =
        reinterpret_cast<uint32_t*>(loaded + stage * kFragments * kThreads<kFragmentsPerRow>);
#pragma unroll
    for (int fragment = 0; fragment < kFragments; ++fragment) {
      int const key = thread / 32 * kWarpRows + thread % 32 / 4 + rows_to(fragment);
      int const vec4 = thread % 4 * 2 + columns_to(fragment) / 4;
      *reinterpret_cast<uint2*>(tile + Tile::index(key, vec4)) =
          valid ? elements[fragment] : uint2{0, 0};
    }
    __syncthreads();
    int64_t const row_bytes = int64_t{blocks_per_head} * kBlock;
    int64_t const head = int64_t{batch} * p.num_heads + block % p.num_heads;
    uint8_t* const out = p.transposed + head * p.head_dim * row_bytes +
                         int64_t{block / p.num_heads % blocks_per_head} * kBlock;
    store_columns<Tile::kVec4s>(tile, thread % 8, thread / 8, p.head_dim, row_bytes, out);
    __syncthreads();  // before the memory is a stage again
  }
};

// The largest absolute value of many numbers, NaN if one is NaN. VIMNMX3 takes the maximum of three
// integers in one instruction: of signed ones for the greatest positive number, of unsigned ones
// for the negative number farthest from 0. As an integer a NaN is beyond all other numbers.
struct MaxAbs {
  static constexpr int kChains = 4;  // independent maxima: no instruction waits for the last one
  int above[kChains] = {};
  unsigned below[kChains] = {};

  __device__ __forceinline__ void add(int chain, float x, float y) {
    int const a = __float_as_int(x);
    int const b = __float_as_int(y);
    above[chain] = __vimax3_s32(above[chain], a, b);
    below[chain] = __vimax3_u32(below[chain], a, b);
  }
  __device__ __forceinline__ float result() const {
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < kChains; ++i) {
      largest = max_or_nan(largest, __int_as_float(above[i]));
      largest = max_or_nan(largest, fabsf(__uint_as_float(below[i])));
    }
    return largest;
  }
};

// The largest of all threads' numbers; all call it. `of_warp` is shared memory that nobody else
// uses until they call it again with another one.
template <class Tiling, int kWarps>
__device__ __forceinline__ float max_of_cta(Tiling const& tiling, float largest,
                                            float (&of_warp)[kWarps]) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    largest = max_or_nan(largest, __shfl_xor_sync(~0u, largest, step));
  }
  if (tiling.lane == 0) of_warp[tiling.warp] = largest;
  __syncthreads();
#pragma unroll
  for (int other = 0; other < kWarps; ++other) largest = max_or_nan(largest, of_warp[other]);
  return largest;
}

// What is to be subtracted from transformed rows that are not yet multiplied by `norm`: the
// transform of a mean, to shared memory. All threads call it.
template <int kFragmentsPerRow>
__device__ __forceinline__ void load_mean(Quantize const& p, int vector, float* mean) {
  constexpr int kColumns = kFragmentsPerRow * kFragmentColumns;
  static_assert(kThreads<kFragmentsPerRow> >= kColumns);
  int const column = threadIdx.x;
  __syncthreads();  // all have read the last one
  float own = 0.f;
  if (column < p.head_dim) own = __ldg(p.mean + int64_t{vector} * p.head_dim + column);
  if (p.signs != nullptr && column < p.head_dim) own *= p.signs[column];
  if (column < kColumns) mean[column] = own;
  __syncthreads();
  if (p.signs == nullptr) return;
#pragma unroll 1
  for (int step = 1; step < p.transform; step *= 2) {
    float const other = column < kColumns ? mean[column ^ step] : 0.f;
    __syncthreads();
    own = (column & step) == 0 ? own + other : other - own;
    if (column < kColumns) mean[column] = own;
    __syncthreads();
  }
}

// A CTA takes one block of rows of one head after the other. While it works on one, cp.async brings
// the next one.
//
// The loops over x stand in the kernel itself: handed to functions as a whole, x makes for another
// order of instructions in two of the six instances.
template <class Element, int kFragmentsPerRow>
__global__ void __launch_bounds__(kThreads<kFragmentsPerRow>,
                                  kThreadsPerSm / kThreads<kFragmentsPerRow>)
    quantize_kernel(__grid_constant__ Quantize const p) {
  extern __shared__ uint4 loaded[];
  __shared__ uint4 signs[kFragmentsPerRow * 4];  // of 8 columns each
  __shared__ alignas(16) float mean[kFragmentsPerRow * kFragmentColumns];
  int mean_of = -1;  // what `mean` is of: batch entry * heads + head
  __shared__ float of_warp[2][kThreads<kFragmentsPerRow> / 32];
  Tiling<kFragmentsPerRow> const tiling{p, loaded};

  auto next = tiling.coord(blockIdx.x);
  tiling.load(next, 0);
  cutlass::arch::cp_async_fence();
  if (p.signs != nullptr && threadIdx.x < kFragmentsPerRow * 4) {
    signs[threadIdx.x] = sign_bits(p, threadIdx.x * 8);
  }
  __syncthreads();
  Hadamard16<Element> const hadamard(p.transform);

  int stage = 0;
  for (int block = blockIdx.x; block < tiling.num_blocks; block += gridDim.x, stage ^= 1) {
    auto const coord = next;
    if (block + gridDim.x < tiling.num_blocks) {
      next = tiling.coord(block + gridDim.x);
      tiling.load(next, stage ^ 1);
    }
    cutlass::arch::cp_async_fence();
    cutlass::arch::cp_async_wait<1>();
    asm volatile("" ::: "memory");  // cp_async_wait alone lets the compiler move reads before it

    float x[kFragments][8];
    float norm = 1.f;  // what makes the transform orthogonal
    if (p.signs != nullptr) {
#pragma unroll
      for (int across = 0; across < kFragmentsPerRow; ++across) {
        uint4 const sign = signs[across * 4 + tiling.lane % 4];
#pragma unroll
        for (int fragment = across; fragment < kFragments; fragment += kFragmentsPerRow) {
          uint4 const pairs = *tiling.slot(stage, fragment);
          hadamard.multiply(
              uint4{pairs.x ^ sign.x, pairs.y ^ sign.y, pairs.z ^ sign.z, pairs.w ^ sign.w},
              x[fragment]);
        }
      }
      finish_hadamard<kFragmentsPerRow>(x, p.transform);
      norm = rsqrtf(static_cast<float>(p.transform));
    } else {
#pragma unroll
      for (int fragment = 0; fragment < kFragments; ++fragment) {
        uint4 const own = *tiling.slot(stage, fragment);
        uint32_t const pairs[] = {own.x, own.y, own.z, own.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) x[fragment][i] = unpack<Element>(pairs[i / 2], i % 2);
      }
    }
    if (p.mean != nullptr) {
      int const vector = coord.batch * p.num_heads + block % p.num_heads;
      if (vector != mean_of) {
        load_mean<kFragmentsPerRow>(p, vector, mean);
        mean_of = vector;
      }
      int const length = tiling.length(coord.batch);
#pragma unroll
      for (int across = 0; across < kFragmentsPerRow; ++across) {
        float const* const columns = mean + tiling.first_column + tiling.columns_to(across);
        float4 const low = *reinterpret_cast<float4 const*>(columns);
        float4 const high = *reinterpret_cast<float4 const*>(columns + 4);
        float const own[] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int fragment = across; fragment < kFragments; fragment += kFragmentsPerRow) {
          float const counts = coord.row + tiling.rows_to(fragment) < length ? 1.f : 0.f;
#pragma unroll
          for (int i = 0; i < 8; ++i) x[fragment][i] -= counts * own[i];
        }
      }
    }
    MaxAbs max_abs;
#pragma unroll
    for (int fragment = 0; fragment < kFragments; ++fragment) {
#pragma unroll
      for (int i = 0; i < 8; i += 2) max_abs.add(i / 2, x[fragment][i], x[fragment][i + 1]);
    }
    float const largest = max_of_cta(tiling, max_abs.result(), of_warp[stage]) * norm;
    // Not below the smallest normal number, whose inverse is still finite.
    float const scale = largest == 0.f ? 1.f : fmaxf(largest * (1 / kLargestE4m3), 0x1p-126f);
    float const checked = largest < INFINITY ? scale : NAN;  // a comparison with NaN is false
    float const factor = norm * __frcp_rn(checked);
    if (threadIdx.x == 0) p.scales[block] = checked;  // [b, blocks, n], as `block` counts them
    uint2 packed[kFragments];
#pragma unroll
    for (int fragment = 0; fragment < kFragments; ++fragment) {
      float const* const own = x[fragment];
      packed[fragment] = {
          pack_e4m3(own[0] * factor, own[1] * factor, own[2] * factor, own[3] * factor),
          pack_e4m3(own[4] * factor, own[5] * factor, own[6] * factor, own[7] * factor)};
    }
    if (p.transposed == nullptr) {
#pragma unroll
      for (int fragment = 0; fragment < kFragments; ++fragment) {
        tiling.store(coord, fragment, packed[fragment]);
      }
    } else {
      // The attention wants zeros where a scale is none (transpose.h).
      tiling.store_transposed(block, coord.batch, stage, packed, checked > 0.f);
    }
  }
}

template <class Element, int kFragmentsPerRow>
cudaError_t launch_size(Quantize problem, cudaStream_t stream) {
  int num_sms = 0;
  JAX_FA3_RETURN_IF_ERROR(count_sms(&num_sms));
  int64_t const blocks =
      int64_t{ceil_div(problem.seqlen, kBlock)} * problem.num_heads * problem.batch;
  if (blocks == 0) return cudaSuccess;
  int64_t ctas = std::min<int64_t>(blocks, num_sms * (kThreadsPerSm / kThreads<kFragmentsPerRow>));
  // So that a CTA's blocks are of one head, and it loads that head's mean once for a batch entry.
  if (problem.mean != nullptr && ctas > problem.num_heads) ctas -= ctas % problem.num_heads;
  int const bytes = 2 * kFragments * kThreads<kFragmentsPerRow> * static_cast<int>(sizeof(uint4));
  return launch_kernel(quantize_kernel<Element, kFragmentsPerRow>, ctas, kThreads<kFragmentsPerRow>,
                       bytes, problem, stream);
}

template <class Element>
cudaError_t launch_dtype(Quantize const& problem, cudaStream_t stream) {
  if (problem.head_dim <= 64) return launch_size<Element, 2>(problem, stream);
  if (problem.head_dim <= 128) return launch_size<Element, 4>(problem, stream);
  return launch_size<Element, 8>(problem, stream);
}

}  // namespace

cudaError_t launch_quantize(Quantize const& problem, cudaStream_t stream) {
  if (problem.dtype == DType::kBFloat16) {
    return launch_dtype<ElementOf<DType::kBFloat16>>(problem, stream);
  }
  if (problem.dtype == DType::kFloat16) {
    return launch_dtype<ElementOf<DType::kFloat16>>(problem, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_fa3::fp8
