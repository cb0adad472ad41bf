// The units on NVIDIA GPUs. cuda_float32.cu and its like hold one type each, so that they compile side by side.
#pragma once

#include "calls.h"

namespace ir {

template <int kElement>
class CudaMlp : public Kernel {
 public:
  CudaMlp(const Op& op, const Info& info);
  void compute(const Context& context) const override;

 private:
  const Op& op_;
  bool gelu_;
  float epsilon_, multiplier_;
};

template <int kElement>
class CudaAttention : public Kernel {
 public:
  CudaAttention(const Op& op, const Info& info);
  void compute(const Context& context) const override;

 private:
  const Op& op_;
  AttentionSetting setting_;
};

// Lines of the registration table.
#define IR_CUDA_UNITS                                                                    \
  IR_UNITS(abi::kFloat, kCuda, CudaMlp<abi::kFloat>, CudaAttention<abi::kFloat>),        \
      IR_UNITS(abi::kFloat16, kCuda, CudaMlp<abi::kFloat16>, CudaAttention<abi::kFloat16>), \
      IR_UNITS(abi::kBFloat16, kCuda, CudaMlp<abi::kBFloat16>, CudaAttention<abi::kBFloat16>),

}  // namespace ir
