// The units on CPUs.
#pragma once

#include <vector>

#include "../kernels/cpu/units.h"
#include "calls.h"
#include "pages.h"

namespace ir {

using cpu::Half;

// A unit's weights, packed when its kernel is made. One that is no constant of the model is read as it is, which is slower.
// As with ONNX Runtime's own products, what is packed is a copy; the file's pages are not read again.
template <typename T>
class Weights {
 public:
  Weights(const Op& op, const Info& info, std::initializer_list<const char*> names);
  cpu::Weight<T> operator()(size_t index, const Tensor& tensor) const;  // index among names

 private:
  std::vector<std::vector<T, HugePages<T>>> packed_;
};

template <typename T>
class CpuDecide : public Kernel {
 public:
  CpuDecide(const Op& op, const Info& info);
  void compute(const Context& context) const override;

 private:
  const Op& op_;
  Weights<T> forecaster_;
  Weights<float> router_;
};

template <typename T>
class CpuMlp : public Kernel {
 public:
  CpuMlp(const Op& op, const Info& info);
  void compute(const Context& context) const override;

 private:
  const Op& op_;
  MlpSetting setting_;
  Weights<T> weights_;
};

template <typename T>
class CpuAttention : public Kernel {
 public:
  CpuAttention(const Op& op, const Info& info);
  void compute(const Context& context) const override;

 private:
  const Op& op_;
  AttentionSetting setting_;
  Weights<T> weights_;
};

}  // namespace ir
