// The end of a tile: each warpgroup has 64 rows and 256 columns of a gradient.
#pragma once

#include "bwd/epilogue.h"
#include "bwd/partial.h"
#include "bwd/postprocess.h"
#include "wide_bwd/traits.h"

namespace jax_fa3::wide_bwd {

// In shared memory that nobody reads any more: 64 rows and kColumns columns.
template <class Traits, class Grad>
CUTLASS_DEVICE void store_columns(Grad const& grad, CUtensorMap const& map, uint16_t* smem,
                                  bwd::GradRows const& rows, int first_column, int columns,
                                  int warpgroup) {
  int const thread = threadIdx.x % 128;
  stage_packed<64, Traits::kColumns, 64>(packed<typename Traits::Element>(grad), smem,
                                         thread / 32 * 16);
  cute::tma_store_fence();
  named_sync(NamedBarrier::kOfWarpgroup0, warpgroup, 128);
  if (thread == 0 && columns > 0) {
    tma_store_rows<64, Traits::kColumns, 64>(
        map, smem, {rows.tile.row + rows.first, rows.tile.head, rows.tile.batch}, first_column);
    cute::tma_store_arrive();
    cute::tma_store_wait<0>();
  }
}

// dK or dV, or a part of them.
template <class Traits, class Grad>
CUTLASS_DEVICE void store_of_keys(Params const& params, typename Traits::SharedStorage& storage,
                                  bwd::KeyTile const& tile, Place<Traits> const& place,
                                  int warpgroup, bool first, Grad& grad) {
  bool const of_value = place.role == 0;
  int const first_column = warpgroup * Traits::kColumns;
  int const columns = (of_value ? params.head_dim_v : params.head_dim) - first_column;
  bwd::GradRows const rows{
      {tile.n_block * Traits::kBlockN + place.side * 64, tile.head_k, tile.batch},
      params.mask.seqlen_k};
  auto const from_column = [&](Operand operand) {
    operand.data = static_cast<float*>(operand.data) + first_column;
    return operand;
  };
  if (params.dkv_partial != nullptr) {
    Operand const part = from_column(bwd::dkv_partial(params, tile.split, of_value));
    return bwd::accumulate_partial(grad, part, rows, columns, first);
  }
  if (params.dkv_fp32) {
    Operand const out = from_column(of_value ? params.dvalue_rows : params.dkey_rows);
    return bwd::store_grad_fp32(grad, out, rows, columns);
  }
  store_columns<Traits>(grad, of_value ? params.dvalue : params.dkey,
                        storage.resident + warpgroup * 64 * Traits::kColumns, rows, first_column,
                        columns, warpgroup);
}

// dQ, or its sum with other calls' so far, in an order of its own.
template <class Traits, class Grad>
CUTLASS_DEVICE void store_of_queries(Params const& params, typename Traits::SharedStorage& storage,
                                     TileCoord tile, Place<Traits> const& place, int warpgroup,
                                     float scale, Grad& grad) {
  bwd::GradRows const rows{
      {tile.block * Traits::kBlockM, tile.head, tile.batch}, params.mask.seqlen_q, warpgroup * 64};
  bwd::mark_broken_rows(params, tile.batch, tile.head, rows.of_thread(), grad);
  if (params.accumulates_dq || !params.finishes_dq) {
    constexpr int kSize = 64 * Traits::kColumns;
    int64_t const head = int64_t{tile.batch} * params.num_heads_q + tile.head;
    int64_t const index = head * params.dq_order.num_blocks + tile.block;
    float4* const sum =
        bwd::accum_of_thread(params.dq_accum + (index * 4 + place.role * 2 + warpgroup) * kSize);
    if (params.accumulates_dq) bwd::add_accum(sum, grad);
    if (!params.finishes_dq) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < size(grad); i += 4) {
        sum[i / 4 * 128] = float4{grad(i), grad(i + 1), grad(i + 2), grad(i + 3)};
      }
      return;
    }
  }
  bwd::scale_grad(grad, params.softmax_scale / scale);
  int const first_column = place.role * Traits::kColumns;
  // Its own resident rows, which the other warpgroup does not read.
  named_sync(NamedBarrier::kOfWarpgroup0, warpgroup, 128);
  store_columns<Traits>(grad, params.dquery, storage.resident + warpgroup * Traits::kSizeTile, rows,
                        first_column, params.head_dim - first_column, warpgroup);
}

}  // namespace jax_fa3::wide_bwd
