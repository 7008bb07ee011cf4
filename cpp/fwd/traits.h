// Shape of the machine code of one forward kernel: tile, warpgroups, registers, shared memory.
#pragma once

#include <algorithm>
#include <cute/tensor.hpp>
#include <tuple>
#include <type_traits>

#include "common/barriers.h"
#include "common/bias.h"
#include "common/layouts.h"
#include "common/mask.h"
#include "common/softmax.h"
#include "common/tile_rows.h"
#include "common/tile_scheduler.h"
#include "common/wgmma.h"
#include "fwd/barriers.h"
#include "fwd/first_block.h"
#include "fwd/params.h"
#include "fwd/wgmma_long.h"
#include "plan.h"

namespace jax_fa3::fwd {

using namespace cute;

// The kinds of forward kernels.
//
// Seven differ by how many keys there are for a tile. kShort: one block holds all, and nothing is
// masked; it stays in shared memory while a CTA goes through tiles of the same head. kFew: tiles
// have fewer query rows. kMany: O is summed in memory, too (long_sums.h), or several CTAs share a
// tile (parts.h). That code is in a kernel of its own: though never run, it costs a causal forward
// of 2,048 keys 2 %. kRest: nothing is masked, and the last block has few keys (kRestKeys): it is
// that short. kTall: tiles have more query rows, so that K and V are read less often. kLong:
// nothing is masked, and blocks have more keys.
//
// The others have what few calls have:
// kBias: a dense bias (common/bias.h), whose slabs need memory, and registers: so two consumers.
// kBits: a dense mask (common/mask_bits.h), whose blocks are 128 x 128.
// kDropout: dropout on the weights (common/dropout.h).
// kAlibi: slopes (common/alibi.h), whose operands need memory.
// kRelative: a bias by distance (common/relative_bias.h).
enum class Kind {
  kFew,
  kUsual,
  kMany,
  kBias,
  kBits,
  kDropout,
  kAlibi,
  kRelative,
  kShort,
  kRest,
  kTall,
  kLong
};
// What the kernel of each gets, in their order.
using ParamsOfKind = std::tuple<Params, Params, ManyParams, BiasParams, BitsParams, DropoutParams,
                                AlibiParams, RelativeParams, ShortParams, Params, Params, Params>;

// The tile where rows see few keys. What takes time there is a tile's beginning and end, so small
// ones take turns: of three CTAs on an SM, each with one consumer warpgroup.
constexpr bool has_small_tile(int head_dim) { return head_dim == 64; }
constexpr FwdTile few_keys_tile(int head_dim, int head_dim_v) {
  return has_small_tile(head_dim) ? FwdTile{64, 64, false} : fwd_tile(head_dim, head_dim_v, true);
}

// Of kRest: at most so many keys are in a last block, behind at least one other. Where tiles have
// 128 keys, of heads that class tokens and registers make so long (1,029 keys, 257).
constexpr int kRestKeys = 32;
constexpr bool has_rest_kernel(int head_dim, int head_dim_v) {
  return head_dim == 128 && head_dim_v == 128;
}

// Of kTall, at head dims 96 and 128, and of kLong, at 128.
constexpr FwdTile tall_tile(int head_dim) { return {192, head_dim == 96 ? 96 : 80, false}; }
constexpr FwdTile kLongTile{128, 176, true};
constexpr bool has_tall_tile(int head_dim, int head_dim_v) {
  return head_dim == head_dim_v && (head_dim == 96 || head_dim == 128);
}
constexpr bool has_long_tile(int head_dim, int head_dim_v) {
  return head_dim == 128 && head_dim_v == 128;
}

template <class Element_, int kHeadDim_, int kHeadDimV_, Kind kKind_>
struct Traits {
  static constexpr bool kHasBias = kKind_ == Kind::kBias;
  static constexpr bool kHasBits = kKind_ == Kind::kBits;
  static constexpr bool kHasDropout = kKind_ == Kind::kDropout;
  static constexpr bool kHasAlibi = kKind_ == Kind::kAlibi;
  static constexpr bool kHasRelative = kKind_ == Kind::kRelative;
  static constexpr bool kSharesKeys = kKind_ == Kind::kMany;
  using Params = std::tuple_element_t<static_cast<int>(kKind_), ParamsOfKind>;
  using Softmax = SoftmaxByParts;
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kHeadDimV = kHeadDimV_;
  static constexpr Kind kKind = kKind_;
  static constexpr FwdTile kTile = kHasBits                ? FwdTile{kMaskBlock, kMaskBlock, false}
                                   : kKind == Kind::kShort ? FwdTile{64, kShortKeys, false}
                                   : kKind == Kind::kTall  ? tall_tile(kHeadDim)
                                   : kKind == Kind::kLong  ? kLongTile
                                   : kKind == Kind::kFew   ? few_keys_tile(kHeadDim, kHeadDimV)
                                                         : fwd_tile(kHeadDim, kHeadDimV, kHasBias);
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr bool kOutOverValue = kTile.out_over_value;
  static constexpr bool kKeysStay = kKind == Kind::kShort;
  static constexpr bool kHasRest = kKind == Kind::kRest;
  static constexpr bool kMasksFirstAlone = kKind == Kind::kLong;  // no other block is masked
  static constexpr bool kAccumulates = !kKeysStay;  // onto the result for the keys of other calls
  static constexpr bool kHasLseLow = true;
  static constexpr int kStages = kKeysStay ? 1 : 2;  // of K and of V
  // Whether a masked first block goes by parts (first_block.h), and a tile's rows are ended beside
  // its last P V. Not where keys are very many: there registers are few as it is. (With slopes it
  // is slower by 1 % at head dim 128, as much faster at 64.)
  static constexpr bool kByParts = !kHasBits && !(kHasAlibi && kBlockM <= kBlockN) && !kSharesKeys;
  static constexpr bool kEndsRowsEarly = !kSharesKeys;
  // Tiles taken ahead: just the one whose loads begin while this one is finished. A CTA that took
  // more would keep the last tiles from CTAs that have nothing left.
  static constexpr int kWorkStages = 1;

  // One producer warpgroup (a warp loads, a warp schedules), then the consumers, 64 rows each.
  static constexpr int kConsumerWarpgroups = kBlockM / 64;
  static constexpr int kCtasPerSm = kConsumerWarpgroups == 1 ? 3 : 1;
  static constexpr bool kPingPong = true;
  // Whether S takes Q from registers, where there is room: a block of K alone is then what its
  // wgmmas read from shared memory.
  static constexpr bool kQueryInRegisters =
      kKind == Kind::kUsual && kConsumerWarpgroups == 2 && kHeadDim <= 128;
  // Exponents stay relative to a maximum that is nearly right (softmax.h), which saves most of the
  // rescaling. (With dropout sum_of_rounded() has the largest weight, dropped or not: where it was
  // dropped, what is left is off by less than its own rounding.)
  static constexpr bool kKeepsOffset = !kKeysStay;
  // Maxima of three numbers at once: as fast as of two, or they spilled, in masked blocks of two
  // warpgroups with dropout.
  static constexpr bool kMaxOfThree = !kHasDropout || kConsumerWarpgroups == 3;
  // Whether a warpgroup leaves out those of the tile's key blocks that its own 64 rows do not see,
  // and masks only what is not full for them. Of a tile no higher than its blocks are long there
  // would be nothing to leave out.
  static constexpr bool kBlocksByWarpgroup = kBlockM > kBlockN && !kHasBias && !kHasBits;
  // With a bias by distance: how many of its terms are loaded at once. Three consumers have
  // registers for few of them, and those not before the scores are there.
  static constexpr bool kLoadsTermsLate = kConsumerWarpgroups == 3;
  static constexpr int kTermsAtOnce = kLoadsTermsLate ? 5 : kBlockN / 8 + 1;
  static constexpr int kConsumerThreads = kConsumerWarpgroups * 128;
  static constexpr int kThreads = 128 + kConsumerThreads;
  static constexpr int kProducerRegisters = kConsumerWarpgroups == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters =
      kConsumerWarpgroups == 1 ? 128 : (kConsumerWarpgroups == 2 ? 232 : 160);
  static_assert(1 <= kConsumerWarpgroups && kConsumerWarpgroups <= 3);

  // Of 80 columns in slabs of 32 TMA would fetch three pieces a row. Of 72 the rows are not even
  // aligned to 32 bytes in global memory, and then TMA has no time for that.
  static constexpr int slab_of(int columns) { return columns % 32 == 0 ? slab(columns) : 64; }
  static constexpr int kSlab = slab_of(kHeadDim);
  static constexpr int kSlabV = slab_of(kHeadDimV);
  static constexpr int kColumns = in_slabs(kHeadDim, kSlab);  // in memory
  static constexpr int kColumnsV = in_slabs(kHeadDimV, kSlabV);

  // GEMMs of one consumer warpgroup: S = Q K^T from shared memory, O += P V with P in registers.
  template <class Operand>
  static constexpr auto qk_operation() {
    if constexpr (kBlockN == 80 || kBlockN == 112 || kBlockN == 176) {
      return Wgmma<Operand, kBlockN, Operands::kColumns>{};
    } else if constexpr (kQueryInRegisters) {
      return GMMA::rs_op_selector<Operand, Operand, float,
                                  Shape<_64, Int<kBlockN>, Int<kHeadDim>>>();
    } else {
      return GMMA::ss_op_selector<Operand, Operand, float,
                                  Shape<_64, Int<kBlockN>, Int<kHeadDim>>>();
    }
  }
  template <int kN>
  static constexpr auto pv_operation() {
    if constexpr (kN == 80) {
      return Wgmma<Element, kN, Operands::kRegisters>{};
    } else {
      return GMMA::rs_op_selector<Element, Element, float, Shape<_64, Int<kN>, Int<kBlockN>>,
                                  GMMA::Major::K, GMMA::Major::MN>();
    }
  }
  using Warpgroups = Layout<Shape<Int<kConsumerWarpgroups>, _1, _1>>;
  using MmaQK = decltype(make_tiled_mma(qk_operation<Element>(), Warpgroups{}));
  using MmaRest = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<_64, Int<kRestKeys>, Int<kHeadDim>>>(),
      Warpgroups{}));
  using MmaTerm = decltype(make_tiled_mma(qk_operation<cutlass::bfloat16_t>(), Warpgroups{}));
  using MmaPV = decltype(make_tiled_mma(pv_operation<kHeadDimV>(), Warpgroups{}));
  // Over all columns of V's memory: makes the descriptors, which do not depend on how many are
  // used.
  using MmaPVInSlabs = decltype(make_tiled_mma(pv_operation<kColumnsV>(), Warpgroups{}));
  static_assert(tile_size<1>(MmaQK{}) == kBlockN && tile_size<1>(MmaPV{}) == kHeadDimV,
                "one wgmma must span the tile: declare its shape");

  using LayoutQ = LayoutRows<kBlockM, kHeadDim, 1, kSlab>;
  using LayoutK = LayoutRows<kBlockN, kHeadDim, kStages, kSlab>;
  using LayoutVt = LayoutColumns<kBlockN, kHeadDimV, kStages, kSlabV>;

  template <class Visit>
  CUTLASS_DEVICE static void visit_out_element(Params const&, Visit const& visit) {
    visit(Element{});
  }

  static constexpr int kSizeQ = kBlockM * kColumns;
  static constexpr int kSizeK = kBlockN * kColumns;  // of one stage
  static constexpr int kSizeV = kBlockN * kColumnsV;
  static constexpr int kSizeOut = kBlockM * kColumnsV;
  // Of a slab of the output. In V's memory each warpgroup has its own slabs, in a stage of its own.
  static constexpr int kOutRows = kOutOverValue ? 64 : kBlockM;

  // A warpgroup's slabs of the bias: two blocks' worth, or what there is room for. They lie behind
  // V.
  static constexpr int kSmemOfTiles =
      2 * (kSizeQ + kStages * (kSizeK + kSizeV) + (kOutOverValue ? 0 : kSizeOut)) + 1024;
  static constexpr int kBiasStages =
      kHasBias ? std::min(4, (227 * 1024 - kSmemOfTiles) / (kConsumerWarpgroups * kBiasSlabBytes))
               : 1;
  static_assert(kBiasStages > 0);
  static constexpr int kSizeBias = kHasBias ? kConsumerWarpgroups * kBiasStages * kBiasSlab : 0;

  // ALiBi's operands: that of rows, which stays, and that of a block's keys. They lie there, too.
  using LayoutTermRows = LayoutTerm<kBlockM, 1>;
  using LayoutTermKeys = LayoutTerm<kBlockN, kStages>;
  static constexpr int kSizeTermRows = kHasAlibi ? term_size(kBlockM, 1) : 0;
  static constexpr int kSizeTermKeys = kHasAlibi ? term_size(kBlockN, kStages) : 0;
  // With a bias by distance: a number for each block.
  static constexpr int kSizeSameTerm = kHasRelative ? 2 * kStages : 0;
  static constexpr int kSizeBehindV = kSizeBias + kSizeTermRows + kSizeTermKeys + kSizeSameTerm;
  // A spare warp leaves something of each block of keys (spare_warp.h).
  static constexpr bool kAddsToKeys = kHasAlibi || kHasRelative;

  // A consumer's positions in the pipelines, kept from tile to tile.
  struct ConsumerState {
    PipelineState<kStages> key;
    PipelineState<kStages> value;
    PipelineState<kWorkStages> work;
    PipelineState<kBiasStages> bias;
    uint32_t query_phase = 0;
  };

  struct SharedStorage {
    alignas(1024) uint16_t query[kSizeQ];
    alignas(1024) uint16_t key[kStages * kSizeK];
    alignas(1024) uint16_t value[kStages * kSizeV + kSizeBehindV];
    alignas(1024) uint16_t out_tile[kOutOverValue ? 1 : kSizeOut];
    FullBarrier query_full[kConsumerWarpgroups];  // each warpgroup's 64 rows by themselves
    EmptyBarrier query_empty[kConsumerWarpgroups];
    EmptyBarrier out_stored;   // kOutOverValue, once per tile: O has left V's memory
    FullBarrier value_staged;  // V has landed, its rows past the length are still to be zeroed
    Pipeline<kStages> key_pipeline;
    Pipeline<kStages> value_pipeline;
    Pipeline<kWorkStages> work_pipeline;
    WorkTile work[kWorkStages];
    TileRows tile_rows[kWorkStages];
    BlockRange warpgroup_blocks[kWorkStages][kBlocksByWarpgroup ? kConsumerWarpgroups : 1];
    BiasRing<kBiasStages> bias_rings[kHasBias ? kConsumerWarpgroups : 1];

    CUTLASS_DEVICE void init_barriers() {
      constexpr int kConsumerWarps = kConsumerWarpgroups * 4;
      init_query_barriers(query_full, query_empty);
      out_stored.init(kConsumerWarps);
      value_staged.init(1);
      key_pipeline.init(kConsumerWarps, kAddsToKeys ? 2 : 1);
      value_pipeline.init(kConsumerWarps);
      constexpr int kSpareWarps = kHasBias ? kConsumerWarpgroups : kAddsToKeys;
      work_pipeline.init(kConsumerWarps + 1 + kSpareWarps);
      if constexpr (kHasBias) {
        for (auto& ring : bias_rings) ring.init();
      }
      cutlass::arch::fence_barrier_init();
    }

    CUTLASS_DEVICE uint16_t* bias(int warpgroup) {
      return value + kStages * kSizeV + warpgroup * kBiasStages * kBiasSlab;
    }
    CUTLASS_DEVICE uint16_t* term_rows() { return value + kStages * kSizeV; }
    CUTLASS_DEVICE uint16_t* term_keys() { return term_rows() + kSizeTermRows; }
    CUTLASS_DEVICE float* same_term() { return reinterpret_cast<float*>(value + kStages * kSizeV); }
    CUTLASS_DEVICE uint16_t* out(int warpgroup) { return out_tile + warpgroup * 64 * kSlabV; }
    // Where a warpgroup's output lies in V's memory, once that has been read: the first's in the
    // stage before the tile's last, which the others have read long ago, so that it need not wait
    // for the second. `position` is that after the tile's last block.
    CUTLASS_DEVICE uint16_t* out_over_value(PipelineState<kStages> const& position, int warpgroup) {
      static_assert(!kOutOverValue || (kStages == 2 && kConsumerWarpgroups == 2));
      int const stage = warpgroup == 0 ? position.stage : position.stage ^ 1;
      value_pipeline.empty[stage].wait(position.phase ^
                                       (stage == position.stage || position.stage == 0));
      return value + stage * kSizeV;
    }
  };
  static_assert(!kOutOverValue || 64 * kColumnsV <= kSizeV);
  static_assert(!kOutOverValue || kWorkStages == 1, "out_stored has one bit of phase");
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

}  // namespace jax_fa3::fwd
