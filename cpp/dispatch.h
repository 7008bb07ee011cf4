// The only place where run-time values become template arguments.
#pragma once

#include <cstddef>
#include <utility>

#include "bwd/bwd.h"
#include "fp8/fp8.h"
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
#ifdef JAX_FA3_HAS_FLOAT8_E4M3FN
  if (dtype == DType::kFloat8E4M3) return true;
#endif
  return false;
}

// Head dims of which there is an FP8 kernel, too: their rows are whole slabs of 64 or 128 bytes.
constexpr bool has_fp8(KernelSize const& size) {
  bool const slabs = size.head_dim == 64 || size.head_dim == 128 || size.head_dim == 256;
  return slabs && size.head_dim_v == size.head_dim;
}

// The kernel that takes these head dims; {0, 0} if none was built.
constexpr KernelSize kernel_size(int head_dim, int head_dim_v) {
  for (KernelSize const& size : kKernelSizes) {
    if (size.holds(head_dim, head_dim_v)) return size;
  }
  return {0, 0};
}

namespace detail {

// Calls `launch` with the dtype and the index of the kernel that holds the problem; false if none
// does.
template <DType kDType, class Launch, std::size_t... kIndex>
bool select(Problem const& problem, Launch const& launch, std::index_sequence<kIndex...>) {
  if constexpr (is_built(kDType)) {
    return ((kKernelSizes[kIndex].holds(problem.head_dim, problem.head_dim_v) &&
             (launch(std::integral_constant<DType, kDType>{},
                     std::integral_constant<std::size_t, kIndex>{}),
              true)) ||
            ...);
  }
  return false;
}

template <class Launch>
bool select(Problem const& problem, Launch const& launch) {
  constexpr auto kAll = std::make_index_sequence<kNumKernelSizes>{};
  return problem.dtype == DType::kBFloat16 ? select<DType::kBFloat16>(problem, launch, kAll)
                                           : select<DType::kFloat16>(problem, launch, kAll);
}

template <std::size_t... kIndex>
bool select_fp8(fp8::Problem const& problem, cudaStream_t stream, cudaError_t* error,
                std::index_sequence<kIndex...>) {
  auto const launch = [&](auto index) {
    constexpr KernelSize kSize = kKernelSizes[decltype(index)::value];
    if constexpr (has_fp8(kSize)) {
      if (!kSize.holds(problem.forward.head_dim, problem.forward.head_dim_v)) return false;
      *error = fp8::launch_fwd<kSize.head_dim>(problem, stream);
      return true;
    }
    return false;
  };
  return (launch(std::integral_constant<std::size_t, kIndex>{}) || ...);
}

}  // namespace detail

// Launch a pass; false if no built kernel holds the problem.
inline bool launch_fwd(Problem const& problem, cudaStream_t stream, cudaError_t* error) {
  return detail::select(problem, [&](auto dtype, auto index) {
    constexpr KernelSize kSize = kKernelSizes[decltype(index)::value];
    *error = fwd::launch<decltype(dtype)::value, kSize.head_dim, kSize.head_dim_v>(problem, stream);
  });
}

inline bool launch_bwd(BackwardProblem const& problem, cudaStream_t stream, cudaError_t* error) {
  return detail::select(problem.forward, [&](auto dtype, auto index) {
    constexpr KernelSize kSize = kKernelSizes[decltype(index)::value];
    *error = bwd::launch<decltype(dtype)::value, kSize.head_dim, kSize.head_dim_v>(problem, stream);
  });
}

inline bool launch_fp8(fp8::Problem const& problem, cudaStream_t stream, cudaError_t* error) {
  if constexpr (is_built(DType::kFloat8E4M3)) {
    return detail::select_fp8(problem, stream, error, std::make_index_sequence<kNumKernelSizes>{});
  }
  return false;
}

}  // namespace jax_fa3
