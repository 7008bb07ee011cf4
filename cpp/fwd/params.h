// What the forward kernel gets: descriptors and scalars, by value, in constant memory.
#pragma once

#include <cuda.h>

#include "common/mask.h"
#include "common/mask_bits.h"
#include "common/per_head.h"
#include "common/score.h"
#include "common/softmax.h"
#include "common/term_params.h"
#include "fwd/order.h"

namespace jax_fa3::fwd {

struct Params {
  CUtensorMap query;  // [b, t, n, h]
  CUtensorMap key;    // [b, s, k, h]
  CUtensorMap value;  // [b, s, k, v]
  CUtensorMap out;    // [b, t, n, v], unused where out_fp32 is set
  float* out_fp32;    // [b, t, n, v] or null
  float* lse;         // [b, n, t]
  float* lse_low;     // [b, n, t] or null: what lse lost to rounding, in base 2
  // Room of each CTA for sums of O over more keys than the accumulators take (long_sums.h), or
  // null.
  float* long_sums;
  // [b, t, n, v] or null: the result for the keys of other calls, to be accumulated with this
  // call's; its log-sum-exp is in lse.
  float const* out_accum;
  Mask mask;
  Order order;
  int* tile_counter;  // 0 at the start, or null: tiles are dealt in fixed rounds
  int num_heads_q;
  int group;  // query heads of one key/value head
  int head_dim_v;
  int64_t out_batch_stride, out_seqlen_stride, out_head_stride;  // of the fp32 ones, in elements
  float softmax_scale;  // of what `score` gives, in base e: with a soft cap it is the cap
  Exponents exponents;  // the same in base 2
  Score score;
  HeadOperands heads;
};

// Keys of the one block that stays in shared memory for all tiles of a head.
inline constexpr int kShortKeys = 80;

// Of the kernel whose keys stay in shared memory: a CTA's tiles follow one another.
struct ShortParams : Params {};

// Of the kernel whose tiles may be shared by CTAs (parts.h).
struct ManyParams : Params {
  int batch;       // of query; a tile's counts the splits, too: split * batch + that of query
  int num_splits;  // CTAs that share a tile's keys
};

using BiasParams = WithBias<Params>;
using BitsParams = WithBits<Params>;
using DropoutParams = WithDropout<Params>;
using AlibiParams = WithAlibi<Params>;
using RelativeParams = WithRelativeBias<Params>;

}  // namespace jax_fa3::fwd
