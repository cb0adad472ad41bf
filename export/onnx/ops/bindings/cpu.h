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
  Weights(const Node& node, std::initializer_list<const char*> names);
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
  const Node node_;
  Weights<T> forecaster_;
  Weights<float> router_;
};

// A weight in int4, packed when its kernel is made, or else anew in every call.
class Int4Weight {
 public:
  Int4Weight(const Node& node, const char* weight, const char* scales);
  cpu::Weight<cpu::Int4> operator()(const Tensor& weight, const Tensor& scales, int64_t in, std::vector<uint32_t>& packed) const;

 private:
  std::vector<uint32_t, HugePages<uint32_t>> packed_;
};

class CpuInt4Decide : public Kernel {
 public:
  CpuInt4Decide(const Op& op, const Info& info);
  void compute(const Context& context) const override;

 private:
  const Node node_;
  Int4Weight down_, up_, router_;
};

template <typename T>
class CpuMlp : public Kernel {
 public:
  CpuMlp(const Op& op, const Info& info);
  void compute(const Context& context) const override;

 private:
  const Node node_;
  MlpSetting setting_;
  Weights<T> weights_;
};

template <typename T>
class CpuAttention : public Kernel {
 public:
  CpuAttention(const Op& op, const Info& info);
  void compute(const Context& context) const override;

 private:
  const Node node_;
  AttentionSetting setting_;
  Weights<T> weights_;
};

}  // namespace ir
