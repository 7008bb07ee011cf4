// The wgmma of S over long blocks of keys (Kind::kLong): m64n176k16, both operands K-major in
// shared memory. As the shapes of common/wgmma.h, which all kernels include.
#pragma once

#include "common/wgmma.h"

namespace jax_fa3 {

template <class Element, class TD, class DLayout, class TA, class ALayout, class TB, class BLayout,
          class TC, class CLayout>
CUTLASS_DEVICE void mma_unpack(
    cute::MMA_Traits<Wgmma<Element, 176, Operands::kColumns>> const& traits,
    cute::Tensor<TD, DLayout>& d, cute::Tensor<TA, ALayout> const& a,
    cute::Tensor<TB, BLayout> const& b, cute::Tensor<TC, CLayout> const&) {
  constexpr bool kIsBFloat16 = std::is_same_v<Element, cutlass::bfloat16_t>;
  static_assert(kIsBFloat16 || std::is_same_v<Element, cutlass::half_t>);
  cute::Tensor descriptor_a = cute::recast<uint64_t>(a);
  cute::Tensor descriptor_b = cute::recast<uint64_t>(b);
  auto const accumulate = static_cast<int32_t>(traits.accumulate_);

#define JAX_FA3_FLOATS_4(i) "+f"(d(i)), "+f"(d(i + 1)), "+f"(d(i + 2)), "+f"(d(i + 3))
#define JAX_FA3_FLOATS_8(i) JAX_FA3_FLOATS_4(i), JAX_FA3_FLOATS_4(i + 4)
#define JAX_FA3_FLOATS_40(i)                                              \
  JAX_FA3_FLOATS_8(i), JAX_FA3_FLOATS_8(i + 8), JAX_FA3_FLOATS_8(i + 16), \
      JAX_FA3_FLOATS_8(i + 24), JAX_FA3_FLOATS_8(i + 32)
#define JAX_FA3_ISSUE(type)                                                                        \
  asm volatile(                                                                                    \
      "{\n"                                                                                        \
      ".reg .pred accumulate;\n"                                                                   \
      "setp.ne.b32 accumulate, %90, 0;\n"                                                          \
      "wgmma.mma_async.sync.aligned.m64n176k16.f32." type "." type                                 \
      " {"                                                                                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
      "%20, %21, "                                                                                 \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
      "%40, %41, %42, %43, "                                                                       \
      "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
      "%62, %63, %64, %65, "                                                                       \
      "%66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
      "%84, %85, %86, %87"                                                                         \
      "}, %88, %89, accumulate, 1, 1, 0, 0;\n"                                                     \
      "}\n"                                                                                        \
      : JAX_FA3_FLOATS_40(0), JAX_FA3_FLOATS_40(40), JAX_FA3_FLOATS_8(80)                          \
      : "l"(descriptor_a(0)), "l"(descriptor_b(0)), "r"(accumulate))
  if constexpr (kIsBFloat16) {
    JAX_FA3_ISSUE("bf16");
  } else {
    JAX_FA3_ISSUE("f16");
  }
#undef JAX_FA3_FLOATS_4
#undef JAX_FA3_FLOATS_8
#undef JAX_FA3_FLOATS_40
#undef JAX_FA3_ISSUE
}

}  // namespace jax_fa3
