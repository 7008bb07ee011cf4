// The kernels that there are, and the tiles of each: jax_fa3/kernel_sizes.def as C++.
#pragma once

#include <iterator>

#include "problem.h"

namespace jax_fa3 {

struct KernelSize {
  int head_dim;
  int head_dim_v;
  bool has_fp8;
  int block_m;
  int block_m_few_keys;
  int block_n;
  bool out_over_value;

  constexpr bool holds(int other, int other_v) const {
    return other <= head_dim && other_v <= head_dim_v;
  }
  // O of 64 rows is too wide for one warpgroup: these have kernels of their own (wide/).
  constexpr bool is_wide() const { return head_dim_v > 256; }
  // The head dim that the backward computes with, if there is one so wide.
  constexpr int bwd_head_dim() const { return head_dim > head_dim_v ? head_dim : head_dim_v; }
  constexpr bool has_bwd() const;
};

struct BwdTile {
  int head_dim;  // with which the kernel computes
  int block_m;
  int block_n;
  bool fused;
};

struct JvpTile {
  int head_dim;  // of query, key and value
  int block_m;
  int block_n;
  int stages;

  constexpr bool holds(int other, int other_v) const {
    return other <= head_dim && other_v <= head_dim;
  }
};

struct DTypeName {
  char const* name;
  DType dtype;
};

inline constexpr DTypeName kDTypeNames[] = {
#define DTYPE(name, dtype) {#name, DType::dtype},
#include "../jax_fa3/kernel_sizes.def"
};

inline constexpr KernelSize kKernelSizes[] = {
#define KERNEL_SIZE(...) {__VA_ARGS__},
#include "../jax_fa3/kernel_sizes.def"
};

inline constexpr BwdTile kBwdTiles[] = {
#define BWD_TILE(...) {__VA_ARGS__},
#include "../jax_fa3/kernel_sizes.def"
};

inline constexpr JvpTile kJvpTiles[] = {
#define JVP_TILE(...) {__VA_ARGS__},
#include "../jax_fa3/kernel_sizes.def"
};

#define BWD_QUERY_ROWS(rows) inline constexpr int kBwdQueryRows = rows;
#include "../jax_fa3/kernel_sizes.def"

// The first that holds these head dims, or else the last.
constexpr KernelSize size_for(int head_dim, int head_dim_v) {
  KernelSize found{};
  for (KernelSize const& size : kKernelSizes) {
    found = size;
    if (size.holds(head_dim, head_dim_v)) break;
  }
  return found;
}

// The largest size: other head dims fit some kernel only if they fit this one.
inline constexpr KernelSize kWidest = [] {
  KernelSize widest{};
  for (KernelSize const& size : kKernelSizes) {
    if (size.holds(widest.head_dim, widest.head_dim_v)) widest = size;
  }
  return widest;
}();

constexpr bool KernelSize::has_bwd() const {
  return head_dim > 0 && bwd_head_dim() <= std::end(kBwdTiles)[-1].head_dim;
}

constexpr BwdTile bwd_tile(int head_dim) {
  BwdTile found{};
  for (BwdTile const& tile : kBwdTiles) {
    found = tile;
    if (head_dim <= tile.head_dim) break;
  }
  return found;
}

// The tile of the tangent kernel for this head dim, which is one of those listed.
constexpr JvpTile jvp_tile(int head_dim) {
  for (JvpTile const& tile : kJvpTiles) {
    if (tile.head_dim == head_dim) return tile;
  }
  return {};
}

}  // namespace jax_fa3
