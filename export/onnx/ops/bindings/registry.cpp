// What ONNX Runtime calls when the library is registered, and the table of all that it then knows.
#include "cpu.h"
#include "signatures.h"
#ifdef IR_CUDA
#include "cuda.h"
#endif

namespace ir {

namespace {

const abi::Api* g_api = nullptr;

// All operators. Once ONNX Runtime knows a name in a domain, it runs no function of that name: what is missing here for a
// provider or a type does not run at all.
const Op kTable[] = {
#define IR_UNITS(element, provider, decide, mlp, attention)          \
  {kDecide, element, provider, make<decide>},                        \
      {kRoutedMlp, element, provider, make<mlp>},                        \
      {kDenseMlp, element, provider, make<mlp>},                     \
      {kRoutedAttention, element, provider, make<attention>},        \
      {kRoutedAttentionStrict, element, provider, make<attention>},  \
      {kDenseAttention, element, provider, make<attention>}
    IR_UNITS(abi::kFloat, kCpu, CpuDecide<float>, CpuMlp<float>, CpuAttention<float>),
    IR_UNITS(abi::kFloat16, kCpu, CpuDecide<Half>, CpuMlp<Half>, CpuAttention<Half>),
    {kInt4Decide, abi::kFloat, kCpu, make<CpuInt4Decide>},
#ifdef __x86_64__  // elsewhere there are no products of bytes yet, and ONNX Runtime's own are faster
#define IR_INT4_UNITS(element, T)                                                     \
  {kInt4RoutedMlp, element, kCpu, make<CpuMlp<T, cpu::Int4>>},                        \
      {kInt4DenseMlp, element, kCpu, make<CpuMlp<T, cpu::Int4>>},                     \
      {kInt4RoutedAttention, element, kCpu, make<CpuAttention<T, cpu::Int4>>},        \
      {kInt4RoutedAttentionStrict, element, kCpu, make<CpuAttention<T, cpu::Int4>>},  \
      {kInt4DenseAttention, element, kCpu, make<CpuAttention<T, cpu::Int4>>}
    IR_INT4_UNITS(abi::kFloat, float),
    IR_INT4_UNITS(abi::kFloat16, Half),
#undef IR_INT4_UNITS
#endif
#ifdef IR_CUDA
    IR_CUDA_UNITS  // as above; cuda.h defines it
#endif
#undef IR_UNITS
};

}  // namespace

const abi::Api& api() { return *g_api; }

}  // namespace ir

#define IR_EXPORT extern "C" __attribute__((visibility("default")))

// The table in words: a line "provider domain function type input input ..." for each operator.
IR_EXPORT const char* IrOpsTable() {
  static const std::string table = [] {
    std::string table;
    for (const ir::Op& op : ir::kTable) {
      table += op.provider != ir::kCpu ? op.provider : "CPUExecutionProvider";
      table += std::string(" ") + op.signature.domain() + " " + op.signature.name + " " + ir::element_name(op.element);
      for (size_t i = 0; i < op.signature.input_count; ++i) table += std::string(" ") + op.signature.inputs[i].name;
      table += "\n";
    }
    return table;
  }();
  return table.c_str();
}

// The level of the instruction set that CPU kernels are for; empty where there is none of that name.
IR_EXPORT const char* IrOpsLevel() {
  try {
    return ir::best_kernels().level;
  } catch (const ir::Error&) {
    return "";
  }
}

IR_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const ir::abi::Base* base) {
  using namespace ir;
  const abi::Table* table = base->GetApi(abi::kVersion);
  if (table == nullptr) {
    const std::string message = std::string("the library of domain ir needs ONNX Runtime 1.21, this is ") + base->GetVersionString();
    return abi::CreateStatusOf(base->GetApi(1))(abi::kFail, message.c_str());
  }
  static const abi::Api api(table);
  g_api = &api;
  // Kernels call the functions of the ONNX Runtime that came first; a process may hold several.
  static const std::string first = base->GetVersionString();
  if (first != base->GetVersionString()) {
    const std::string message = "the library of domain ir serves ONNX Runtime " + first + " in this process, this is " +
                                base->GetVersionString() + ": use one version of it";
    return abi::CreateStatusOf(table)(abi::kFail, message.c_str());
  }
  // The same domains for all sessions; they live as long as the library.
  static OrtCustomOpDomain *domain = nullptr, *int4_domain = nullptr;
  static const std::string trouble = [] {
    OrtStatus* status = api.CreateCustomOpDomain(kDecide.domain(), &domain);
    if (status == nullptr) status = api.CreateCustomOpDomain(kInt4Decide.domain(), &int4_domain);
    for (const Op& op : kTable)
      if (status == nullptr) status = api.CustomOpDomain_Add(op.signature.int4 ? int4_domain : domain, &op);
    if (status == nullptr) return std::string();
    const std::string message = api.GetErrorMessage(status);
    api.ReleaseStatus(status);
    return message;
  }();
  if (!trouble.empty()) return api.CreateStatus(abi::kFail, trouble.c_str());
  OrtStatus* failed = api.AddCustomOpDomain(options, domain);
  return failed != nullptr ? failed : api.AddCustomOpDomain(options, int4_domain);
}
