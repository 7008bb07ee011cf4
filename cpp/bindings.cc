// The Python module jax_fa3._C: XLA's handlers, what was built, and the plan's pure functions.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bwd_splits.h"
#include "common/mask.h"
#include "common/tile_rows.h"
#include "common/tile_scheduler.h"
#include "dispatch.h"
#include "ffi.h"
#include "ffi_targets.h"
#include "fwd/order.h"
#include "fwd_splits.h"
#include "plan.h"

namespace nb = nanobind;

namespace {

// Calls f with each target's table and its handler.
template <class F>
void for_each_target(F const& f) {
  f(jax_fa3::kFwd, jax_fa3_fwd);
  f(jax_fa3::kBwd, jax_fa3_bwd);
  f(jax_fa3::kBwdPacked, jax_fa3_bwd_packed);
  f(jax_fa3::kFwdFp8, jax_fa3_fwd_fp8);
  f(jax_fa3::kQuantize, jax_fa3_quantize);
  f(jax_fa3::kSegmentIntervals, jax_fa3_segment_intervals);
  f(jax_fa3::kDecode, jax_fa3_decode);
  f(jax_fa3::kAppend, jax_fa3_append);
  f(jax_fa3::kAppendAndAttend, jax_fa3_append_and_attend);
  f(jax_fa3::kJvp, jax_fa3_jvp);
  f(jax_fa3::kMaskBits, jax_fa3_mask_bits);
}

nb::dict ffi_targets() {
  nb::dict targets;
  for_each_target([&](auto const& target, auto* handler) {
    targets[target.name] = nb::capsule(reinterpret_cast<void*>(handler));
  });
  return targets;
}

nb::dict ffi_arrays() {
  nb::dict tables;
  auto const rows = [](auto const& slots) {
    std::vector<std::tuple<std::string, std::vector<std::string>, bool>> found;
    for (auto const& slot : slots) {
      found.emplace_back(slot.spec.name, names_of(slot.spec.dtypes), slot.spec.is_optional());
    }
    return found;
  };
  for_each_target([&](auto const& target, auto*) {
    tables[target.name] = std::pair{rows(target.operands), rows(target.results)};
  });
  return tables;
}

std::vector<std::tuple<std::string, int, int>> kernels() {
  std::vector<std::tuple<std::string, int, int>> built;
  for (auto const& [name, dtype] : jax_fa3::kDTypeNames) {
    for (auto const& size : jax_fa3::kKernelSizes) {
      if (jax_fa3::has_kernel(dtype, size))
        built.emplace_back(name, size.head_dim, size.head_dim_v);
    }
  }
  return built;
}

// The newest CUDA that the NVIDIA driver runs, such as 13000; 0 where there is no driver. Makes no
// context.
int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

// The mask of one batch entry as the kernels see it; closed forms only.
jax_fa3::Mask closed_form_mask(int seqlen_q, int seqlen_k, int64_t window_left,
                               int64_t window_right, int const* query_offset, int const* length_q,
                               int const* length_k) {
  return {seqlen_q, seqlen_k, window_left, window_right, query_offset,
          0,        length_q, length_k,    nullptr,      nullptr};
}

}  // namespace

NB_MODULE(_C, module) {
  module.def("ffi_targets", &ffi_targets, "Name -> capsule of every XLA FFI handler.");
  module.def("ffi_arrays", &ffi_arrays,
             "Target -> its operands and its results, each (name, dtypes, whether optional).");
  module.def("ffi_api_version", [] { return std::pair{XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR}; });
  module.def("driver_version", &driver_version, "The newest CUDA that the driver runs, or 0.");
  module.def("runtime_version", [] { return CUDART_VERSION; });
  module.def("kernels", &kernels, "(dtype, head_dim, head_dim_v) of every kernel built.");
  module.def("tile", [](int head_dim, int head_dim_v, bool few_keys) {
    auto const tile = jax_fa3::fwd_tile(head_dim, head_dim_v, few_keys);
    return std::pair{tile.block_m, tile.block_n};
  });
  module.def("bwd_tile", [](int head_dim) {
    auto const tile = jax_fa3::bwd_tile(head_dim);
    return std::tuple{tile.head_dim, tile.block_m, tile.block_n, tile.fused};
  });
  module.attr("bwd_query_rows") = jax_fa3::kBwdQueryRows;
  module.def("bwd_workspace", [](int batch, int seqlen_q, int num_heads_q, int num_heads_k,
                                 int head_dim, bool sums_dq) {
    auto const w =
        jax_fa3::bwd_workspace(batch, seqlen_q, num_heads_q, num_heads_k, head_dim, sums_dq);
    return std::tuple{w.row_stats, w.row_intervals, w.query_blocks, w.dq_accum, w.turns, w.ranges};
  });
  module.def("fwd_long_sums", [](int seqlen_k, int head_dim, int head_dim_v) {
    auto const kernel = jax_fa3::kernel_size(head_dim, head_dim_v);
    bool const has_long_sums = kernel.head_dim > 0 && !kernel.is_wide();
    if (seqlen_k <= jax_fa3::kMostKeysOfSum || !has_long_sums) return int64_t{0};
    int const block_m = jax_fa3::fwd_tile(kernel.head_dim, kernel.head_dim_v, false).block_m;
    return jax_fa3::kMostCtas * jax_fa3::long_sums_of_cta(block_m, kernel.head_dim_v);
  });
  module.def("fwd_splits", [](std::tuple<int, int, int, int, int, int, int> const& sizes) {
    auto const [batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v] = sizes;
    auto const kernel = jax_fa3::kernel_size(head_dim, head_dim_v);
    if (kernel.head_dim == 0 || kernel.is_wide() || seqlen_k > jax_fa3::kMostKeysOfSum) return 1;
    return jax_fa3::fwd_splits({batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v},
                               jax_fa3::fwd_tile(kernel.head_dim, kernel.head_dim_v, false));
  });
  module.def("bwd_splits", [](std::tuple<int, int, int, int, int, int, int> const& sizes,
                              std::pair<int64_t, int64_t> window, bool masked, bool in_turn) {
    auto const [batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v] = sizes;
    auto const kernel = jax_fa3::kernel_size(head_dim, head_dim_v);
    int const kernel_head_dim = kernel.has_bwd() ? kernel.bwd_head_dim() : 0;
    return jax_fa3::bwd_splits({batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, head_dim_v},
                               kernel_head_dim, window.first, window.second, masked, in_turn);
  });
  module.def("heads_per_section", &jax_fa3::heads_per_section);
  module.def(
      "tile_order", [](int num_m_blocks, int num_heads, int batch, int section, bool short_last) {
        jax_fa3::TileOrder const order{num_m_blocks, num_heads, batch, section, false, short_last};
        std::vector<std::tuple<int, int, int>> tiles;
        for (int index = 0; index < order.num_tiles(); ++index) {
          auto const tile = order(index);
          tiles.emplace_back(tile.block, tile.head, tile.batch);
        }
        return tiles;
      });
  module.def("fwd_tile_order",
             [](int num_m_blocks, int num_heads, int batch, int section, int group) {
               jax_fa3::fwd::Order order{{num_m_blocks, num_heads, batch, section}};
               order.make_early(group);
               std::vector<std::tuple<int, int, int>> tiles;
               for (int index = 0; index < order.num_tiles(); ++index) {
                 auto const tile = order(index);
                 tiles.emplace_back(tile.block, tile.head, tile.batch);
               }
               return tiles;
             });
  module.def("tile_of_round", &jax_fa3::tile_of_round);
  module.def("row_interval",
             [](int row, int seqlen_q, int seqlen_k, int64_t window_left, int64_t window_right,
                int query_offset, int length_q, int length_k) {
               auto const interval = closed_form_mask(seqlen_q, seqlen_k, window_left, window_right,
                                                      &query_offset, &length_q, &length_k)
                                         .row_interval(0, row);
               return std::pair{interval.begin, interval.end};
             });
  module.def("row_interval_of_arrays", [](int key_begin, int key_end, int seqlen_k,
                                          int64_t window_left, int length_q, bool of_tile) {
    jax_fa3::Mask mask = closed_form_mask(1, seqlen_k, window_left, jax_fa3::kUnbounded, nullptr,
                                          &length_q, nullptr);
    mask.key_begin = &key_begin;
    mask.key_end = &key_end;
    auto const interval = of_tile ? jax_fa3::TileRows(mask, 0, 0)(0) : mask.row_interval(0, 0);
    return std::tuple{interval.begin, interval.end, interval.broken()};
  });
  module.def(
      "tile_rows", [](int first_row, int count, int seqlen_q, int seqlen_k, int64_t window_left,
                      int64_t window_right, int query_offset, int length_q, int length_k) {
        jax_fa3::TileRows const rows(closed_form_mask(seqlen_q, seqlen_k, window_left, window_right,
                                                      &query_offset, &length_q, &length_k),
                                     0, first_row);
        std::vector<std::pair<int, int>> intervals;
        for (int i = 0; i < count; ++i) intervals.emplace_back(rows(i).begin, rows(i).end);
        auto const hull = rows.hull(0, count);
        return std::pair{intervals,
                         std::tuple{hull.min_begin, hull.max_begin, hull.min_end, hull.max_end}};
      });
  module.def("block_range", [](std::vector<std::pair<int, int>> const& rows, int block) {
    jax_fa3::IntervalHull hull;
    for (auto const& [begin, end] : rows) hull.add({begin, end});
    auto const blocks = hull.blocks(block);
    return std::tuple{blocks.begin, blocks.full_begin, blocks.full_end, blocks.end};
  });
}
