// The levels of the instruction set that level.cpp is compiled for, and the choice among them.
#pragma once

#include "units.h"

namespace ir::cpu {

#define IR_DECLARE(level)           \
  namespace level {                 \
  extern const Level<float> kFloat; \
  extern const Level<Half> kHalf;   \
  extern const Int4Level kInt4;     \
  }
#if defined(__x86_64__)
IR_DECLARE(x86_64)
IR_DECLARE(x86_64_v3)
IR_DECLARE(x86_64_v4)
IR_DECLARE(x86_64_v4_vnni)
#else
IR_DECLARE(native)
#endif
#undef IR_DECLARE

}  // namespace ir::cpu
