// The units on NVIDIA GPUs. cuda_float32.cu and its like hold one type each, so that they compile side by side.
#pragma once

#include "calls.h"

namespace ir {

template <int kElement>
class CudaDecide : public Kernel {
 public:
  CudaDecide(const Op& op, const Info& info) : node_(op, info) {}
  void compute(const Context& context) const override;

 private:
  const Node node_;
};

template <int kElement>
class CudaMlp : public Kernel {
 public:
  CudaMlp(const Op& op, const Info& info) : node_(op, info), setting_(info) {}
  void compute(const Context& context) const override;

 private:
  const Node node_;
  MlpSetting setting_;
};

template <int kElement>
class CudaAttention : public Kernel {
 public:
  CudaAttention(const Op& op, const Info& info) : node_(op, info), setting_(info) {}
  void compute(const Context& context) const override;

 private:
  const Node node_;
  AttentionSetting setting_;
};

// Lines of the registration table.
#define IR_CUDA_TYPE(element) \
  IR_UNITS(element, kCuda, CudaDecide<element>, CudaMlp<element>, CudaAttention<element>),
#define IR_CUDA_UNITS IR_CUDA_TYPE(abi::kFloat) IR_CUDA_TYPE(abi::kFloat16) IR_CUDA_TYPE(abi::kBFloat16)

}  // namespace ir
