// The only place where run-time values become template arguments.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <iterator>
#include <type_traits>
#include <utility>

#include "bwd/bwd.h"
#include "decode/decode.h"
#include "fp8/fp8.h"
#include "fwd/fwd.h"
#include "jvp/jvp.h"
#include "kernel_sizes.h"
#include "problem.h"
#include "wide/wide.h"
#include "wide_bwd/wide_bwd.h"

namespace jax_fa3 {

// What was built: CMake defines these two lists, of numbers and of enumerators.
constexpr bool is_built([[maybe_unused]] DType dtype) {
  for (DType const built : std::initializer_list<DType>{JAX_FA3_BUILT_DTYPES}) {
    if (built == dtype) return true;
  }
  return false;
}

constexpr bool is_built([[maybe_unused]] KernelSize const& size) {
  for (int const built : std::initializer_list<int>{JAX_FA3_BUILT_HEAD_DIMS}) {
    if (built == size.head_dim) return true;
  }
  return false;
}

constexpr bool has_kernel(DType dtype, KernelSize const& size) {
  return is_built(dtype) && is_built(size) && (dtype != DType::kFloat8E4M3 || size.has_fp8);
}

// The kernel that takes these head dims; one of head dim 0 if none was built.
constexpr KernelSize kernel_size(int head_dim, int head_dim_v) {
  for (KernelSize const& size : kKernelSizes) {
    if (is_built(size) && size.holds(head_dim, head_dim_v)) return size;
  }
  return {};
}

namespace detail {

// Calls `launch` with the first kernel of this dtype that holds the problem, by types: its dtype
// and the index of its size. False if none was built. kWide: whether the pass has wide ones.
template <DType kDType, bool kWide, class Problem, class Launch, std::size_t... kIndex>
bool select_size(Problem const& problem, Launch const& launch, std::index_sequence<kIndex...>) {
  auto const launched = [&](auto index) {
    constexpr KernelSize kSize = kKernelSizes[decltype(index)::value];
    if constexpr (has_kernel(kDType, kSize) && (kWide || !kSize.is_wide())) {
      if (!kSize.holds(problem.head_dim, problem.head_dim_v)) return false;
      launch(std::integral_constant<DType, kDType>{}, index);
      return true;
    }
    return false;
  };
  return (launched(std::integral_constant<std::size_t, kIndex>{}) || ...);
}

template <bool kWide, DType... kDTypes, class Problem, class Launch>
bool select(Problem const& problem, Launch const& launch) {
  constexpr auto kAll = std::make_index_sequence<std::size(kKernelSizes)>{};
  return ((problem.dtype == kDTypes && select_size<kDTypes, kWide>(problem, launch, kAll)) || ...);
}

template <bool kWide, class Problem, class Launch>
bool select_16_bits(Problem const& problem, Launch const& launch) {
  return select<kWide, DType::kBFloat16, DType::kFloat16>(problem, launch);
}

}  // namespace detail

// Launch a pass; false if no built kernel holds the problem.
inline bool launch_fwd(Problem const& problem, cudaStream_t stream, cudaError_t* error) {
  return detail::select_16_bits<true>(problem, [&](auto dtype, auto index) {
    constexpr KernelSize kSize = kKernelSizes[decltype(index)::value];
    constexpr DType kDType = decltype(dtype)::value;
    if constexpr (kSize.is_wide()) {
      *error = wide::launch<kDType, kSize.head_dim, kSize.head_dim_v>(problem, stream);
    } else {
      *error = fwd::launch<kDType, kSize.head_dim, kSize.head_dim_v>(problem, stream);
    }
  });
}

inline bool launch_bwd(BackwardProblem const& problem, cudaStream_t stream, cudaError_t* error) {
  Problem const& forward = problem.forward;
  return detail::select_16_bits<true>(forward, [&](auto dtype, auto index) {
    constexpr KernelSize kSize = kKernelSizes[decltype(index)::value];
    constexpr DType kDType = decltype(dtype)::value;
    constexpr int kWidth = kSize.bwd_head_dim();
    if constexpr (!kSize.is_wide()) {
      *error = bwd::launch<kDType, kSize.head_dim, kSize.head_dim_v>(problem, stream);
    } else if constexpr (kSize.has_bwd() && is_built(size_for(kWidth, kWidth))) {
      *error = wide_bwd::launch<kDType, kWidth, kWidth>(problem, stream);
    } else {
      *error = cudaErrorNotSupported;
    }
  });
}

inline bool launch_fp8(fp8::Problem const& problem, cudaStream_t stream, cudaError_t* error) {
  return detail::select<false, DType::kFloat8E4M3>(problem.forward, [&](auto, auto index) {
    *error = fp8::launch_fwd<kKernelSizes[decltype(index)::value].head_dim>(problem, stream);
  });
}

namespace detail {

template <DType kDType, std::size_t... kIndex>
bool select_jvp(jvp::Problem const& problem, cudaStream_t stream, cudaError_t* error,
                std::index_sequence<kIndex...>) {
  auto const launched = [&](auto index) {
    constexpr int kHeadDim = kJvpTiles[decltype(index)::value].head_dim;
    constexpr KernelSize kSize = size_for(kHeadDim, kHeadDim);
    if constexpr (has_kernel(kDType, kSize)) {
      if (!kSize.holds(problem.forward.head_dim, problem.forward.head_dim_v)) return false;
      *error = jvp::launch<kDType, kHeadDim>(problem, stream);
      return true;
    }
    return false;
  };
  return (launched(std::integral_constant<std::size_t, kIndex>{}) || ...);
}

}  // namespace detail

inline bool launch_jvp(jvp::Problem const& problem, cudaStream_t stream, cudaError_t* error) {
  constexpr auto kAll = std::make_index_sequence<std::size(kJvpTiles)>{};
  if (problem.forward.dtype == DType::kBFloat16) {
    return detail::select_jvp<DType::kBFloat16>(problem, stream, error, kAll);
  }
  return detail::select_jvp<DType::kFloat16>(problem, stream, error, kAll);
}

inline bool launch_decode(decode::Problem const& problem, cudaStream_t stream, cudaError_t* error) {
  return detail::select_16_bits<false>(problem, [&](auto dtype, auto index) {
    constexpr KernelSize kSize = kKernelSizes[decltype(index)::value];
    *error =
        decode::launch<decltype(dtype)::value, kSize.head_dim, kSize.head_dim_v>(problem, stream);
  });
}

}  // namespace jax_fa3
