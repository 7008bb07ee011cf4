// What the decoding kernels get: descriptors and scalars, by value, in constant memory.
#pragma once

#include <cuda.h>

#include "common/score.h"
#include "common/softmax.h"
#include "decode/sequences.h"

namespace jax_fa3::decode {

// A tile whose positions are split over CTAs, the first of which it is that says so: for merge.h.
struct Split {
  int parts;  // 0: there is no such tile
  int first_row;
  int count;
  int head;  // of keys
  int tile;
  int behind;  // the first unit of the next CTA
  int total;   // units
};

struct Params {
  CUtensorMap key;     // [page, head, slot, h] with the strides that the cache has
  CUtensorMap value;   // [page, head, slot, v]
  void const* query;   // [rows, n, h]
  void* out;           // [rows, n, v]
  float* lse;          // [rows, n]
  float const* sinks;  // [n] or null
  Sequences sequences;
  Tiles tiles;
  int const* page_table;  // [b, pages_per_sequence] or null
  int pages_per_sequence;
  int num_pages;
  int page_size;
  int box_rows;  // of what TMA loads at once: it divides the page and the block
  int num_heads_q;
  int num_heads_k;
  int head_dim;
  int head_dim_v;
  float softmax_scale;  // of what `score` gives, in base e: with a soft cap it is the cap
  Exponents exponents;  // the same in base 2
  Score score;
  // For tiles that several CTAs share: what each of them has of its last one, and of its first one
  // in one part, or in one for each split.
  float* partial_out;  // [ctas, slots, slot_rows, v]
  float* partial_lse;  // [ctas, slots, slot_rows]
  Split* splits;       // [ctas]
  int slots;
  int slot_rows;
};

}  // namespace jax_fa3::decode
