// The C++ type of a dtype's numbers.
#pragma once

#include <cutlass/numeric_types.h>

#include "problem.h"

namespace jax_fa3 {

template <DType kDType>
struct ElementType;  // there is none for a dtype that is not listed here
template <>
struct ElementType<DType::kBFloat16> {
  using type = cutlass::bfloat16_t;
};
template <>
struct ElementType<DType::kFloat16> {
  using type = cutlass::half_t;
};

template <DType kDType>
using ElementOf = typename ElementType<kDType>::type;

}  // namespace jax_fa3
