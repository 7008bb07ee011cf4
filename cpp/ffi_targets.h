// The custom calls: all operands and results of each, in XLA's order. Twin of jax_fa3/_targets.py,
// with which a test compares it. Once released, a target's table stays as it is.
#pragma once

#include "common/per_head.h"
#include "ffi_arrays.h"

namespace jax_fa3 {

// Sizes: b t n h of query, b s k of key, v of value's columns; of a packed array p = n + 2 k heads.
// Any column of key and value may be followed by others, and of heads some may be meant.
struct Inputs {
  Array query, key, value;
  Array query_offset, query_seq_lengths, key_value_seq_lengths, key_begin, key_end;
};

struct HeadArrays {
#define JAX_FA3_FIELD(name, ...) Array name;
  JAX_FA3_PER_HEAD(JAX_FA3_FIELD)
#undef JAX_FA3_FIELD
#define JAX_FA3_NAME(name, ...) name,
  std::vector<Array> all_of_heads() const { return {JAX_FA3_PER_HEAD(JAX_FA3_NAME)}; }
#undef JAX_FA3_NAME
};

struct Forward : Inputs, HeadArrays {
  Array out_before, lse_before;  // the result for other keys
  Array bias, dropout, relative_bias;
  Array mask_bits, mask_blocks;
  Array out, lse, lse_low;
  Array tile_counter, long_sums;
};

struct Backward : Inputs, HeadArrays {
  Array qkv;  // of a packed call, in place of query, key and value
  Array out, lse, dout, dlse, lse_low;
  Array summed_dq;  // dq_accum of the call before
  Array bias, dropout, relative_bias;
  Array mask_bits, mask_blocks;
  Array dquery, dkey, dvalue, dqkv;
  Array row_stats, row_intervals, query_blocks, dq_accum, turns, ranges, dkv_parts;
  Array dsinks;  // of some rows each
  Array dbias;
  Array dalibi, drelative;  // in parts
};

struct Fp8Forward : Inputs {
  Array query_scale, key_scale, value_scale, value_mean;
  Array sinks;
  Array value_transposed;  // in place of value: quantize's transposed
  Array out, lse;
  Array counters, transposed_value;
};

struct Quantization {
  Array x, signs, lengths, mean;
  Array quantized, scales;
  Array transposed;  // in place of quantized: [b, n, h, whole blocks of t]
};

struct BitsOfMask {
  Array mask;       // [1 or b, 1 or n, 1 or t, 1 or s], or
  Array intervals;  // [1 or b, 1, t, 2 m]
  Array bits, blocks;
};

struct Segments {
  Array query_segment_ids, key_value_segment_ids;
  Array key_begin, key_end;
};

// Results are tangents; out, lse and lse_low are the forward's results.
struct Tangent : Inputs {
  Array query_dot, key_dot, value_dot;
  Array out, lse, lse_low;
  Array sinks;
  Array out_dot, lse_dot;
  Array tile_counter;
};

// r rows of n heads, h columns; b sequences. Caches are of any layout that attributes describe.
struct Decoding {
  Array query, key_cache, value_cache;
  Array lengths, page_table, query_starts, num_sequences, key_begin, sinks;
  Array key_scale, value_scale;  // of an e4m3 cache
  Array out, lse;
  Array partials, arrivals;
};

// New rows of a cache, and attention to it behind them or not. Columns of a cache beside those that
// are meant, where it has more, stay as they are.
struct Appending : Decoding {
  Array key, value;
  Array positions, rotary_cos, rotary_sin;
  Array new_key_cache, new_value_cache;  // the caches, where they are
  Array rotated_query;
};

// clang-format off
// A row of a table: where the array goes, and its spec, by the one name.
#define JAX_FA3_ROW(Arrays, name, ...) {{#name, __VA_ARGS__}, &Arrays::name}
#define JAX_FA3_MASKS(Arrays)                                  \
    JAX_FA3_ROW(Arrays, query_offset, kInt32, "1|b|0"),        \
    JAX_FA3_ROW(Arrays, query_seq_lengths, kInt32, "b|0"),     \
    JAX_FA3_ROW(Arrays, key_value_seq_lengths, kInt32, "b|0"), \
    JAX_FA3_ROW(Arrays, key_begin, kInt32, "bt|0"),            \
    JAX_FA3_ROW(Arrays, key_end, kInt32, "bt|0")
#define JAX_FA3_COTANGENTS(Arrays)                     \
    JAX_FA3_ROW(Arrays, out, k16Bits, "btnv|0"),       \
    JAX_FA3_ROW(Arrays, lse, kFloat32, "bnt"),         \
    JAX_FA3_ROW(Arrays, dout, k16Bits, "btnv"),        \
    JAX_FA3_ROW(Arrays, dlse, kFloat32, "bnt|0"),      \
    JAX_FA3_ROW(Arrays, lse_low, kFloat32, "bnt|0")
#define JAX_FA3_ROW_OF_HEADS(name, Arrays) JAX_FA3_ROW(Arrays, name, kFloat32, "1n|bn|0"),
#define JAX_FA3_OF_BIAS "bnt.|1nt.|b1t.|11t.|bn1.|1n1.|b11.|111.|0"
// Terms of the scores, and what else hides or drops some of them. (Bits: problem.h.)
#define JAX_FA3_TERMS(Arrays)                                                       \
    JAX_FA3_ROW(Arrays, bias, k16BitsOrFloat32, JAX_FA3_OF_BIAS),                   \
    JAX_FA3_ROW(Arrays, mask_bits, kUInt32, "bn..|1n..|b1..|11..|0"),               \
    JAX_FA3_ROW(Arrays, mask_blocks, kUInt32, "bn...|1n...|b1...|11...|0"),         \
    JAX_FA3_ROW(Arrays, dropout, kUInt32, "bn.|0"),                                 \
    JAX_FA3_PER_HEAD(JAX_FA3_ROW_OF_HEADS, Arrays)                                  \
    JAX_FA3_ROW(Arrays, relative_bias, kFloat32, "1n..|bn..|0")
#define JAX_FA3_BWD_WORKSPACE(Arrays)                  \
    JAX_FA3_ROW(Arrays, row_stats, kFloat32, "*"),     \
    JAX_FA3_ROW(Arrays, row_intervals, kInt32, "*"),   \
    JAX_FA3_ROW(Arrays, query_blocks, kInt32, "*"),    \
    JAX_FA3_ROW(Arrays, dq_accum, kFloat32, "*"),      \
    JAX_FA3_ROW(Arrays, turns, kInt32, "*|0"),         \
    JAX_FA3_ROW(Arrays, ranges, kInt32, "*|0"),        \
    JAX_FA3_ROW(Arrays, dkv_parts, kFloat32, "*|0"),   \
    JAX_FA3_ROW(Arrays, dsinks, kFloat32, "bn.|0"),   \
    JAX_FA3_ROW(Arrays, dbias, kFloat32, JAX_FA3_OF_BIAS), \
    JAX_FA3_ROW(Arrays, dalibi, kFloat32, "bn.|0"),        \
    JAX_FA3_ROW(Arrays, drelative, kFloat32, "bn..|0")
// Where a KV cache has a sequence's rows, the scales of one in e4m3, and the rotation of new rows.
#define JAX_FA3_PLACES(Arrays)                           \
    JAX_FA3_ROW(Arrays, lengths, kInt32, "b"),           \
    JAX_FA3_ROW(Arrays, page_table, kInt32, "bw|0"),     \
    JAX_FA3_ROW(Arrays, query_starts, kInt32, ".|0"),    \
    JAX_FA3_ROW(Arrays, num_sequences, kInt32, "1|0")
#define JAX_FA3_SCALES(Arrays)                                     \
    JAX_FA3_ROW(Arrays, key_scale, kFloat32, "1|k|bk|p..|0"),      \
    JAX_FA3_ROW(Arrays, value_scale, kFloat32, "1|k|bk|p..|0")
#define JAX_FA3_ROTARY(Arrays)                                     \
    JAX_FA3_ROW(Arrays, positions, kInt32, "r|0"),                 \
    JAX_FA3_ROW(Arrays, rotary_cos, k16BitsOrFloat32, "lc|0"),     \
    JAX_FA3_ROW(Arrays, rotary_sin, k16BitsOrFloat32, "lc|0")
// clang-format on

inline Target<Forward> const kFwd = {
    "jax_fa3.fwd.v1",
    {
        JAX_FA3_ROW(Forward, query, k16Bits, "bt.h"),
        JAX_FA3_ROW(Forward, key, k16BitsOrWords, "bs.."),
        JAX_FA3_ROW(Forward, value, k16BitsOrWords, "bs.."),
        JAX_FA3_MASKS(Forward),
        JAX_FA3_ROW(Forward, out_before, kFloat32, "btnv|0", "out"),
        JAX_FA3_ROW(Forward, lse_before, kFloat32, "bnt|0", "lse"),
        JAX_FA3_TERMS(Forward),
    },
    {
        JAX_FA3_ROW(Forward, out, k16BitsOrFloat32, "btnv"),
        JAX_FA3_ROW(Forward, lse, kFloat32, "bnt"),
        JAX_FA3_ROW(Forward, lse_low, kFloat32, "bnt|0"),
        JAX_FA3_ROW(Forward, tile_counter, kInt32, "1"),
        JAX_FA3_ROW(Forward, long_sums, kFloat32, "*|0"),
    },
};

inline Target<Backward> const kBwd = {
    "jax_fa3.bwd.v1",
    {
        JAX_FA3_ROW(Backward, query, k16Bits, "btnh"),
        JAX_FA3_ROW(Backward, key, k16BitsOrWords, "bsk."),
        JAX_FA3_ROW(Backward, value, k16BitsOrWords, "bsk."),
        JAX_FA3_MASKS(Backward),
        JAX_FA3_COTANGENTS(Backward),
        JAX_FA3_ROW(Backward, summed_dq, kFloat32, "*|0", "dq_accum"),
        JAX_FA3_TERMS(Backward),
    },
    {
        JAX_FA3_ROW(Backward, dquery, k16Bits, "btnh|0"),
        JAX_FA3_ROW(Backward, dkey, k16BitsOrFloat32, "bskh"),
        JAX_FA3_ROW(Backward, dvalue, k16BitsOrFloat32, "bskv"),
        JAX_FA3_BWD_WORKSPACE(Backward),
    },
};

inline Target<Backward> const kBwdPacked = {
    "jax_fa3.bwd_packed.v1",
    {
        JAX_FA3_ROW(Backward, qkv, k16Bits, "btph"),
        JAX_FA3_MASKS(Backward),
        JAX_FA3_COTANGENTS(Backward),
        JAX_FA3_TERMS(Backward),
    },
    {
        JAX_FA3_ROW(Backward, dqkv, k16Bits, "btph"),
        JAX_FA3_BWD_WORKSPACE(Backward),
    },
};

inline Target<Fp8Forward> const kFwdFp8 = {
    "jax_fa3.fwd_fp8.v1",
    {
        JAX_FA3_ROW(Fp8Forward, query, kFloat8E4M3, "btnh"),
        JAX_FA3_ROW(Fp8Forward, key, kFloat8E4M3, "bskh"),
        JAX_FA3_ROW(Fp8Forward, value, kFloat8E4M3, "bskv|0"),
        JAX_FA3_ROW(Fp8Forward, query_scale, kFloat32, "bTn"),
        JAX_FA3_ROW(Fp8Forward, key_scale, kFloat32, "bSk"),
        JAX_FA3_ROW(Fp8Forward, value_scale, kFloat32, "bSk"),
        JAX_FA3_ROW(Fp8Forward, value_mean, kFloat32, "bkv|0"),
        JAX_FA3_MASKS(Fp8Forward),
        JAX_FA3_ROW(Fp8Forward, sinks, kFloat32, "1n|bn|0"),
        JAX_FA3_ROW(Fp8Forward, value_transposed, kFloat8E4M3, "bkv.|0"),
    },
    {
        JAX_FA3_ROW(Fp8Forward, out, k16BitsOrFloat32, "btnv"),
        JAX_FA3_ROW(Fp8Forward, lse, kFloat32, "bnt"),
        JAX_FA3_ROW(Fp8Forward, counters, kInt32, "*"),
        JAX_FA3_ROW(Fp8Forward, transposed_value, kUInt8, "*"),
    },
};

inline Target<Quantization> const kQuantize = {
    "jax_fa3.quantize.v1",
    {
        JAX_FA3_ROW(Quantization, x, k16Bits, "btnh"),
        JAX_FA3_ROW(Quantization, signs, kFloat32, "h|0"),
        JAX_FA3_ROW(Quantization, lengths, kInt32, "b|0"),
        JAX_FA3_ROW(Quantization, mean, kFloat32, "bnh|0"),
    },
    {
        JAX_FA3_ROW(Quantization, quantized, kFloat8E4M3, "btnh|0"),
        JAX_FA3_ROW(Quantization, scales, kFloat32, "bTn"),
        JAX_FA3_ROW(Quantization, transposed, kFloat8E4M3, "bnh.|0"),
    },
};

inline Target<Segments> const kSegmentIntervals = {
    "jax_fa3.segment_intervals.v1",
    {
        JAX_FA3_ROW(Segments, query_segment_ids, kInt32, "bt"),
        JAX_FA3_ROW(Segments, key_value_segment_ids, kInt32, "bs"),
    },
    {
        JAX_FA3_ROW(Segments, key_begin, kInt32, "bt"),
        JAX_FA3_ROW(Segments, key_end, kInt32, "bt"),
    },
};

inline Target<BitsOfMask> const kMaskBits = {
    "jax_fa3.mask_bits.v1",
    {
        JAX_FA3_ROW(BitsOfMask, mask, kBool, "*|0"),
        JAX_FA3_ROW(BitsOfMask, intervals, kInt32, "*|0"),
    },
    {
        JAX_FA3_ROW(BitsOfMask, bits, kUInt32, "*"),
        JAX_FA3_ROW(BitsOfMask, blocks, kUInt32, "*"),
    },
};

inline Target<Decoding> const kDecode = {
    "jax_fa3.decode.v1",
    {
        JAX_FA3_ROW(Decoding, query, k16Bits, "rnh"),
        JAX_FA3_ROW(Decoding, key_cache, k16BitsOrE4M3, "p...|p...."),
        JAX_FA3_ROW(Decoding, value_cache, k16BitsOrE4M3, "p...|p....|0"),
        JAX_FA3_PLACES(Decoding),
        JAX_FA3_ROW(Decoding, key_begin, kInt32, "b|0"),
        JAX_FA3_ROW(Decoding, sinks, kFloat32, "n|0"),
        JAX_FA3_SCALES(Decoding),
    },
    {
        JAX_FA3_ROW(Decoding, out, k16Bits, "rnv"),
        JAX_FA3_ROW(Decoding, lse, kFloat32, "rn"),
        JAX_FA3_ROW(Decoding, partials, kFloat32, "*"),
        JAX_FA3_ROW(Decoding, arrivals, kInt32, "*"),
    },
};

// Caches may have rows of any size.
inline Target<Appending> const kAppend = {
    "jax_fa3.append.v1",
    {
        JAX_FA3_ROW(Appending, key, k16BitsOrOther, "rkh"),
        JAX_FA3_ROW(Appending, value, k16BitsOrOther, "rkv"),
        JAX_FA3_ROW(Appending, key_cache, k16BitsOrOther, "*", "new_key_cache"),
        JAX_FA3_ROW(Appending, value_cache, k16BitsOrOther, "*|0", "new_value_cache"),
        JAX_FA3_PLACES(Appending),
        JAX_FA3_SCALES(Appending),
        JAX_FA3_ROW(Appending, query, k16Bits, "rnh|0"),
        JAX_FA3_ROTARY(Appending),
    },
    {
        JAX_FA3_ROW(Appending, new_key_cache, k16BitsOrOther, "*"),
        JAX_FA3_ROW(Appending, new_value_cache, k16BitsOrOther, "*|0"),
        JAX_FA3_ROW(Appending, rotated_query, k16Bits, "rnh|0"),
    },
};

// Appends, and attends to what it has written.
inline Target<Appending> const kAppendAndAttend = {
    "jax_fa3.append_and_attend.v1",
    {
        JAX_FA3_ROW(Appending, query, k16Bits, "rnh"),
        JAX_FA3_ROW(Appending, key, k16BitsOrE4M3, "rkh"),
        JAX_FA3_ROW(Appending, value, k16BitsOrE4M3, "rkv"),
        JAX_FA3_ROW(Appending, key_cache, k16BitsOrE4M3, "p...|p....", "new_key_cache"),
        JAX_FA3_ROW(Appending, value_cache, k16BitsOrE4M3, "p...|p....|0", "new_value_cache"),
        JAX_FA3_PLACES(Appending),
        JAX_FA3_ROW(Appending, key_begin, kInt32, "b|0"),
        JAX_FA3_ROW(Appending, sinks, kFloat32, "n|0"),
        JAX_FA3_SCALES(Appending),
        JAX_FA3_ROTARY(Appending),
    },
    {
        JAX_FA3_ROW(Appending, out, k16Bits, "rnv"),
        JAX_FA3_ROW(Appending, lse, kFloat32, "rn"),
        JAX_FA3_ROW(Appending, new_key_cache, k16BitsOrE4M3, "p...|p...."),
        JAX_FA3_ROW(Appending, new_value_cache, k16BitsOrE4M3, "p...|p....|0"),
        JAX_FA3_ROW(Appending, rotated_query, k16Bits, "rnh|0"),
        JAX_FA3_ROW(Appending, partials, kFloat32, "*"),
        JAX_FA3_ROW(Appending, arrivals, kInt32, "*"),
    },
};

inline Target<Tangent> const kJvp = {
    "jax_fa3.jvp.v1",
    {
        JAX_FA3_ROW(Tangent, query, k16Bits, "bt.h"),
        JAX_FA3_ROW(Tangent, key, k16Bits, "bs.."),
        JAX_FA3_ROW(Tangent, value, k16Bits, "bs.."),
        JAX_FA3_MASKS(Tangent),
        JAX_FA3_ROW(Tangent, query_dot, k16Bits, "bt.h"),
        JAX_FA3_ROW(Tangent, key_dot, k16Bits, "bs.."),
        JAX_FA3_ROW(Tangent, value_dot, k16Bits, "bs.."),
        JAX_FA3_ROW(Tangent, out, k16Bits, "btnv"),
        JAX_FA3_ROW(Tangent, lse, kFloat32, "bnt"),
        JAX_FA3_ROW(Tangent, lse_low, kFloat32, "bnt|0"),
        JAX_FA3_ROW(Tangent, sinks, kFloat32, "1n|bn|0"),
    },
    {
        JAX_FA3_ROW(Tangent, out_dot, k16Bits, "btnv"),
        JAX_FA3_ROW(Tangent, lse_dot, kFloat32, "bnt"),
        JAX_FA3_ROW(Tangent, tile_counter, kInt32, "1"),
    },
};

#undef JAX_FA3_ROW
#undef JAX_FA3_MASKS
#undef JAX_FA3_COTANGENTS
#undef JAX_FA3_BWD_WORKSPACE
#undef JAX_FA3_ROW_OF_HEADS
#undef JAX_FA3_OF_BIAS
#undef JAX_FA3_TERMS
#undef JAX_FA3_PLACES
#undef JAX_FA3_SCALES
#undef JAX_FA3_ROTARY

}  // namespace jax_fa3
