#include <cutlass/bfloat16.h>

#include "common/fragment.h"
#include "common/launch.h"
#include "fp8/quantize.h"
#include "fp8/softmax.h"
#include "plan.h"

namespace jax_fa3::fp8 {
namespace {

constexpr int kColumns = 16;  // of a row, in a thread's registers
constexpr int kRows = 4;      // of a thread
constexpr float kLargest = 448.f;

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// The Walsh-Hadamard transform of `size` columns, a power of two from kColumns on: its last steps
// among the lanes that share a row.
__device__ __forceinline__ void hadamard(float (&x)[kRows][kColumns], int size, int lane_of_row) {
#pragma unroll
  for (int step = 1; step < kColumns; step *= 2) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if ((i & step) == 0) {
          float const a = x[row][i];
          float const b = x[row][i + step];
          x[row][i] = a + b;
          x[row][i + step] = a - b;
        }
      }
    }
  }
  for (int step = 1; step < size / kColumns; step *= 2) {
    float const sign = (lane_of_row & step) == 0 ? 1.f : -1.f;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        x[row][i] = __shfl_xor_sync(~0u, x[row][i], step) + sign * x[row][i];
      }
    }
  }
  float const norm = rsqrtf(static_cast<float>(size));
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) x[row][i] *= norm;
  }
}

// One CTA per block of rows and head; kLanes threads share a row.
template <class Element, int kLanes>
__global__ void __launch_bounds__(kLanes* kBlock / kRows)
    quantize_kernel(__grid_constant__ Quantize const p) {
  constexpr int kThreads = kLanes * kBlock / kRows;
  int const head = blockIdx.x % p.num_heads;
  int const num_blocks = (p.seqlen + kBlock - 1) / kBlock;
  int const block = blockIdx.x / p.num_heads % num_blocks;
  int const batch = blockIdx.x / p.num_heads / num_blocks;
  int const lane_of_row = threadIdx.x % kLanes;
  int const column = lane_of_row * kColumns;
  bool const has_columns = column < p.head_dim;
  int length = p.seqlen;
  if (p.lengths != nullptr) length = min(max(p.lengths[batch], 0), p.seqlen);

  auto const row_of = [&](int i) {
    return block * kBlock + i * (kBlock / kRows) + static_cast<int>(threadIdx.x) / kLanes;
  };
  auto const offset_of = [&](int row) {
    return ((int64_t{batch} * p.seqlen + row) * p.num_heads + head) * p.head_dim + column;
  };
  uint4 loaded[kRows][2];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    bool const counts = has_columns && row_of(i) < length;
    auto const* const source =
        reinterpret_cast<uint4 const*>(static_cast<uint16_t const*>(p.x) + offset_of(row_of(i)));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      loaded[i][half] = counts ? __ldcs(source + half) : uint4{0, 0, 0, 0};
    }
  }
  float x[kRows][kColumns];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t const words[] = {loaded[i][half].x, loaded[i][half].y, loaded[i][half].z,
                                loaded[i][half].w};
#pragma unroll
      for (int j = 0; j < 8; ++j) x[i][half * 8 + j] = unpack<Element>(words[j / 2], j % 2);
    }
  }
  if (p.signs != nullptr) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      float const sign = has_columns ? p.signs[column + j] : 0.f;
#pragma unroll
      for (int i = 0; i < kRows; ++i) x[i][j] *= sign;
    }
    hadamard(x, p.transform, lane_of_row);
  }

  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) largest = max_or_nan(largest, fabsf(x[i][j]));
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    largest = max_or_nan(largest, __shfl_xor_sync(~0u, largest, step));
  }
  __shared__ float of_warp[kThreads / 32];
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) largest = max_or_nan(largest, of_warp[warp]);

  // Beyond fp32's largest number the inverse of the smallest would be infinite.
  float const scale = largest == 0.f ? 1.f : fmaxf(largest * (1 / kLargest), 0x1p-126f);
  float const checked = largest < INFINITY ? scale : NAN;  // a comparison with NaN is false
  float const inverse = __frcp_rn(checked);
  if (threadIdx.x == 0) {
    p.scales[(int64_t{batch} * num_blocks + block) * p.num_heads + head] = checked;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float const* const four = &x[i][4 * j];
      words[j] =
          pack_e4m3(four[0] * inverse, four[1] * inverse, four[2] * inverse, four[3] * inverse);
    }
    if (has_columns && row_of(i) < p.seqlen) {
      *reinterpret_cast<uint4*>(p.out + offset_of(row_of(i))) =
          uint4{words[0], words[1], words[2], words[3]};
    }
  }
}

template <class Element, int kLanes>
cudaError_t launch_lanes(Quantize problem, cudaStream_t stream) {
  int64_t const ctas =
      int64_t{ceil_div(problem.seqlen, kBlock)} * problem.num_heads * problem.batch;
  return launch_kernel(quantize_kernel<Element, kLanes>, ctas, kLanes * kBlock / kRows, 0, problem,
                       stream);
}

template <class Element>
cudaError_t launch_dtype(Quantize const& problem, cudaStream_t stream) {
  if (problem.head_dim <= 64) return launch_lanes<Element, 4>(problem, stream);
  if (problem.head_dim <= 128) return launch_lanes<Element, 8>(problem, stream);
  return launch_lanes<Element, 16>(problem, stream);
}

}  // namespace

cudaError_t launch(Quantize const& problem, cudaStream_t stream) {
  return problem.dtype == DType::kBFloat16 ? launch_dtype<cutlass::bfloat16_t>(problem, stream)
                                           : launch_dtype<cutlass::half_t>(problem, stream);
}

}  // namespace jax_fa3::fp8
