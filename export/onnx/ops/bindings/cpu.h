// The units on CPUs.
#pragma once

#include "calls.h"
#include "cpu_weights.h"

namespace ir {

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

class CpuInt4Decide : public Kernel {
 public:
  CpuInt4Decide(const Op& op, const Info& info);
  void compute(const Context& context) const override;

 private:
  const Node node_;
  Weights<cpu::Int4> weights_;
};

template <typename T, typename W = T>
class CpuMlp : public Kernel {
 public:
  CpuMlp(const Op& op, const Info& info);
  void compute(const Context& context) const override;

 private:
  const Node node_;
  MlpSetting setting_;
  Weights<W> weights_;
};

template <typename T, typename W = T>
class CpuAttention : public Kernel {
 public:
  CpuAttention(const Op& op, const Info& info);
  void compute(const Context& context) const override;

 private:
  const Node node_;
  AttentionSetting setting_;
  Weights<W> weights_;
};

}  // namespace ir
