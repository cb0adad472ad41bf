// Compiles only if ort_abi.h agrees with ONNX Runtime's official headers: slots, signatures, fields and constants. CMake
// builds it wherever those headers are installed (Debian: libonnxruntime-dev).
#include "ort_abi.h"

#include <onnxruntime_c_api.h>

#include <type_traits>

#pragma GCC diagnostic ignored "-Wignored-attributes"  // theirs carry warn_unused_result, which no type keeps

namespace {

// Signatures are compared with enumerations as int, and pointers as void*: the types behind them have other names there.
template <typename T>
using Plain = std::conditional_t<std::is_pointer_v<T>, void*, std::conditional_t<std::is_enum_v<T>, int, T>>;

template <typename>
struct Signature;
template <typename R, typename... A>
struct Signature<R (*)(A...)> {
  using type = Plain<R>(Plain<A>...);
};
template <typename R, typename... A>
struct Signature<R (*)(A...) noexcept> : Signature<R (*)(A...)> {};

template <typename A, typename B>
constexpr bool alike = std::is_same_v<typename Signature<A>::type, typename Signature<B>::type>;

#define IR_CHECK_SLOT(slot, name, result, parameters)                                 \
  static_assert(offsetof(OrtApi, name) == (slot) * sizeof(void*), #name " has moved"); \
  static_assert(alike<decltype(OrtApi::name), decltype(ir::abi::Api::name)>, #name " has another signature");
IR_ORT_SLOTS(IR_CHECK_SLOT)

#define IR_CHECK_FIELD(name)                                                                                  \
  static_assert(offsetof(OrtCustomOp, name) == offsetof(ir::abi::CustomOp, name), #name " has moved");         \
  static_assert(alike<decltype(OrtCustomOp::name), decltype(ir::abi::CustomOp::name)>, #name " has another signature");
IR_CHECK_FIELD(CreateKernel)
IR_CHECK_FIELD(GetName)
IR_CHECK_FIELD(GetExecutionProviderType)
IR_CHECK_FIELD(GetInputType)
IR_CHECK_FIELD(GetInputTypeCount)
IR_CHECK_FIELD(GetOutputType)
IR_CHECK_FIELD(GetOutputTypeCount)
IR_CHECK_FIELD(KernelCompute)
IR_CHECK_FIELD(KernelDestroy)
IR_CHECK_FIELD(GetInputCharacteristic)
IR_CHECK_FIELD(GetOutputCharacteristic)
IR_CHECK_FIELD(GetInputMemoryType)
IR_CHECK_FIELD(GetVariadicInputMinArity)
IR_CHECK_FIELD(GetVariadicInputHomogeneity)
IR_CHECK_FIELD(GetVariadicOutputMinArity)
IR_CHECK_FIELD(GetVariadicOutputHomogeneity)
IR_CHECK_FIELD(CreateKernelV2)
IR_CHECK_FIELD(KernelComputeV2)
IR_CHECK_FIELD(InferOutputShapeFn)
IR_CHECK_FIELD(GetStartVersion)
IR_CHECK_FIELD(GetEndVersion)
IR_CHECK_FIELD(GetMayInplace)
IR_CHECK_FIELD(ReleaseMayInplace)
IR_CHECK_FIELD(GetAliasMap)
IR_CHECK_FIELD(ReleaseAliasMap)
static_assert(offsetof(OrtCustomOp, version) == offsetof(ir::abi::CustomOp, version));
static_assert(sizeof(OrtCustomOp) >= sizeof(ir::abi::CustomOp));
static_assert(alike<decltype(OrtApiBase::GetApi), decltype(ir::abi::Base::GetApi)>);
static_assert(offsetof(OrtApiBase, GetApi) == offsetof(ir::abi::Base, GetApi));

static_assert(ORT_API_VERSION >= ir::abi::kVersion);
static_assert(int{ORT_FAIL} == ir::abi::kFail && int{ORT_INVALID_ARGUMENT} == ir::abi::kInvalidArgument);
static_assert(int{ORT_NOT_IMPLEMENTED} == ir::abi::kNotImplemented);
static_assert(int{ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED} == ir::abi::kUndefined);
static_assert(int{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT} == ir::abi::kFloat);
static_assert(int{ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8} == ir::abi::kUint8);
static_assert(int{ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32} == ir::abi::kInt32);
static_assert(int{ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL} == ir::abi::kBool);
static_assert(int{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16} == ir::abi::kFloat16);
static_assert(int{ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16} == ir::abi::kBFloat16);
static_assert(int{INPUT_OUTPUT_REQUIRED} == ir::abi::kRequired && int{INPUT_OUTPUT_OPTIONAL} == ir::abi::kOptional);
static_assert(int{OrtMemTypeCPUInput} == ir::abi::kCpuInput && int{OrtMemTypeDefault} == ir::abi::kDefault);

}  // namespace
