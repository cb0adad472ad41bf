#include "cpu.h"

#include "signatures.h"

namespace ir {

namespace {

cpu::Threads threads(const Context& context) {
  return {context.raw(), [](void* runtime, size_t count, void (*task)(void*, size_t), void* data) {
            check(api().KernelContext_ParallelFor(static_cast<OrtKernelContext*>(runtime), task, count, 0, data));
          }};
}

template <typename T>
cpu::Contribution<T> contribution(const Tensor& bias, const Tensor& norm, float epsilon, float multiplier,
                                  const Tensor& forecast, const Tensor& output) {
  return {bias.as<T>(), norm.as<T>(), epsilon, multiplier, forecast.as<T>(), output.as<T>()};
}

// All of a decision but for its weights.
template <typename T, typename F, typename R>
cpu::Decide<T, F, R> decide(const DecideCall& call, const Context& context) {
  const Tensor forecast = context.output(0, {call.batch, call.sequence, call.width});
  const Tensor execute = context.output(1, {call.batch, call.sequence}), score = context.output(2, {call.batch, call.sequence});
  cpu::Decide<T, F, R> unit{};
  unit.tokens = call.batch * call.sequence, unit.width = call.width, unit.rank = call.rank, unit.hidden = call.hidden;
  unit.h = call.h.as<T>(), unit.threshold = call.threshold.as<float>();
  unit.down_bias = call.down_bias.as<T>(), unit.up_bias = call.up_bias.as<T>();
  unit.hidden_bias = call.hidden_bias.as<float>();
  unit.out_weight = call.out_weight.as<float>(), unit.out_bias = call.out_bias.as<float>();
  unit.forecast = forecast.as<T>(), unit.execute = execute.as<bool>(), unit.score = score.as<float>();
  return unit;
}

}  // namespace

template <typename T>
CpuDecide<T>::CpuDecide(const Op& op, const Info& info)
    : node_(op, info), forecaster_(node_, {"down_weight", "up_weight"}), router_(node_, {"hidden_weight"}) {}

template <typename T>
void CpuDecide<T>::compute(const Context& context) const {
  const DecideCall call(node_, context);
  auto unit = decide<T, T, float>(call, context);
  if (call.rank > 0) unit.down = forecaster_(0, call.down_weight), unit.up = forecaster_(1, call.up_weight);
  unit.router = router_(0, call.hidden_weight);
  best<T>().decide(unit, threads(context));
}

CpuInt4Decide::CpuInt4Decide(const Op& op, const Info& info)
    : node_(op, info), weights_(node_, {"down_weight", "up_weight", "hidden_weight"}) {}

void CpuInt4Decide::compute(const Context& context) const {
  const DecideCall call(node_, context);
  auto unit = decide<float, cpu::Int4, cpu::Int4>(call, context);
  unit.down = weights_(0, call.down_weight, call.scales[0], {}, call.width);
  unit.up = weights_(1, call.up_weight, call.scales[1], {}, call.rank);
  unit.router = weights_(2, call.hidden_weight, call.scales[2], {}, call.width);
  best_kernels().int4.decide(unit, threads(context));
}

namespace {

// The call's weight of this index, of whichever kind.
template <typename W, typename Call>
cpu::Weight<W> weight_of(const Weights<W>& weights, const Call& call, size_t index, const Tensor& weight, int64_t in) {
  if constexpr (std::is_same_v<W, cpu::Int4>) return weights(index, weight, call.scales[index], call.zero_points[index], in);
  else return weights(index, weight);
}

}  // namespace

template <typename T, typename W>
CpuMlp<T, W>::CpuMlp(const Op& op, const Info& info)
    : node_(op, info), setting_(info), weights_(node_, {"gate_weight", "up_weight", "down_weight"}) {}

template <typename T, typename W>
void CpuMlp<T, W>::compute(const Context& context) const {
  const MlpCall call(node_, context);
  const Tensor output = context.output(0, {call.batch, call.sequence, call.width});
  cpu::Mlp<T, W> unit{};
  unit.tokens = call.batch * call.sequence, unit.width = call.width, unit.hidden = call.hidden;
  unit.h = call.h.as<T>(), unit.execute = call.execute.as<bool>();
  unit.gate = weight_of(weights_, call, 0, call.gate_weight, call.width);
  unit.up = weight_of(weights_, call, 1, call.up_weight, call.width);
  unit.down = weight_of(weights_, call, 2, call.down_weight, call.hidden);
  unit.gate_bias = call.gate_bias.as<T>(), unit.up_bias = call.up_bias.as<T>();
  unit.gelu = setting_.gelu;
  unit.contribution = contribution<T>(call.down_bias, call.post_norm, setting_.epsilon, setting_.residual_multiplier,
                                      call.forecast, output);
  if constexpr (std::is_same_v<W, cpu::Int4>) best<T>().int4_mlp(unit, threads(context));
  else best<T>().mlp(unit, threads(context));
}

template <typename T, typename W>
CpuAttention<T, W>::CpuAttention(const Op& op, const Info& info)
    : node_(op, info), setting_(info), weights_(node_, {"q_weight", "k_weight", "v_weight", "o_weight"}) {}

template <typename T, typename W>
void CpuAttention<T, W>::compute(const Context& context) const {
  const AttentionCall call(node_, setting_, context);
  const Tensor output = context.output(0, {call.batch, call.sequence, call.width});
  const auto cache = {call.batch, setting_.kv_heads, call.slots(), setting_.head_dim};
  const Tensor keys = context.output(1, cache), values = context.output(2, cache);
  cpu::Attention<T, W> unit{};
  unit.batch = call.batch, unit.sequence = call.sequence, unit.width = call.width;
  unit.heads = setting_.heads, unit.kv_heads = setting_.kv_heads;
  unit.head_dim = setting_.head_dim, unit.rotary_dim = setting_.rotary_dim;
  unit.total = call.total, unit.past_slots = call.capacity, unit.slots = call.slots();
  unit.scale = setting_.scale, unit.softcap = setting_.softcap;
  unit.strict = &node_.signature() == &kRoutedAttentionStrict || &node_.signature() == &kInt4RoutedAttentionStrict;
  unit.h = call.h.as<T>(), unit.execute = call.execute.as<bool>();
  unit.cos = call.cos.as<T>(), unit.sin = call.sin.as<T>(), unit.mask = call.mask.as<bool>();
  unit.past[0] = call.past_key.as<T>(), unit.past[1] = call.past_value.as<T>();
  unit.present[0] = keys.as<T>(), unit.present[1] = values.as<T>();
  unit.q = weight_of(weights_, call, 0, call.q_weight, call.width);
  unit.kv[0] = weight_of(weights_, call, 1, call.k_weight, call.width);
  unit.kv[1] = weight_of(weights_, call, 2, call.v_weight, call.width);
  unit.o = weight_of(weights_, call, 3, call.o_weight, setting_.heads * setting_.head_dim);
  unit.q_bias = call.q_bias.as<T>(), unit.kv_bias[0] = call.k_bias.as<T>(), unit.kv_bias[1] = call.v_bias.as<T>();
  unit.q_norm = call.q_norm.as<T>(), unit.k_norm = call.k_norm.as<T>();
  unit.q_norm_whole = call.q_norm.present && call.q_norm.shape[0] != setting_.head_dim;
  unit.k_norm_whole = call.k_norm.present && call.k_norm.shape[0] != setting_.head_dim;
  unit.contribution = contribution<T>(call.o_bias, call.post_norm, setting_.epsilon, setting_.residual_multiplier,
                                      call.forecast, output);
  if constexpr (std::is_same_v<W, cpu::Int4>) best<T>().int4_attention(unit, threads(context));
  else best<T>().attention(unit, threads(context));
}

template class CpuDecide<float>;
template class CpuDecide<Half>;
template class CpuMlp<float>;
template class CpuMlp<Half>;
template class CpuAttention<float>;
template class CpuAttention<Half>;
template class CpuMlp<float, cpu::Int4>;
template class CpuMlp<Half, cpu::Int4>;
template class CpuAttention<float, cpu::Int4>;
template class CpuAttention<Half, cpu::Int4>;

}  // namespace ir
