// The kernels for this processor, and weights as they want them.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#include "../kernels/cpu/units.h"
#include "calls.h"
#include "pages.h"

namespace ir {

using cpu::Half;

// The kernels for one level of the instruction set.
struct Kernels {
  const char* level;  // x86-64-v3
  bool supported;     // by this processor
  const cpu::Level<float>& single;
  const cpu::Level<Half>& half;
  const cpu::Int4Level& int4;
};

// Those for the best level that the processor has. IR_CONVERT_OPS_LEVEL names the best that is wanted; throws if there is none of
// that name.
const Kernels& best_kernels();

template <typename T>
const cpu::Level<T>& best() {
  if constexpr (std::is_same_v<T, Half>) return best_kernels().half;
  else return best_kernels().single;
}

// A unit's weights, packed when its kernel is made. One that is no constant of the model is read as it is, which is slower.
// As with ONNX Runtime's own products, what is packed is a copy; the file's pages are not read again.
template <typename T>
class Weights {
 public:
  Weights(const Node& node, std::initializer_list<const char*> names);
  cpu::Weight<T> operator()(size_t index, const Tensor& weight) const;  // index among names

 private:
  std::vector<std::vector<T, HugePages<T>>> packed_;
};

// In int4 one that is no constant is packed anew in every call. Names are those of weights.
template <>
class Weights<cpu::Int4> {
 public:
  Weights(const Node& node, std::initializer_list<std::string> names);
  cpu::Weight<cpu::Int4> operator()(size_t index, const Tensor& weight, const Tensor& scales, const Tensor& zero_points,
                                    int64_t in) const;

 private:
  struct Packed {
    std::vector<uint32_t, HugePages<uint32_t>> words;
    bool zeros = false;  // whether it has zero points
  };
  std::vector<Packed> packed_;
};

}  // namespace ir
