// The end of a tile: the tangents of the log-sum-exp and of O.
#pragma once

#include "common/fragment.h"
#include "fwd/epilogue.h"
#include "jvp/scores.h"

namespace jax_fa3::jvp {

template <class Traits, class Out>
CUTLASS_DEVICE void store(Params const& params, TileCoord tile, int first_row,
                          Interval const (&intervals)[kRowsPerThread], Rows const& rows,
                          Out& tOrO) {
  using Element = typename Traits::Element;
  int const seqlen_q = params.mask.seqlen_q;
  int64_t const index = (int64_t{tile.batch} * params.num_heads_q + tile.head) * seqlen_q;
  fwd::Sink const sink = fwd::sink_of(params, tile);
  auto const row_of = [&](Operand const& operand, int row) {
    return static_cast<uint16_t*>(operand.data) + tile.batch * operand.batch_stride +
           tile.head * operand.head_stride + row * operand.seqlen_stride;
  };
  CUTLASS_PRAGMA_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    int const row = first_row + r * 8;
    // The weights of keys add up to 1, but for that of the sink, whose tangent is not known here.
    float of_lse = quad_sum(rows.sum[r]) + rows.center[r];
    float of_out = quad_sum(rows.sum_of_rounded[r]);
    if (!sink.is_none()) {
      float const less =
          rows.center[r] * exp2f(sink.score * kLog2E - rows.lse[r] - rows.lse_low[r]);
      of_lse -= less;
      of_out -= less;
    }
    if (row >= seqlen_q) continue;
    bool const empty = intervals[r].empty();
    float const nothing = intervals[r].broken() ? NAN : 0.f;
    if (threadIdx.x % 4 == 0) params.lse_dot[index + row] = empty ? nothing : of_lse;
    uint16_t const* const out = row_of(params.out_rows, row);
    uint16_t* const out_dot = row_of(params.out_dot, row);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 2 * r; i < size(tOrO); i += 4) {
      int const column = fragment_column(i) + threadIdx.x % 4 * 2;
      if (column >= params.head_dim_v) continue;
      uint32_t const pair = *reinterpret_cast<uint32_t const*>(out + column);
      float const low = tOrO(i) - of_out * unpack<Element>(pair, 0);
      float const high = tOrO(i + 1) - of_out * unpack<Element>(pair, 1);
      *reinterpret_cast<uint32_t*>(out_dot + column) =
          pack<Element>(empty ? nothing : low, empty ? nothing : high);
    }
  }
}

}  // namespace jax_fa3::jvp
