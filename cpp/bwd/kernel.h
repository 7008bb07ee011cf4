// The main backward kernel: a CTA owns a block of keys of one KV head, and walks over the query
// rows of that head's whole group, so that dK and dV are written once.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>

#include "bwd/epilogue.h"
#include "bwd/load.h"
#include "bwd/mma.h"
#include "bwd/paired.h"
#include "bwd/partial.h"
#include "bwd/wide.h"
#include "bwd/write_dq.h"

namespace jax_fa3::bwd {

template <class Traits>
CUTLASS_DEVICE void init_barriers(typename Traits::SharedStorage& storage) {
  constexpr int kConsumerWarps = Traits::kConsumerThreads / 32;
  storage.key_full.init(1);
  storage.value_full.init(1);
  if constexpr (Traits::kPersistent) storage.keys_empty.init(kConsumerWarps);
  storage.staged.init(1);
  storage.query_pipeline.init(kConsumerWarps + Traits::kWritersdQ + Traits::kHasBias,
                              kAddsToQueries<Traits> ? 2 : 1);
  if constexpr (Traits::kHasBias) {
    for (auto& ring : storage.bias_rings) ring.init();
  }
  storage.dout_pipeline.init(kConsumerWarps);
  cutlass::arch::fence_barrier_init();
}

// The gradients of a tile of keys. `state`: where the consumers are in the rings of Q and dO;
// `key_phase`: of K's and V's barriers.
template <class Traits>
CUTLASS_DEVICE void consume_tile(typename Traits::Params const& params,
                                 typename Traits::SharedStorage& storage, KeyTile const& tile,
                                 uint32_t& key_phase, int warpgroup,
                                 PipelineState<Traits::kStages>& state) {
  using Element = typename Traits::Element;
  constexpr int kBlockN = Traits::kBlockN;
  Tensor tdK = partition_fragment_C(typename Traits::template MmaGrad<Traits::kHeadDim>{},
                                    Shape<Int<kBlockN>, Int<Traits::kHeadDim>>{});
  Tensor tdV = partition_fragment_C(typename Traits::template MmaGrad<Traits::kHeadDimV>{},
                                    Shape<Int<kBlockN>, Int<Traits::kHeadDimV>>{});
  PipelineState<Traits::kBiasStages> bias_state;
  float const scale = ds_scale<Element>(params, tile.batch, tile.head_k);
  float const scale_of_dk = params.softmax_scale / scale;
  GradRows const rows = rows_of_keys<Traits>(params, tile, warpgroup * 64);
  bool ends;
  bool first = true;
  do {
    clear(tdK);
    clear(tdV);
    ends = mma<Traits>(params, storage, tile, key_phase, warpgroup, state, bias_state, scale, tdK,
                       tdV);
    scale_grad(tdK, scale_of_dk);
    if constexpr (Traits::kHasDropout) scale_grad(tdV, params.dropout.scale);
    if (params.dkv_partial == nullptr) break;
    accumulate_partial(tdV, dkv_partial(params, tile.split, true), rows, params.head_dim_v, first);
    accumulate_partial(tdK, dkv_partial(params, tile.split, false), rows, params.head_dim, first);
    first = false;
  } while (!ends);
  if (params.dkv_partial != nullptr) return;
  if (params.dkv_fp32) {
    store_grad_fp32(tdV, params.dvalue_rows, rows, params.head_dim_v);
    store_grad_fp32(tdK, params.dkey_rows, rows, params.head_dim);
    return;
  }
  BarrierId const barrier = barrier_id(NamedBarrier::kGradOfWarpgroup0, warpgroup);
  if constexpr (Traits::kPersistent) {
    store_grads<Traits>(params, storage, rows, warpgroup, barrier, tdK, tdV);
  } else {
    // The gradients are staged in the memory of K and V. A warpgroup's own rows of V are read by
    // itself alone, but K by both.
    store_grad<Element, kBlockN, Traits::kHeadDimV>(tdV, params.dvalue, storage.value, rows,
                                                    barrier);
    named_sync(NamedBarrier::kTileRead, 0, Traits::kConsumerThreads);
    store_grad<Element, kBlockN, Traits::kHeadDim>(tdK, params.dkey, storage.key, rows, barrier);
  }
}

template <class Traits>
CUTLASS_DEVICE void consume_fused(typename Traits::Params const& params,
                                  typename Traits::SharedStorage& storage, KeyTile const& of_cta,
                                  int warpgroup) {
  PipelineState<Traits::kStages> state;
  uint32_t key_phase = 0;
  if constexpr (Traits::kPersistent) {
    for (;;) {
      storage.query_pipeline.full[state.stage].wait(state.phase);
      KeyTile const tile = storage.tiles[state.stage];
      if (tile.n_block < 0) return;
      consume_tile<Traits>(params, storage, tile, key_phase, warpgroup, state);
    }
  } else {
    consume_tile<Traits>(params, storage, of_cta, key_phase, warpgroup, state);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    bwd_kernel(__grid_constant__ typename Traits::Params const params) {
  extern __shared__ char memory[];
  auto& storage = *reinterpret_cast<typename Traits::SharedStorage*>(memory);
  int const warp = cutlass::canonical_warp_idx_sync();
  KeyTile const tile = params.key_tile(blockIdx.x);  // where a CTA has one

  if (warp == 0 && elect_one_sync()) {
    prefetch_tma_descriptor(&params.query);
    prefetch_tma_descriptor(&params.key);
    prefetch_tma_descriptor(&params.value);
    prefetch_tma_descriptor(&params.dout);
    init_barriers<Traits>(storage);
  }
  __syncthreads();

  if (warp < 4) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (warp == 0) {
      load<Traits>(params, storage, tile);
    } else if (warp <= Traits::kWritersdQ) {
      if constexpr (Traits::kFused) write_dq<Traits>(params, storage, tile, warp - 1);
    } else if (warp == 3) {
      if constexpr (Traits::kHasBias) {
        load_bias_of_steps<Traits>(params, storage, tile);
      }
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    if constexpr (Traits::kPaired) {
      if (warp < 8) {
        consume_tiles<Traits, true>(params, storage);
      } else {
        consume_tiles<Traits, false>(params, storage);
      }
    } else if constexpr (Traits::kFused) {
      consume_fused<Traits>(params, storage, tile, warp / 4 - 1);
    } else if (warp < 8) {
      consume_value<Traits>(params, storage, tile);
    } else {
      consume_key<Traits>(params, storage, tile);
    }
    tma_store_wait<0>();
  }
}

}  // namespace jax_fa3::bwd
