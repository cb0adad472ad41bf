// The signatures of the functions in functions.py, whose order of inputs they keep.
#pragma once

#include "op.h"

namespace ir {

extern const Signature kDecide, kRoutedMlp, kDenseMlp, kRoutedAttention, kRoutedAttentionStrict, kDenseAttention;
extern const Signature kInt4Decide, kInt4RoutedMlp, kInt4DenseMlp, kInt4RoutedAttention, kInt4RoutedAttentionStrict,
    kInt4DenseAttention;

}  // namespace ir
