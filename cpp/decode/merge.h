// Joins what several CTAs computed of one tile: the last of them that is done does it, or whoever
// finds all flagged parts; always in the same order, so results are the same bit by bit from run to
// run.
#pragma once

#include "common/fragment.h"
#include "common/softmax.h"
#include "decode/barriers.h"
#include "decode/parts.h"
#include "decode/schedule.h"
#include "decode/workspace.h"

namespace jax_fa3::decode {

// What a lane has of one row: four columns.
struct RowPart {
  float lse = -INFINITY;
  float4 out{0.f, 0.f, 0.f, 0.f};
};

// Past the L1, which does not know what other SMs write. A part that does not exist changes no sum;
// by predicates, for a choice made when the numbers are there would wait for each part by itself.
CUTLASS_DEVICE RowPart read_part(bool exists, float const* lse, float const* out) {
  RowPart x;
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.s32 p, %7, 0;\n@p ld.global.cg.f32 %0, [%5];\n"
      "@p ld.global.cg.v4.f32 {%1, %2, %3, %4}, [%6];\n}"
      : "+f"(x.lse), "+f"(x.out.x), "+f"(x.out.y), "+f"(x.out.z), "+f"(x.out.w)
      : "l"(lse), "l"(out), "r"(int{exists})
      : "memory");
  return x;
}

// Where four columns of a row are, of all parts of a tile. The first part is in its CTA's slot 0;
// of each other CTA there is one, or with splits one for each of them.
template <bool kSplits>
struct Parts {
  Params const& params;
  Work const& work;
  int row;
  int column;

  // Without splits the way from part to part is short: where 17 are read at once, code that runs
  // once is what takes long.
  CUTLASS_DEVICE RowPart operator()(int part, bool exists) const {
    int const first = exists ? part : 0;
    int in_cta = first * work.stride;
    int slot = first > 0;
    if (kSplits && first > 0) {
      Piece const piece(work.units, params.num_ctas);
      int const unit = piece.begin(work.owner + 1) + first - 1;
      in_cta = piece.cta(unit);
      slot = 1 + unit - piece.begin(in_cta);
      in_cta -= work.owner;
    }
    int64_t const begin = int64_t{work.owner} * params.slots * params.slot_rows + row;
    float const* const lses = params.partial_lse + begin;
    float const* const outs = params.partial_out + begin * params.head_dim_v + column;
    using Index = std::conditional_t<kSplits, int64_t, int>;
    Index const place = (Index{in_cta} * params.slots + slot) * params.slot_rows;
    Index const of_out = place * params.head_dim_v;
    return read_part(exists, lses + place, outs + of_out);
  }
};

// The sum of parts. With splits part after part, as a CTA joins those that it has itself.
template <bool kSplits>
struct Sum : RowPart {
  float weight = 0.f;  // of what is summed, relative to the largest log-sum-exp

  template <int kCount>
  CUTLASS_DEVICE void add(RowPart const (&parts)[kCount]) {
    if constexpr (kSplits) {
      CUTLASS_PRAGMA_UNROLL
      for (RowPart const& x : parts) {
        Joined const joined(lse, x.lse);
        out = {joined(out.x, x.out.x), joined(out.y, x.out.y), joined(out.z, x.out.z),
               joined(out.w, x.out.w)};
        lse = joined.lse;
      }
      return;
    }
    float largest = lse;  // a NaN comes back by its difference
    CUTLASS_PRAGMA_UNROLL
    for (RowPart const& x : parts) largest = fmaxf(largest, x.lse);
    float const offset = largest == -INFINITY ? 0.f : largest;
    float const before = exp2f((lse - offset) * kLog2E);
    weight *= before;
    out = {out.x * before, out.y * before, out.z * before, out.w * before};
    CUTLASS_PRAGMA_UNROLL
    for (RowPart const& x : parts) {
      float const w = exp2f((x.lse - offset) * kLog2E);
      weight += w;
      out = {fmaf(w, x.out.x, out.x), fmaf(w, x.out.y, out.y), fmaf(w, x.out.z, out.z),
             fmaf(w, x.out.w, out.w)};
    }
    lse = largest;
  }

  // Returns what `out` is to be multiplied with.
  CUTLASS_DEVICE float finish(Params const& params, int64_t index) {
    float scale = 1.f;
    if constexpr (!kSplits) {
      scale = weight == 0.f ? 0.f : 1.f / weight;
      lse = weight == 0.f ? -INFINITY : lse + logf(weight);
    }
    return add_sink(params, index, &lse) * scale;
  }
};

template <class Element>
CUTLASS_DEVICE void store_merged(Params const& params, int64_t index, int column, float4 out,
                                 float scale, float lse) {
  if (column >= params.head_dim_v) return;
  auto* const target = static_cast<uint16_t*>(params.out) + index * params.head_dim_v + column;
  *reinterpret_cast<uint2*>(target) = uint2{pack<Element>(out.x * scale, out.y * scale),
                                            pack<Element>(out.z * scale, out.w * scale)};
  if (column == 0) params.lse[index] = lse;
}

// A tile's rows by all consumers, a row by a warp. To read one part takes about as long as to read
// many: so those of kRows rows are on their way together, up to kParts of each.
template <class Traits, bool kSplits, int kRows, int kParts>
CUTLASS_DEVICE void join(Params const& params, Work const& work, int warp) {
  constexpr int kWarps = Traits::kWarpgroups * 4;
  OutRow const tile{work.sequence.first_row, work.sequence.count, work.head, work.tile};
  CUTLASS_PRAGMA_NO_UNROLL
  for (int first_row = warp; first_row < params.slot_rows; first_row += kRows * kWarps) {
    int64_t index[kRows];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      index[i] = tile.index(first_row + i * kWarps, Traits::kBlockM, params.tiles.group,
                            params.num_heads_q);
    }
    if (index[0] < 0) break;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int column = threadIdx.x % 32 * 4; column < params.head_dim_v; column += 128) {
      Sum<kSplits> sums[kRows];
      CUTLASS_PRAGMA_NO_UNROLL
      for (int first_part = 0; first_part < work.parts; first_part += kParts) {
        RowPart x[kRows][kParts];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kRows * kParts; ++i) {
          int const row = first_row + i / kParts * kWarps;
          int const part = first_part + i % kParts;
          bool const exists = index[i / kParts] >= 0 && part < work.parts;
          Parts<kSplits> const parts{params, work, min(row, params.slot_rows - 1), column};
          x[i / kParts][i % kParts] = parts(part, exists);
        }
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kRows; ++i) sums[i].add(x[i]);
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kRows; ++i) {
        if (index[i] < 0) continue;
        float const scale = sums[i].finish(params, index[i]);
        store_merged<typename Traits::Element>(params, index[i], column, sums[i].out, scale,
                                               sums[i].lse);
      }
    }
  }
}

// A tile's flagged parts. To ask which are there, and then to read them, is one way more to the L2:
// so each CTA reads them all behind its own, and joins what is whole. Of CTAs that do so at the
// same time one sees all parts, and if several do, they write the same.
template <class Traits>
class FlaggedTile {
 public:
  CUTLASS_DEVICE FlaggedTile(Params const& params, Work const& work, int thread)
      : params(params), work(work), thread(thread) {}

  // By all consumers, if there are no more parts. Returns whether all that the thread has read was
  // there.
  template <int kParts>
  CUTLASS_DEVICE bool join() const {
    OutRow const tile{work.sequence.first_row, work.sequence.count, work.head, work.tile};
    bool all = true;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int i = thread; i < params.slot_rows * kVectors; i += kThreads) {
      int const row = i / kVectors;
      int const column = i % kVectors * 4;
      RowPart x[kParts];
      all &= read(row, min(column, params.head_dim_v - 4), x);
      if (!all) return false;
      int64_t const index =
          tile.index(row, Traits::kBlockM, params.tiles.group, params.num_heads_q);
      if (index < 0) continue;
      Sum<false> sum;
      sum.add(x);
      float const scale = sum.finish(params, index);
      store_merged<typename Traits::Element>(params, index, column, sum.out, scale, sum.lse);
    }
    return all;
  }

  // By all consumers, if all have seen all: for the next call.
  CUTLASS_DEVICE void clear() const {
    int const vectors = params.slot_rows * params.head_dim_v / 2;
    CUTLASS_PRAGMA_NO_UNROLL
    for (int part = 0; part < work.parts; ++part) {
      FlaggedPart const x = this->part(part, 0);
      CUTLASS_PRAGMA_NO_UNROLL
      for (int i = thread; i < vectors; i += kThreads) store_relaxed(x.out + i, 0, 0);
      if (thread < params.slot_rows) store_relaxed(x.lse + thread, 0);
    }
  }

 private:
  static constexpr int kThreads = Traits::kWarpgroups * 128;
  static constexpr int kVectors = Traits::kHeadDimV / 4;

  CUTLASS_DEVICE FlaggedPart part(int part, int row) const {
    return {params, work.owner + part * work.stride, row};
  }
  // Four columns of a row, of all parts, which are on their way together.
  template <int kParts>
  CUTLASS_DEVICE bool read(int row, int column, RowPart (&x)[kParts]) const {
    FlaggedPart const first = part(0, row);
    ulonglong2 const* const outs = first.out + column / 2;
    int const step = work.stride * params.slots * params.slot_rows;  // floats for each column
    uint32_t others = 0;
    auto const number = [&](uint64_t x) {
      others |= static_cast<uint32_t>(x >> 32) ^ kIsThere;
      return __uint_as_float(static_cast<uint32_t>(x));
    };
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kParts; ++i) {
      bool const exists = i < work.parts;
      int const to = exists ? i * step : 0;
      uint64_t const lse = load_relaxed(first.lse + to / 2);
      ulonglong2 const a = load_relaxed(outs + to * params.head_dim_v / 4);
      ulonglong2 const b = load_relaxed(outs + to * params.head_dim_v / 4 + 1);
      RowPart const one{number(lse), float4{number(a.x), number(a.y), number(b.x), number(b.y)}};
      if (exists) x[i] = one;
    }
    return others == 0;
  }

  Params const& params;
  Work const& work;
  int const thread;
};

// Counts arrivals in memory that may hold anything: nothing yet, unless its upper 48 bits, which
// are NaNs that no computation makes, say that it holds a count. So no kernel need zero it in
// front. The last arrival leaves 0.
using Counter = unsigned long long;
inline constexpr Counter kCounts = 0x7fb5'ff9b'7fe7'0000;
CUTLASS_DEVICE int count_of(Counter held) {
  return (held & ~Counter{0xffff}) == kCounts ? static_cast<int>(held & 0xffff) : 0;
}

// Returns whether this is the last of `count`. held: what the counter held a while ago.
CUTLASS_DEVICE bool arrives_last(Counter* counter, Counter held, int count) {
  for (;;) {
    int const before = count_of(held);
    bool const is_last = before + 1 == count;
    Counter const found = atomicCAS(counter, held, is_last ? 0 : kCounts + before + 1);
    if (found == held) return is_last;
    held = found;
  }
}

// All consumers, at the end of a work that may complete the CTA's part of a tile. Where each CTA
// has one part of one tile (shares.h), and all are done at once, to count takes long: a failed
// exchange takes as long as one that does not fail. There each CTA has a word of its own.
template <class Traits>
class Arrival {
 public:
  // Before the part is stored. If all others have arrived by now, nobody else is to see it.
  CUTLASS_DEVICE Arrival(Params const& params, typename Traits::SharedStorage& storage,
                         Work const& work, int stage)
      : params(params), work(work), is_last(storage.is_last[stage]) {
    if (work.parts == 0 || work.flagged) return;
    if (work.equal) {
      // The last warp, which has the fewest rows to store.
      if (thread() >= kThreads - 32) set_last(others_are_done());
    } else if (thread() == 0) {
      is_last = count_of(load(word(0))) + 1 == work.parts;
    }
  }

  // When it is, and completes the part.
  CUTLASS_DEVICE void join_if_last() {
    if (Traits::kFlags && work.flagged) {
      asm volatile("fence.sc.gpu;" ::: "memory");
      meet();
      FlaggedTile<Traits> const tile(params, work, thread());
      bool const all = work.parts <= 4 ? tile.template join<4>() : tile.template join<8>();
      if (all_of(all)) tile.clear();
      return;
    }
    meet();
    if (!is_last) {
      Counter const held = thread() == 0 ? __ldcg(word(0)) : 0;
      __threadfence();
      meet();
      if (work.equal) {
        if (thread() < 32) set_last(tell());
      } else if (thread() == 0) {
        is_last = arrives_last(word(0), held, work.parts);
      }
      meet();
      if (!is_last) return;
      __threadfence();
    }
    for (int i = thread(); i < (work.equal ? work.parts : 1); i += kThreads) *word(i) = 0;
    if (params.tiles.split > 0) {
      join<Traits, true, 1, 8>(params, work, thread() / 32);
    } else if (params.slot_rows <= kThreads / 32 && work.parts > 8) {
      join<Traits, false, 1, Traits::kHeadDim <= 128 ? 17 : 8>(params, work, thread() / 32);
    } else {
      join<Traits, false, 2, 8>(params, work, thread() / 32);
    }
  }

 private:
  static constexpr int kThreads = Traits::kWarpgroups * 128;
  CUTLASS_DEVICE static int thread() { return threadIdx.x - (Traits::kThreads - kThreads); }
  CUTLASS_DEVICE static void meet() {
    cutlass::arch::NamedBarrier::sync(kThreads, barrier_id(NamedBarrier::kPartsStored, 0));
  }
  // Whether all threads say so, who meet.
  CUTLASS_DEVICE static bool all_of(bool own) {
    int all;
    asm volatile(
        "{\n.reg .pred p, q;\nsetp.ne.s32 p, %1, 0;\n"
        "barrier.cta.red.and.pred q, %2, %3, p;\nselp.s32 %0, 1, 0, q;\n}"
        : "=r"(all)
        : "r"(int{own}), "n"(8 + static_cast<int>(NamedBarrier::kPartsStored)), "n"(kThreads)
        : "memory");
    return all != 0;
  }
  CUTLASS_DEVICE Counter* word(int part) const {
    return reinterpret_cast<Counter*>(params.arrivals + work.owner + part * work.stride);
  }
  CUTLASS_DEVICE static Counter load(Counter const* from) {
    Counter x;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(from) : "memory");
    return x;
  }
  CUTLASS_DEVICE void set_last(bool last) {
    if (threadIdx.x % 32 == 0) is_last = last;
  }

  // By one warp. The word that says it is a count of one.
  CUTLASS_DEVICE bool others_are_done() const {
    int const own = static_cast<int>(blockIdx.x);
    bool done = true;
    for (int i = threadIdx.x % 32; i < work.parts; i += 32) {
      done &= work.owner + i * work.stride == own || load(word(i)) == kCounts + 1;
    }
    return __all_sync(~0u, done);
  }

  // By one warp, when all threads' stores are fenced. Of those who tell at the same time at least
  // one sees all others, and if several do, they write the same.
  CUTLASS_DEVICE bool tell() const {
    auto* const own = reinterpret_cast<Counter volatile*>(params.arrivals + blockIdx.x);
    if (thread() == 0) *own = kCounts + 1;
    __syncwarp();
    asm volatile("fence.sc.gpu;" ::: "memory");
    return others_are_done();
  }

  Params const& params;
  Work const& work;
  bool& is_last;  // in shared memory
};

}  // namespace jax_fa3::decode
