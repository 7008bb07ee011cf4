// The kernel of segment_intervals.h.
#include "common/mask.h"
#include "plan.h"
#include "segment_intervals.h"

namespace jax_fa3 {
namespace {

constexpr int kThreads = 256;  // query rows of a CTA, and keys that it looks at in one step
constexpr int kKeysPerThread = 4;
constexpr int kChunk = kThreads * kKeysPerThread;

// A run [begin, end) of equal ids within the chunk of keys at hand.
struct Run {
  int id;
  int begin;
  int end;
};

// The keys pass by in chunks; each chunk is first compressed to its runs (a packed batch has few),
// then every query row looks for its id among those. A run that goes on from one chunk to the next
// is put together again by the row that it belongs to.
__global__ void __launch_bounds__(kThreads)
    segment_intervals_kernel(SegmentIntervals const problem) {
  __shared__ Run runs[kChunk];
  __shared__ int warp_starts[kThreads / 32];

  int const blocks = ceil_div(problem.seqlen_q, kThreads);
  int const batch = blockIdx.x / blocks;
  int const row = blockIdx.x % blocks * kThreads + threadIdx.x;
  int const lane = threadIdx.x % 32;
  int const warp = threadIdx.x / 32;
  bool const inside = row < problem.seqlen_q;
  int64_t const index = int64_t{batch} * problem.seqlen_q + row;
  int const* const key_ids = problem.key_segment_ids + int64_t{batch} * problem.seqlen_k;
  int const id = inside ? problem.query_segment_ids[index] : -1;

  int begin = 0;
  int end = 0;
  bool broken = false;
  for (int chunk = 0; chunk < problem.seqlen_k; chunk += kChunk) {
    int const length = min(kChunk, problem.seqlen_k - chunk);
    int const first = threadIdx.x * kKeysPerThread;
    int ids[kKeysPerThread + 1];  // and the one before
    ids[0] = first == 0 || first > length ? 0 : key_ids[chunk + first - 1];
    bool starts[kKeysPerThread];
    int count = 0;
    for (int i = 0; i < kKeysPerThread; ++i) {
      int const position = first + i;
      ids[i + 1] = position < length ? key_ids[chunk + position] : 0;
      starts[i] = position < length && (position == 0 || ids[i + 1] != ids[i]);
      count += starts[i];
    }
    // Exclusive prefix sum of the numbers of runs that start in each thread's keys.
    int inclusive = count;
    for (int step = 1; step < 32; step *= 2) {
      int const other = __shfl_up_sync(~0u, inclusive, step);
      if (lane >= step) inclusive += other;
    }
    __syncthreads();  // the last chunk's runs have been read
    if (lane == 31) warp_starts[warp] = inclusive;
    __syncthreads();
    int slot = inclusive - count;
    int num_runs = 0;
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w < warp) slot += warp_starts[w];
      num_runs += warp_starts[w];
    }
    for (int i = 0; i < kKeysPerThread; ++i) {
      if (!starts[i]) continue;
      runs[slot].id = ids[i + 1];
      runs[slot].begin = chunk + first + i;
      if (slot > 0) runs[slot - 1].end = chunk + first + i;
      ++slot;
    }
    if (threadIdx.x == 0) runs[num_runs - 1].end = chunk + length;
    __syncthreads();
    if (id >= 0) {
      for (int run = 0; run < num_runs; ++run) {
        if (runs[run].id != id) continue;
        broken |= end != 0 && runs[run].begin != end;
        if (end == 0) begin = runs[run].begin;
        end = runs[run].end;
      }
    }
  }
  if (inside) {
    problem.key_begin[index] = broken ? kBrokenBegin : begin;
    problem.key_end[index] = broken ? kBrokenEnd : end;
  }
}

}  // namespace

cudaError_t launch_segment_intervals(SegmentIntervals const& problem, cudaStream_t stream) {
  dim3 const grid(ceil_div(problem.seqlen_q, kThreads) * problem.batch);
  void* arguments[] = {const_cast<SegmentIntervals*>(&problem)};
  return cudaLaunchKernel(reinterpret_cast<void const*>(&segment_intervals_kernel), grid,
                          dim3(kThreads), arguments, 0, stream);
}

}  // namespace jax_fa3
