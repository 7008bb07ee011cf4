// What the decoding kernels get: descriptors and scalars, by value, in constant memory.
#pragma once

#include <cuda.h>

#include "common/score.h"
#include "common/softmax.h"
#include "decode/decode.h"

namespace jax_fa3::decode {

struct Params {
  CUtensorMap key;    // [page, head, slot, h] with the strides that the cache has
  CUtensorMap value;  // [page, head, slot, v]
  // What is on the way to the first load stands together: constants come line by line.
  Sequences sequences;
  Tiles tiles;
  int const* page_table;  // [b, pages_per_sequence] or null
  int pages_per_sequence;
  int num_pages;
  Divider page_size;
  int box_rows;  // of what TMA loads at once: it divides the page and the block
  int boxes;     // of a block: 1 to 16
  // Where each tile has as much to do (shares.h): CTAs that share one in equal pieces.
  Divider shares;
  Divider heads;      // num_heads_k
  int tiles_of_cta;   // that it has, if they are not shared
  bool always_equal;  // whatever the lengths
  int cluster;        // shares, or 0 (cluster.h)
  int num_heads_k;
  bool appended;       // the kernel in front, which is overtaken, writes query, keys and values
  void const* query;   // [rows, n, h]
  void* out;           // [rows, n, v]
  float* lse;          // [rows, n]
  float const* sinks;  // [n] or null
  int num_heads_q;
  int head_dim;
  int head_dim_v;
  Scale key_scale;  // of an e4m3 cache
  Scale value_scale;
  float softmax_scale;  // of what `score` gives, in base e: with a soft cap it is the cap
  Exponents exponents;  // the same in base 2
  Score score;
  // For tiles that several CTAs share: what each of them has of its last one, and of its first one
  // in one part, or in one for each split.
  float* partial_out;  // [ctas, slots, slot_rows, v]
  float* partial_lse;  // [ctas, slots, slot_rows]
  uint64_t* arrivals;  // [ctas]: of the parts of the tile that the CTA has begun and others end
  Divider num_ctas;
  int slots;
  int slot_rows;

  // Of a tile of up to 8 rows a thread's second row is none.
  JAX_FA3_HOST_DEVICE bool has_one_row() const { return slot_rows <= 8; }
};

}  // namespace jax_fa3::decode
