// How many CTAs share the query rows of a block of keys in the backward.
#pragma once

#include "plan.h"

namespace jax_fa3 {

// 0: one, and no sums of parts are needed (bwd/parts.h). The window is that of Mask, positions
// included; `masked`: whether anything restricts what rows see; `in_turn`: gradients are to be
// deterministic, which changes nothing where they always are. Decided when a call is traced.
int bwd_splits(Sizes const& sizes, int kernel_head_dim, int64_t window_left, int64_t window_right,
               bool masked, bool in_turn);

}  // namespace jax_fa3
