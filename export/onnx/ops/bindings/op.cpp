#include "op.h"

#include <cstring>

namespace ir {

namespace {

const Op& self(const abi::CustomOp* op) { return *static_cast<const Op*>(op); }

// A kernel, and the operator that its errors name.
struct Made {
  const Op& op;
  std::unique_ptr<Kernel> kernel;
};

// No exception may leave through C.
template <typename F>
OrtStatus* guarded(const Op& op, F&& f) {
  try {
    f();
    return nullptr;
  } catch (const Error& error) {
    return api().CreateStatus(error.code, (op.text() + ": " + error.what()).c_str());
  } catch (const std::exception& error) {
    return api().CreateStatus(abi::kFail, (op.text() + ": " + error.what()).c_str());
  }
}

int element_of(Type type, const Op& op) {
  switch (type) {
    case Type::kFloat: return abi::kFloat;
    case Type::kBool: return abi::kBool;
    case Type::kInt32: return abi::kInt32;
    case Type::kUint8: return abi::kUint8;
    case Type::kAny: return abi::kUndefined;
    default: return op.element;
  }
}

// A routed unit's output is its forecast where nothing executes, so it may take over the forecast's memory.
int kForecast[] = {1};
int kOutput[] = {0};

}  // namespace

const char* element_name(int element) {
  switch (element) {
    case abi::kFloat: return "float32";
    case abi::kFloat16: return "float16";
    case abi::kBFloat16: return "bfloat16";
    default: return "unknown type";
  }
}

size_t Signature::index(const char* input) const {
  size_t i = 0;
  while (i < input_count && std::strcmp(inputs[i].name, input) != 0) ++i;
  return i;
}

Node::Node(const Op& op, const Info& info) : signature_(op.signature), constants_(signature_.input_count) {
  for (size_t i = 0; i < signature_.input_count; ++i) constants_[i] = info.constant(i);
}

Tensor Node::constant(const std::string& name) const {
  const size_t index = signature_.index(name.c_str());
  return index < constants_.size() ? constants_[index] : Tensor{};
}

std::string Op::text() const {
  return std::string(signature.int4 ? "int4 " : "") + signature.name + " (" + element_name(element) + ")";
}

Op::Op(const Signature& signature, int element, const char* provider, Make make)
    : abi::CustomOp{}, signature(signature), element(element), provider(provider), make(make) {
  version = abi::kVersion;
  GetName = [](const abi::CustomOp* op) { return self(op).signature.name; };
  GetExecutionProviderType = [](const abi::CustomOp* op) { return self(op).provider; };
  GetInputTypeCount = [](const abi::CustomOp* op) { return self(op).signature.input_count; };
  GetInputType = [](const abi::CustomOp* op, size_t i) -> int {
    return element_of(self(op).signature.inputs[i].type, self(op));
  };
  GetInputCharacteristic = [](const abi::CustomOp* op, size_t i) -> int {
    return self(op).signature.inputs[i].optional ? abi::kOptional : abi::kRequired;
  };
  GetInputMemoryType = [](const abi::CustomOp* op, size_t i) -> int {
    return self(op).signature.inputs[i].host ? abi::kCpuInput : abi::kDefault;
  };
  GetOutputTypeCount = [](const abi::CustomOp* op) { return self(op).signature.output_count; };
  GetOutputType = [](const abi::CustomOp* op, size_t i) { return element_of(self(op).signature.outputs[i], self(op)); };
  GetOutputCharacteristic = [](const abi::CustomOp*, size_t) -> int { return abi::kRequired; };
  GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const abi::CustomOp*) { return 1; };
  GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const abi::CustomOp*) { return 1; };
  GetStartVersion = GetEndVersion = [](const abi::CustomOp*) { return 1; };
  CreateKernelV2 = [](const abi::CustomOp* op, const abi::Table*, const OrtKernelInfo* info, void** kernel) {
    return guarded(self(op), [&] { *kernel = new Made{self(op), self(op).make(self(op), Info(info))}; });
  };
  KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const auto& made = *static_cast<Made*>(kernel);
    return guarded(made.op, [&] { made.kernel->compute(Context(context)); });
  };
  KernelDestroy = [](void* kernel) { delete static_cast<Made*>(kernel); };
  if (signature.routed) {
    GetMayInplace = [](int** inputs, int** outputs) -> size_t {
      *inputs = kForecast;
      *outputs = kOutput;
      return 1;
    };
    ReleaseMayInplace = [](int*, int*) {};
  }
}

}  // namespace ir
