#include "runtime.h"

namespace ir {

namespace {

// Whether a function succeeded; what it reports otherwise is dropped.
bool succeeded(OrtStatus* status) {
  if (status == nullptr) return true;
  api().ReleaseStatus(status);
  return false;
}

}  // namespace

void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api().GetErrorMessage(status);
  api().ReleaseStatus(status);
  throw Error(message, abi::kFail);
}

int64_t Tensor::size() const {
  int64_t size = 1;
  for (size_t i = 0; i < rank; ++i) size *= shape[i];
  return size;
}

std::string Tensor::text() const {
  std::string text = "[";
  for (size_t i = 0; i < rank; ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

Tensor view(const OrtValue* value) {
  Tensor tensor;
  if (value == nullptr) return tensor;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api().GetTensorTypeAndShape(value, &info));
  OrtStatus* status = api().GetTensorElementType(info, &tensor.element);
  if (status == nullptr) status = api().GetDimensionsCount(info, &tensor.rank);
  const bool fits = tensor.rank <= Tensor::kMaxRank;
  if (status == nullptr && fits) status = api().GetDimensions(info, tensor.shape, tensor.rank);
  api().ReleaseTensorTypeAndShapeInfo(info);
  check(status);
  if (!fits) throw Error("a tensor of " + std::to_string(tensor.rank) + " dimensions");
  // Inputs are only read; ONNX Runtime has one function for both.
  check(api().GetTensorMutableData(const_cast<OrtValue*>(value), &tensor.data));
  tensor.present = true;
  return tensor;
}

Tensor Context::input(size_t index) const {
  const OrtValue* value = nullptr;
  if (index < inputs_) check(api().KernelContext_GetInput(raw_, index, &value));
  return view(value);
}

Tensor Context::output(size_t index, std::initializer_list<int64_t> shape) const {
  OrtValue* value = nullptr;
  check(api().KernelContext_GetOutput(raw_, index, shape.begin(), shape.size(), &value));
  return view(value);
}

int64_t Info::attribute(const char* name, int64_t otherwise) const {
  int64_t value = 0;
  return succeeded(api().KernelInfoGetAttribute_int64(raw_, name, &value)) ? value : otherwise;
}

float Info::attribute(const char* name, float otherwise) const {
  float value = 0;
  return succeeded(api().KernelInfoGetAttribute_float(raw_, name, &value)) ? value : otherwise;
}

std::string Info::attribute(const char* name, const char* otherwise) const {
  size_t size = 0;  // with the final zero
  if (!succeeded(api().KernelInfoGetAttribute_string(raw_, name, nullptr, &size))) return otherwise;
  std::string value(size, '\0');
  check(api().KernelInfoGetAttribute_string(raw_, name, value.data(), &size));
  value.resize(size - 1);
  return value;
}

int64_t Info::required(const char* name) const {
  int64_t value = 0;
  if (!succeeded(api().KernelInfoGetAttribute_int64(raw_, name, &value)))
    throw Error("attribute '" + std::string(name) + "' is missing");
  return value;
}

float Info::required_float(const char* name) const {
  float value = 0;
  if (!succeeded(api().KernelInfoGetAttribute_float(raw_, name, &value)))
    throw Error("attribute '" + std::string(name) + "' is missing");
  return value;
}

Tensor Info::constant(size_t index) const {
  int constant = 0;
  const OrtValue* value = nullptr;
  check(api().KernelInfoGetConstantInput_tensor(raw_, index, &constant, &value));
  return constant != 0 ? view(value) : Tensor{};
}

}  // namespace ir
