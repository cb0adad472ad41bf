// The units on CPUs.
#pragma once

#include "calls.h"

namespace ir {

struct Half {  // IEEE binary16, as it is stored
  uint16_t bits;
};

template <typename T>
class CpuMlp : public Kernel {
 public:
  CpuMlp(const Op&, const Info&) {}
  void compute(const Context&) const override { throw Error("no kernel yet", abi::kNotImplemented); }
};

template <typename T>
class CpuAttention : public Kernel {
 public:
  CpuAttention(const Op&, const Info& info) : setting_(info) {}
  void compute(const Context&) const override { throw Error("no kernel yet", abi::kNotImplemented); }

 private:
  AttentionSetting setting_;
};

}  // namespace ir
