// 16-bit rows to e4m3, one scale per block of rows and head, with a vector per head
// subtracted and a Hadamard transform before it.
#pragma once

#include <cuda_runtime_api.h>

#include "fp8/fp8.h"

namespace jax_fa3::fp8 {

struct Quantize {
  int batch, seqlen, num_heads;
  int head_dim;        // a multiple of 16 up to 256
  int transform;       // greatest power of two that divides head_dim: columns of one transform
  DType dtype;         // of x
  void const* x;       // [b, t, n, h]
  float const* signs;  // [h], of +1 and -1 (their sign bit is read), or null: no transform
  int const* lengths;  // [b], or null: t. Rows from there on count as 0
  float const* mean;   // [b, n, h], or null: subtracted before the transform from rows that count
  uint8_t* out;        // [b, t, n, h], or
  uint8_t*
      transposed;  // [b, n, h, ceil(t / kBlock) * kBlock], as V (transpose.h); the other is null
  float* scales;   // [b, ceil(t / kBlock), n]: x = scale * out, NaN where a row is not finite
};

#ifdef JAX_FA3_HAS_FP8
cudaError_t launch_quantize(Quantize const& problem, cudaStream_t stream);
#else  // a build without these kernels
inline cudaError_t launch_quantize(Quantize const&, cudaStream_t) { return cudaErrorNotSupported; }
#endif

}  // namespace jax_fa3::fp8
