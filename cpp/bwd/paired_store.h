// dK and dV of the paired kernel (paired.h), which its warpgroups hold transposed: their sums, and
// their way out.
#pragma once

#include "bwd/paired_traits.h"
#include "bwd/partial.h"

namespace jax_fa3::bwd {

// A gradient that is complete; kOfValue: dV.
template <class Traits, bool kOfValue, class Fragment>
CUTLASS_DEVICE void store_transposed(Params const& params, typename Traits::SharedStorage& storage,
                                     GradRows const& rows, Fragment const& grad) {
  using Element = typename Traits::Element;
  constexpr int kColumns = kOfValue ? Traits::kHeadDimV : Traits::kHeadDim;
  if (params.dkv_fp32) {
    return store_transposed_fp32(grad, kOfValue ? params.dvalue_rows : params.dkey_rows, rows,
                                 kOfValue ? params.head_dim_v : params.head_dim);
  }
  // It is staged in the memory of V or K, which both warpgroups have read by then.
  named_sync(NamedBarrier::kTileRead, 0, Traits::kConsumerThreads);
  store_transposed_grad<Element, Traits::kBlockN, kColumns>(
      grad, kOfValue ? params.dvalue : params.dkey, kOfValue ? storage.value : storage.key, rows,
      barrier_id(NamedBarrier::kGradOfWarpgroup0, kOfValue ? 0 : 1));
  if (threadIdx.x % 128 == 0) cute::tma_store_wait<0>();
}

// The sums of a gradient, of which params.dkv_partial has the earlier ones where there are several.
// `steps` are those of one sum; they return whether they are the tile's last.
template <class Traits, bool kOfValue, class Fragment, class Steps>
CUTLASS_DEVICE void sum_and_store(Params const& params, typename Traits::SharedStorage& storage,
                                  KeyTile const& tile, Fragment& grad, Steps const& steps) {
  GradRows const rows = rows_of_keys<Traits>(params, tile);
  bool const in_parts = params.dkv_partial != nullptr;
  bool const staged = !in_parts && !params.dkv_fp32;  // in the memory of K and V
  auto const release_keys = [&] {
    if (threadIdx.x % 32 == 0) storage.keys_empty.arrive();
  };
  bool first = true;
  bool ends;
  do {
    clear(grad);
    ends = steps();
    if (ends && !staged) release_keys();
    if (!in_parts) break;
    accumulate_transposed(grad, dkv_partial(params, tile.split, kOfValue), rows,
                          kOfValue ? params.head_dim_v : params.head_dim, first);
    first = false;
  } while (!ends);
  if (!in_parts) store_transposed<Traits, kOfValue>(params, storage, rows, grad);
  if (staged) release_keys();
}

}  // namespace jax_fa3::bwd
