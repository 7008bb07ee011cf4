// Segment ids -> key intervals: for every query row the run of keys that have its id.
#pragma once

#include <cuda_runtime_api.h>

namespace jax_fa3 {

struct SegmentIntervals {
  int batch;
  int seqlen_q;
  int seqlen_k;
  int const* query_segment_ids;  // [b, t], any order; negative: padding
  int const* key_segment_ids;    // [b, s], each id >= 0 one contiguous run; negative: padding
  int* key_begin;                // [b, t]
  int* key_end;                  // [b, t]; both kBroken* (mask.h) where the run is broken
};

#ifdef JAX_FA3_HAS_CUDA
cudaError_t launch_segment_intervals(SegmentIntervals const& problem, cudaStream_t stream);
#else  // a build without kernels
inline cudaError_t launch_segment_intervals(SegmentIntervals const&, cudaStream_t) {
  return cudaErrorNotSupported;
}
#endif

}  // namespace jax_fa3
