// ONNX Runtime as the kernels' bindings see it: tensors, contexts and attributes, with errors as exceptions.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "../abi/ort_abi.h"

namespace ir {

// ONNX Runtime's functions; set when the library is registered, before any kernel is made.
const abi::Api& api();

// Becomes the status that ONNX Runtime reports; Op adds the operator's name and type to it.
struct Error : std::runtime_error {
  int code;
  explicit Error(const std::string& message, int code = abi::kInvalidArgument) : std::runtime_error(message), code(code) {}
};

// Throws what a function of ONNX Runtime's reports.
void check(OrtStatus* status);

// A tensor's memory; absent (no data, no shape) for an optional input that is left out.
struct Tensor {
  static constexpr size_t kMaxRank = 4;

  bool present = false;
  void* data = nullptr;
  int element = abi::kUndefined;
  size_t rank = 0;
  int64_t shape[kMaxRank] = {};

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
  int64_t size() const;
  std::string text() const;  // the shape, as in [2, 3]
};

Tensor view(const OrtValue* value);

// One call of a kernel.
class Context {
 public:
  explicit Context(OrtKernelContext* raw) : raw_(raw) { check(api().KernelContext_GetInputCount(raw, &inputs_)); }

  OrtKernelContext* raw() const { return raw_; }
  Tensor input(size_t index) const;
  Tensor output(size_t index, std::initializer_list<int64_t> shape) const;

 private:
  OrtKernelContext* raw_;
  size_t inputs_ = 0;
};

// What is known of a node when its kernel is made.
class Info {
 public:
  explicit Info(const OrtKernelInfo* raw) : raw_(raw) {}

  // Attributes; the value given is that of one that is left out.
  int64_t attribute(const char* name, int64_t otherwise) const;
  float attribute(const char* name, float otherwise) const;
  std::string attribute(const char* name, const char* otherwise) const;
  int64_t required(const char* name) const;
  float required_float(const char* name) const;

  // An input that is a weight of the model: absent if it may change from call to call.
  Tensor constant(size_t index) const;

 private:
  const OrtKernelInfo* raw_;
};

}  // namespace ir
