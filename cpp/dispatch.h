// The only place where run-time values become template arguments.
#pragma once

#include <cstddef>
#include <utility>

#include "fwd/fwd.h"
#include "problem.h"

namespace jax_fa3 {

struct KernelSize {
  int head_dim;
  int head_dim_v;

  constexpr bool holds(int other, int other_v) const {
    return other <= head_dim && other_v <= head_dim_v;
  }
};

// What was built (JAX_FA3_HEAD_DIMS), smallest first. A call takes the first that holds it: the
// columns beyond its own head dim read as 0.
inline constexpr KernelSize kKernelSizes[] = {
#ifdef JAX_FA3_HAS_HD64
    {64, 64},
#endif
#ifdef JAX_FA3_HAS_HD96
    {96, 96},
#endif
#ifdef JAX_FA3_HAS_HD128
    {128, 128},
#endif
#ifdef JAX_FA3_HAS_HD192
    {192, 128}, {192, 192},
#endif
#ifdef JAX_FA3_HAS_HD256
    {256, 256},
#endif
};
inline constexpr std::size_t kNumKernelSizes = sizeof(kKernelSizes) / sizeof(KernelSize);

constexpr bool is_built([[maybe_unused]] DType dtype) {
#ifdef JAX_FA3_HAS_BFLOAT16
  if (dtype == DType::kBFloat16) return true;
#endif
#ifdef JAX_FA3_HAS_FLOAT16
  if (dtype == DType::kFloat16) return true;
#endif
  return false;
}

namespace detail {

template <DType kDType, std::size_t... kIndex>
bool launch_fwd(Problem const& problem, cudaStream_t stream, cudaError_t* error,
                std::index_sequence<kIndex...>) {
  if constexpr (is_built(kDType)) {
    return (
        (kKernelSizes[kIndex].holds(problem.head_dim, problem.head_dim_v) &&
         (*error =
              fwd::launch<kDType, kKernelSizes[kIndex].head_dim, kKernelSizes[kIndex].head_dim_v>(
                  problem, stream),
          true)) ||
        ...);
  }
  return false;
}

}  // namespace detail

// Launches the forward kernel; false if no built kernel holds the problem.
inline bool launch_fwd(Problem const& problem, cudaStream_t stream, cudaError_t* error) {
  constexpr auto kAll = std::make_index_sequence<kNumKernelSizes>{};
  return problem.dtype == DType::kBFloat16
             ? detail::launch_fwd<DType::kBFloat16>(problem, stream, error, kAll)
             : detail::launch_fwd<DType::kFloat16>(problem, stream, error, kAll);
}

}  // namespace jax_fa3
