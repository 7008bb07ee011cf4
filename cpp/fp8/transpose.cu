#include "common/launch.h"
#include "fp8/transpose.h"
#include "plan.h"

namespace jax_fa3::fp8 {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 64;  // of V, of one CTA, beside kBlock keys

// 4 rows of 4 bytes to 4 columns of 4 bytes.
__device__ __forceinline__ void transpose_4x4(uint32_t const (&rows)[4], uint32_t (&columns)[4]) {
  uint32_t const low01 = __byte_perm(rows[0], rows[1], 0x5140);  // r0c0 r1c0 r0c1 r1c1
  uint32_t const low23 = __byte_perm(rows[2], rows[3], 0x5140);
  uint32_t const high01 = __byte_perm(rows[0], rows[1], 0x7362);  // r0c2 r1c2 r0c3 r1c3
  uint32_t const high23 = __byte_perm(rows[2], rows[3], 0x7362);
  columns[0] = __byte_perm(low01, low23, 0x5410);
  columns[1] = __byte_perm(low01, low23, 0x7632);
  columns[2] = __byte_perm(high01, high23, 0x5410);
  columns[3] = __byte_perm(high01, high23, 0x7632);
}

// A CTA takes kBlock keys and kColumns columns of one head. Keys at or past the length
// become 0: whatever stands there, NaN too, meets probabilities of 0 later.
__global__ void __launch_bounds__(kThreads)
    transpose_kernel(__grid_constant__ Transpose const params) {
  constexpr int kRowWords = kColumns / 4;
  cudaTriggerProgrammaticLaunchCompletion();  // the forward may start where an SM has room
  // Behind each 16 keys 4 words are left out: then no two lanes read from one bank.
  __shared__ alignas(16) uint32_t tile[kBlock * kRowWords + kBlock / 16 * 4];
  auto const word_of = [](int key, int word) { return key * kRowWords + key / 16 * 4 + word; };
  int const column = blockIdx.x % params.num_columns * kColumns;
  int const head = blockIdx.x / params.num_columns % params.num_heads;
  int const rest = blockIdx.x / params.num_columns / params.num_heads;
  int const block = rest % params.num_blocks;
  int const batch = rest / params.num_blocks;
  int const length = params.mask.length_k(batch);
  // Rows that see a block without a scale are NaN by its scores (load.h); others must not be.
  float const scale =
      params.scale[(int64_t{batch} * params.num_blocks + block) * params.num_heads + head];
  bool const valid = is_scale(scale);
  auto const* const source = static_cast<uint8_t const*>(params.value.data) +
                             batch * params.value.batch_stride + head * params.value.head_stride +
                             column;
  constexpr int kVectors = kColumns / 16;
  constexpr int kLoads = kBlock * kVectors / kThreads;
  int const vector = threadIdx.x % kVectors;
  auto const key_of = [](int i) { return (threadIdx.x + i * kThreads) / kVectors; };
  uint4 data[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    int const key = block * kBlock + key_of(i);
    data[i] = uint4{0, 0, 0, 0};
    if (key < length && column + vector * 16 < params.head_dim) {
      data[i] = __ldcs(reinterpret_cast<uint4 const*>(source + key * params.value.seqlen_stride) +
                       vector);
    }
  }
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    *reinterpret_cast<uint4*>(tile + word_of(key_of(i), vector * 4)) =
        valid ? data[i] : uint4{0, 0, 0, 0};
  }
  __syncthreads();

  // A thread takes 16 keys of 4 columns; 8 neighbours write 128 bytes of each column.
  int const group = threadIdx.x % 8;
  int64_t const row_bytes = int64_t{params.num_blocks} * kBlock;
  for (int word = threadIdx.x / 8; word < kColumns / 4; word += kThreads / 8) {
    uint32_t out[4][4];  // [column][slots 4 c + {0, 1, 2, 3}]
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      int const key = group * 16 + 2 * c;
      uint32_t const rows[4] = {tile[word_of(key, word)], tile[word_of(key + 1, word)],
                                tile[word_of(key + 8, word)], tile[word_of(key + 9, word)]};
      uint32_t columns[4];
      transpose_4x4(rows, columns);
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i][c] = columns[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int const target = column + word * 4 + i;
      if (target >= params.head_dim) break;
      uint8_t* const bytes =
          params.out +
          ((int64_t{batch} * params.num_heads + head) * params.head_dim + target) * row_bytes +
          block * kBlock + group * 16;
      *reinterpret_cast<uint4*>(bytes) = uint4{out[i][0], out[i][1], out[i][2], out[i][3]};
    }
  }
}

}  // namespace

cudaError_t launch(Transpose const& problem, cudaStream_t stream) {
  Transpose params = problem;
  params.num_blocks = ceil_div(params.mask.seqlen_k, kBlock);
  params.num_columns = ceil_div(params.head_dim, kColumns);
  int64_t const ctas =
      int64_t{params.num_blocks} * params.num_heads * params.num_columns * params.batch;
  if (ctas == 0) return cudaSuccess;
  return launch_kernel(transpose_kernel, ctas, kThreads, 0, params, stream);
}

}  // namespace jax_fa3::fp8
