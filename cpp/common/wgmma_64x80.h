// wgmma m64n80k16 with both operands in shared memory, K-major.
//
// CUTLASS has the shape only among its extended ones, whose header costs 17 CPU-seconds in every
// file that turns it on.
#pragma once

#include <cutlass/numeric_types.h>

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <type_traits>

namespace jax_fa3 {

template <class Element>
struct Wgmma64x80x16 {
  using DRegisters = void;
  using ARegisters = uint64_t[1];
  using BRegisters = uint64_t[1];
  using CRegisters = float[40];
};

// CuTe's hook for issuing an instruction, found through the type of its traits.
template <class Element, class TD, class DLayout, class TA, class ALayout, class TB, class BLayout,
          class TC, class CLayout>
CUTLASS_DEVICE void mma_unpack(cute::MMA_Traits<Wgmma64x80x16<Element>> const& traits,
                               cute::Tensor<TD, DLayout>& d, cute::Tensor<TA, ALayout> const& a,
                               cute::Tensor<TB, BLayout> const& b,
                               cute::Tensor<TC, CLayout> const&) {
  cute::Tensor descriptor_a = cute::recast<uint64_t>(a);
  cute::Tensor descriptor_b = cute::recast<uint64_t>(b);
#define JAX_FA3_8_FLOATS(i)                                                                   \
  "+f"(d(i)), "+f"(d(i + 1)), "+f"(d(i + 2)), "+f"(d(i + 3)), "+f"(d(i + 4)), "+f"(d(i + 5)), \
      "+f"(d(i + 6)), "+f"(d(i + 7))
#define JAX_FA3_WGMMA_64X80(type)                                                             \
  asm volatile(                                                                               \
      "{\n"                                                                                   \
      ".reg .pred accumulate;\n"                                                              \
      "setp.ne.b32 accumulate, %42, 0;\n"                                                     \
      "wgmma.mma_async.sync.aligned.m64n80k16.f32." type "." type                             \
      " "                                                                                     \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "               \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "                \
      "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39}, "                                   \
      "%40, %41, accumulate, 1, 1, 0, 0;\n"                                                   \
      "}\n"                                                                                   \
      : JAX_FA3_8_FLOATS(0), JAX_FA3_8_FLOATS(8), JAX_FA3_8_FLOATS(16), JAX_FA3_8_FLOATS(24), \
        JAX_FA3_8_FLOATS(32)                                                                  \
      : "l"(descriptor_a(0)), "l"(descriptor_b(0)), "r"(static_cast<int32_t>(traits.accumulate_)))
  if constexpr (std::is_same_v<Element, cutlass::bfloat16_t>) {
    JAX_FA3_WGMMA_64X80("bf16");
  } else {
    static_assert(std::is_same_v<Element, cutlass::half_t>);
    JAX_FA3_WGMMA_64X80("f16");
  }
#undef JAX_FA3_WGMMA_64X80
#undef JAX_FA3_8_FLOATS
}

}  // namespace jax_fa3

namespace cute {

template <class Element>
struct MMA_Traits<jax_fa3::Wgmma64x80x16<Element>> {
  using ValTypeD = float;
  using ValTypeA = Element;
  using ValTypeB = Element;
  using ValTypeC = float;
  using FrgTypeA = GMMA::smem_desc<GMMA::Major::K>;
  using FrgTypeB = GMMA::smem_desc<GMMA::Major::K>;
  using Shape_MNK = Shape<_64, Int<80>, _16>;
  using ThrID = Layout<_128>;
  using ALayout = GMMA::ABLayout<64, 16>;
  using BLayout = GMMA::ABLayout<80, 16>;
  using CLayout = GMMA::CLayout_64xN<80>;
  GMMA::ScaleOut accumulate_ = GMMA::ScaleOut::One;
};

}  // namespace cute
