// From ONNX Runtime's tensors to the kernels' structs.
#pragma once

#include "../kernels/cuda/attention.cuh"
#include "../kernels/cuda/decide.cuh"
#include "../kernels/cuda/mlp.cuh"
#include "cuda.h"
#include "cuda_memory.cuh"
#include "signatures.h"

namespace ir {

template <int kElement>
using CudaFloat = std::conditional_t<kElement == abi::kFloat, float,
                                     std::conditional_t<kElement == abi::kFloat16, cuda::Half, cuda::BFloat16>>;

// Runs a unit on ONNX Runtime's stream; what fails says for which shape.
template <typename Run>
void on_stream(const Context& context, const std::string& shapes, Run&& run) {
  void* stream = nullptr;
  ir::check(api().KernelContext_GetGPUComputeStream(context.raw(), &stream));
  try {
    StreamScratch scratch(static_cast<cudaStream_t>(stream));
    int device = 0, multiprocessors = 0;
    cuda::check(cudaGetDevice(&device), "finding the device");
    cuda::check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "finding the device");
    run(cuda::Device{static_cast<cudaStream_t>(stream), multiprocessors, scratch});
  } catch (const cuda::Failure& failure) {
    throw Error(shapes + ": " + failure.what(), abi::kFail);
  }
}

// Sizes fit in an int, or the call is refused; products of them are computed wider.
inline int narrow(int64_t size) {
  if (size > INT32_MAX) throw Error("a dimension of " + std::to_string(size));
  return static_cast<int>(size);
}

template <int kElement>
void CudaDecide<kElement>::compute(const Context& context) const {
  using T = CudaFloat<kElement>;
  const DecideCall call(node_, context);
  const Tensor forecast = context.output(0, {call.batch, call.sequence, call.width});
  const Tensor execute = context.output(1, {call.batch, call.sequence}), score = context.output(2, {call.batch, call.sequence});
  cuda::Decide<T> unit{};
  unit.tokens = narrow(call.batch * call.sequence), unit.width = narrow(call.width);
  unit.rank = narrow(call.rank), unit.hidden = narrow(call.hidden);
  unit.h = call.h.as<T>(), unit.threshold = call.threshold.as<float>();
  unit.down_weight = call.down_weight.as<T>(), unit.down_bias = call.down_bias.as<T>();
  unit.up_weight = call.up_weight.as<T>(), unit.up_bias = call.up_bias.as<T>();
  unit.hidden_weight = call.hidden_weight.as<float>(), unit.hidden_bias = call.hidden_bias.as<float>();
  unit.out_weight = call.out_weight.as<float>(), unit.out_bias = call.out_bias.as<float>();
  unit.forecast = forecast.as<T>(), unit.execute = execute.as<bool>(), unit.score = score.as<float>();
  if (unit.tokens == 0) return;
  on_stream(context, "h " + call.h.text() + ", hidden_weight " + call.hidden_weight.text(),
            [&](const cuda::Device& device) { cuda::decide(device, unit); });
}

template <int kElement>
void CudaMlp<kElement>::compute(const Context& context) const {
  using T = CudaFloat<kElement>;
  const MlpCall call(node_, context);
  const Tensor output = context.output(0, {call.batch, call.sequence, call.width});
  cuda::Mlp<T> unit{};
  unit.batch = narrow(call.batch), unit.sequence = narrow(call.sequence);
  unit.width = narrow(call.width), unit.hidden = narrow(call.hidden);
  narrow(call.batch * call.sequence);
  unit.h = call.h.as<T>(), unit.forecast = call.forecast.as<T>(), unit.execute = call.execute.as<bool>();
  unit.gate_weight = call.gate_weight.as<T>(), unit.up_weight = call.up_weight.as<T>();
  unit.down_weight = call.down_weight.as<T>();
  unit.gate_bias = call.gate_bias.as<T>(), unit.up_bias = call.up_bias.as<T>(), unit.down_bias = call.down_bias.as<T>();
  unit.activation = setting_.gelu ? cuda::Activation::kGeluTanh : cuda::Activation::kSilu;
  unit.contribution = {call.post_norm.as<T>(), setting_.epsilon, setting_.residual_multiplier};
  unit.output = output.as<T>();
  if (output.size() == 0) return;
  on_stream(context, "h " + call.h.text() + ", gate_weight " + call.gate_weight.text(),
            [&](const cuda::Device& device) { cuda::mlp(device, unit); });
}

template <int kElement>
void CudaAttention<kElement>::compute(const Context& context) const {
  using T = CudaFloat<kElement>;
  const AttentionCall call(node_, setting_, context);
  const Tensor start = context.input(node_.signature().index("start"));
  if (!start.present || start.size() != call.batch) throw Error("start has shape " + start.text() + ", not one for each sequence");
  const auto present = {call.batch, setting_.kv_heads, call.slots(), setting_.head_dim};
  const Tensor output = context.output(0, {call.batch, call.sequence, call.width});
  const Tensor key = context.output(1, present), value = context.output(2, present);
  cuda::Attention<T> unit{};
  unit.batch = narrow(call.batch), unit.sequence = narrow(call.sequence), unit.width = narrow(call.width);
  unit.total = narrow(call.total), unit.past_slots = narrow(call.capacity);
  narrow(call.batch * call.sequence);
  unit.shape = {narrow(setting_.heads), narrow(setting_.kv_heads), narrow(setting_.head_dim)};
  unit.strict = &node_.signature() == &kRoutedAttentionStrict;
  unit.h = call.h.as<T>(), unit.forecast = call.forecast.as<T>();
  unit.execute = call.execute.as<bool>(), unit.mask = call.mask.as<bool>();
  unit.rotary = {call.cos.as<T>(), call.sin.as<T>(), narrow(setting_.rotary_dim)};
  unit.past_key = call.past_key.as<T>(), unit.past_value = call.past_value.as<T>();
  unit.q_weight = call.q_weight.as<T>(), unit.k_weight = call.k_weight.as<T>();
  unit.v_weight = call.v_weight.as<T>(), unit.o_weight = call.o_weight.as<T>();
  unit.q_bias = call.q_bias.as<T>(), unit.k_bias = call.k_bias.as<T>();
  unit.v_bias = call.v_bias.as<T>(), unit.o_bias = call.o_bias.as<T>();
  unit.q_norm = call.q_norm.as<T>(), unit.k_norm = call.k_norm.as<T>();
  unit.whole_q_norm = call.q_norm.present && call.q_norm.shape[0] != setting_.head_dim;
  unit.whole_k_norm = call.k_norm.present && call.k_norm.shape[0] != setting_.head_dim;
  unit.scale = setting_.scale, unit.softcap = setting_.softcap;
  unit.contribution = {call.post_norm.as<T>(), setting_.epsilon, setting_.residual_multiplier};
  unit.output = output.as<T>();
  unit.cache = {key.as<T>(), value.as<T>(), narrow(call.slots()), start.as<int>()};
  if (output.size() == 0 && key.size() == 0) return;
  on_stream(context, "h " + call.h.text() + ", past_key " + call.past_key.text() + ", mask " + call.mask.text(),
            [&](const cuda::Device& device) { cuda::attention(device, unit); });
}

}  // namespace ir
