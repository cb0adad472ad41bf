// The few parts of ONNX Runtime's C API that this library uses, so that it builds without ONNX Runtime's headers, which no
// wheel ships. OrtApi is a table of functions that only ever grows: a slot keeps its function and signature in all later
// versions. layout_check.cpp holds every line of this file against the official headers.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;

namespace ir::abi {

inline constexpr uint32_t kVersion = 21;  // of the API: ONNX Runtime 1.21 and newer

// Enumerations are passed as int: theirs are C's.
enum Error : int { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };
enum Element : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt32 = 6, kBool = 9, kFloat16 = 10, kBFloat16 = 16 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum Memory : int { kCpuInput = -2, kDefault = 0 };

struct CustomOp;

// slot, name, result, parameters
#define IR_ORT_SLOTS(X)                                                                                                 \
  X(0, CreateStatus, OrtStatus*, (int code, const char* message))                                                       \
  X(2, GetErrorMessage, const char*, (const OrtStatus* status))                                                         \
  X(26, CreateCustomOpDomain, OrtStatus*, (const char* domain, OrtCustomOpDomain** out))                                \
  X(27, CustomOpDomain_Add, OrtStatus*, (OrtCustomOpDomain * domain, const CustomOp* op))                               \
  X(28, AddCustomOpDomain, OrtStatus*, (OrtSessionOptions * options, OrtCustomOpDomain * domain))                       \
  X(51, GetTensorMutableData, OrtStatus*, (OrtValue * value, void** out))                                               \
  X(60, GetTensorElementType, OrtStatus*, (const OrtTensorTypeAndShapeInfo* info, int* out))                            \
  X(61, GetDimensionsCount, OrtStatus*, (const OrtTensorTypeAndShapeInfo* info, size_t* out))                           \
  X(62, GetDimensions, OrtStatus*, (const OrtTensorTypeAndShapeInfo* info, int64_t* values, size_t length))             \
  X(65, GetTensorTypeAndShape, OrtStatus*, (const OrtValue* value, OrtTensorTypeAndShapeInfo** out))                    \
  X(85, KernelInfoGetAttribute_float, OrtStatus*, (const OrtKernelInfo* info, const char* name, float* out))            \
  X(86, KernelInfoGetAttribute_int64, OrtStatus*, (const OrtKernelInfo* info, const char* name, int64_t* out))          \
  X(87, KernelInfoGetAttribute_string, OrtStatus*,                                                                      \
    (const OrtKernelInfo* info, const char* name, char* out, size_t* size))                                             \
  X(88, KernelContext_GetInputCount, OrtStatus*, (const OrtKernelContext* context, size_t* out))                        \
  X(90, KernelContext_GetInput, OrtStatus*, (const OrtKernelContext* context, size_t index, const OrtValue** out))      \
  X(91, KernelContext_GetOutput, OrtStatus*,                                                                            \
    (OrtKernelContext * context, size_t index, const int64_t* shape, size_t rank, OrtValue** out))                      \
  X(93, ReleaseStatus, void, (OrtStatus * status))                                                                      \
  X(99, ReleaseTensorTypeAndShapeInfo, void, (OrtTensorTypeAndShapeInfo * info))                                        \
  X(193, KernelContext_GetGPUComputeStream, OrtStatus*, (const OrtKernelContext* context, void** out))                  \
  X(249, KernelInfoGetConstantInput_tensor, OrtStatus*,                                                                 \
    (const OrtKernelInfo* info, size_t index, int* constant, const OrtValue** out))                                     \
  X(274, KernelContext_ParallelFor, OrtStatus*,                                                                         \
    (const OrtKernelContext* context, void (*fn)(void*, size_t), size_t total, size_t batches, void* data))

struct Table;  // OrtApi

// What the runtime asks an operator: ONNX Runtime's OrtCustomOp as of kVersion. ONNX Runtime never asks what is null here.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp* op, const Table* api, const OrtKernelInfo* info);
  const char* (*GetName)(const CustomOp* op);
  const char* (*GetExecutionProviderType)(const CustomOp* op);
  int (*GetInputType)(const CustomOp* op, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp* op);
  int (*GetOutputType)(const CustomOp* op, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp* op);
  void (*KernelCompute)(void* kernel, OrtKernelContext* context);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const CustomOp* op, size_t index);
  int (*GetOutputCharacteristic)(const CustomOp* op, size_t index);
  int (*GetInputMemoryType)(const CustomOp* op, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp* op);
  int (*GetVariadicInputHomogeneity)(const CustomOp* op);
  int (*GetVariadicOutputMinArity)(const CustomOp* op);
  int (*GetVariadicOutputHomogeneity)(const CustomOp* op);
  OrtStatus* (*CreateKernelV2)(const CustomOp* op, const Table* api, const OrtKernelInfo* info, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext* context);
  OrtStatus* (*InferOutputShapeFn)(const CustomOp* op, OrtShapeInferContext* context);
  int (*GetStartVersion)(const CustomOp* op);
  int (*GetEndVersion)(const CustomOp* op);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

struct Base {  // OrtApiBase
  const Table* (*GetApi)(uint32_t version) noexcept;
  const char* (*GetVersionString)() noexcept;
};

// The one function that is there whatever the version.
inline auto CreateStatusOf(const Table* table) {
  return reinterpret_cast<OrtStatus* (*)(int, const char*)>(*reinterpret_cast<void* const*>(table));
}

// The functions, read from their slots once.
struct Api {
#define IR_MEMBER(slot, name, result, parameters) result(*name) parameters;
  IR_ORT_SLOTS(IR_MEMBER)
#undef IR_MEMBER

  explicit Api(const Table* table) {
    const auto* slots = reinterpret_cast<void* const*>(table);
#define IR_READ(slot, name, result, parameters) name = reinterpret_cast<decltype(name)>(slots[slot]);
    IR_ORT_SLOTS(IR_READ)
#undef IR_READ
  }
};

}  // namespace ir::abi
