// An operator: a unit's signature, one float type and one execution provider, with the kernel that computes it.
#pragma once

#include <memory>
#include <vector>

#include "runtime.h"

namespace ir {

// The types of inputs and outputs: F is the operator's own float type.
enum class Type { kF, kFloat, kBool, kInt32, kUint8, kAny };

struct Input {
  const char* name;
  Type type = Type::kF;
  bool optional = false;
  bool host = false;  // small, and wanted in the CPU's memory by every provider
};

// A function of functions.py: its name, and its inputs and outputs in order.
struct Signature {
  static constexpr size_t kMaxOutputs = 3;

  const char* name;
  const Input* inputs;
  size_t input_count;
  Type outputs[kMaxOutputs];
  size_t output_count;
  bool routed;        // has inputs forecast, at 1, and execute
  bool int4 = false;  // is of weights in int4, which have a domain of their own

  const char* domain() const { return int4 ? "ir.int4" : "ir"; }
  size_t index(const char* input) const;  // input_count if there is none of this name
};

class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void compute(const Context& context) const = 0;  // may run in several threads at once
};

struct Op;
using Make = std::unique_ptr<Kernel> (*)(const Op& op, const Info& info);

// One line of the registration table.
struct Op : abi::CustomOp {
  const Signature& signature;
  int element;           // F
  const char* provider;  // null: the CPU
  Make make;

  Op(const Signature& signature, int element, const char* provider, Make make);

  std::string text() const;  // for errors: RoutedMLP (float16)
};

// A node that runs an operator. Its constant inputs are looked at once, when its kernel is made: six calls of ONNX Runtime's a
// tensor would take longer than a small unit's arithmetic.
class Node {
 public:
  Node(const Op& op, const Info& info);

  const Signature& signature() const { return signature_; }
  Tensor constant(const std::string& name) const;  // absent if there is none, or it may change from call to call
  Tensor input(const Context& context, size_t index) const {
    return constants_[index].present ? constants_[index] : context.input(index);
  }

 private:
  const Signature& signature_;
  std::vector<Tensor> constants_;
};

inline constexpr const char* kCpu = nullptr;
inline constexpr const char* kCuda = "CUDAExecutionProvider";

const char* element_name(int element);  // float32

// Makes a kernel whose constructor takes (op, info).
template <typename K>
std::unique_ptr<Kernel> make(const Op& op, const Info& info) {
  return std::make_unique<K>(op, info);
}

}  // namespace ir
