// The kernel that transposes V before the forward (transpose.h).
#include "common/launch.h"
#include "fp8/transpose.h"
#include "plan.h"

namespace jax_fa3::fp8 {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 64;  // of V, for one CTA

// A CTA takes kBlock keys and kColumns columns of one head, through shared memory: so its global
// reads and writes are of more bytes in a row than those of transpose_warp_tile(). Shared memory is
// written and read in vectors of 4 bytes, that is of 4 columns of one key.
__global__ void __launch_bounds__(kThreads)
    transpose_kernel(__grid_constant__ Transpose const params) {
  constexpr int kVec4s = kColumns / 4;
  cudaTriggerProgrammaticLaunchCompletion();  // the forward may start where an SM has room
  using Tile = ValueTile<kVec4s>;
  __shared__ alignas(16) uint32_t tile[Tile::kWords];
  int const num_columns = (params.head_dim + kColumns - 1) / kColumns;
  int const column = blockIdx.x % num_columns * kColumns;
  KeyBlock const block = key_block(params, static_cast<int>(blockIdx.x) / num_columns);
  int const length = params.mask.length_k(block.batch);
  bool const valid = is_scale(*scale_of(params, block));
  auto const* const source = block_of_value(params, block) + column;
  constexpr int kVectors = kColumns / 16;
  constexpr int kLoads = kBlock * kVectors / kThreads;
  int const vector = threadIdx.x % kVectors;
  auto const key_of = [](int i) { return (threadIdx.x + i * kThreads) / kVectors; };
  uint4 data[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    int const key = key_of(i);
    data[i] = uint4{0, 0, 0, 0};
    if (block.n_block * kBlock + key < length && column + vector * 16 < params.head_dim) {
      data[i] = __ldcs(reinterpret_cast<uint4 const*>(source + key * params.value.seqlen_stride) +
                       vector);
    }
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    *reinterpret_cast<uint4*>(tile + Tile::index(key_of(i), vector * 4)) =
        valid ? data[i] : uint4{0, 0, 0, 0};
  }
  __syncthreads();

  uint8_t* const out = block_of_out(params, block) + column * row_bytes_of(params);
  for (int vec4 = threadIdx.x / 8; vec4 < kVec4s; vec4 += kThreads / 8) {
    store_columns<kVec4s>(tile, threadIdx.x % 8, vec4, params.head_dim - column,
                          row_bytes_of(params), out);
  }
}

}  // namespace

cudaError_t launch_transpose(Transpose const& problem, cudaStream_t stream) {
  Transpose params = problem;
  int64_t const ctas = int64_t{params.order.num_tiles()} * ceil_div(params.head_dim, kColumns);
  if (ctas == 0) return cudaSuccess;
  return launch_kernel(transpose_kernel, ctas, kThreads, 0, params, stream);
}

}  // namespace jax_fa3::fp8
