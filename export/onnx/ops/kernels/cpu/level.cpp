// The CPU kernels for one level of the instruction set: IR_LEVEL names it, the compiler's flags say what it has.
#include "level.h"

#include "attention.h"
#include "decide.h"
#include "mlp.h"

namespace ir::cpu::IR_LEVEL {

const Level<float> kFloat = {packed_size, pack<float>, decide<float>, mlp<float>, attention<float>,
                             mlp<float, Int4>, attention<float, Int4>};
const Level<Half> kHalf = {packed_size, pack<Half>, decide<Half>, mlp<Half>, attention<Half>, mlp<Half, Int4>, attention<Half, Int4>};
const Int4Level kInt4 = {packed_int4_size, pack_int4, widen, decide<float, Int4, Int4>};

}  // namespace ir::cpu::IR_LEVEL
