// A pass's kernel parameters together with those of one term of the scores: what `Params` is of a
// kernel with that term, in the forward and in the backward.
#pragma once

#include "common/alibi.h"
#include "common/bias.h"
#include "common/dropout.h"
#include "common/relative_bias.h"
#include "problem.h"

namespace jax_fa3 {

// `score` is the identity then, and softmax_scale is 1: Bias has the factor of q.k.
template <class Params>
struct WithBias : Params {
  Bias bias;
};

// In the backward its rows are keys, its columns query rows.
template <class Params>
struct WithBits : Params {
  MaskBits bits;
};

template <class Params>
struct WithDropout : Params {
  Dropout dropout;
};

template <class Params>
struct WithAlibi : Params {
  Alibi alibi;
};

template <class Params>
struct WithRelativeBias : Params {
  RelativeBias relative_bias;
};

}  // namespace jax_fa3
