// The signatures of the functions in functions.py, whose order of inputs they keep.
#pragma once

#include "op.h"

namespace ir {

extern const Signature kDecide, kInt4Decide, kRoutedMlp, kDenseMlp, kRoutedAttention, kRoutedAttentionStrict, kDenseAttention;

}  // namespace ir
