#include "cpu.h"

#include "../kernels/cpu/level.h"
#include "signatures.h"

namespace ir {

namespace {

#if defined(__x86_64__)
#define IR_BEST(levels)                                                           \
  __builtin_cpu_supports("x86-64-v4")   ? cpu::x86_64_v4::levels                  \
  : __builtin_cpu_supports("x86-64-v3") ? cpu::x86_64_v3::levels : cpu::x86_64::levels
#else
#define IR_BEST(levels) cpu::native::levels
#endif

// The kernels for the best level of the instruction set that the processor has.
template <typename T>
const cpu::Level<T>& best() {
  if constexpr (sizeof(T) == sizeof(Half)) return IR_BEST(kHalf);
  else return IR_BEST(kFloat);
}
const cpu::Int4Level& best_int4() { return IR_BEST(kInt4); }
#undef IR_BEST

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
Weights<T>::Weights(const Node& node, std::initializer_list<const char*> names) {
  for (const char* name : names) {
    std::vector<T, HugePages<T>>& packed = packed_.emplace_back();
    const Tensor weight = node.constant(node.signature().index(name));
    if (!weight.present || weight.rank != 2) continue;
    packed.resize(best<T>().packed_size(weight.shape[0], weight.shape[1]));
    best<T>().pack(weight.as<T>(), weight.shape[0], weight.shape[1], packed.data());
  }
}

template <typename T>
cpu::Weight<T> Weights<T>::operator()(size_t index, const Tensor& tensor) const {
  const std::vector<T, HugePages<T>>& packed = packed_[index];
  return {tensor.as<T>(), packed.empty() ? nullptr : packed.data(), tensor.shape[0], tensor.shape[1]};
}

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

namespace {

template <typename Words>
void pack(const Tensor& weight, const Tensor& scales, Words& packed) {
  const int64_t in = 32 * weight.shape[1], out = weight.shape[0];  // up to whole blocks: they are packed alike
  packed.resize(best_int4().packed_size(in, out));
  best_int4().pack(weight.as<uint8_t>(), scales.as<float>(), in, out, packed.data());
}

}  // namespace

Int4Weight::Int4Weight(const Node& node, const char* weight, const char* scales) {
  const Signature& signature = node.signature();
  const Tensor q = node.constant(signature.index(weight)), scale = node.constant(signature.index(scales));
  // What has other shapes is left to the call, which refuses it.
  if (!q.present || !scale.present || q.rank != 3 || q.shape[2] != 16 || scale.size() != q.shape[0] * q.shape[1]) return;
  pack(q, scale, packed_);
}

cpu::Weight<cpu::Int4> Int4Weight::operator()(const Tensor& weight, const Tensor& scales, int64_t in,
                                              std::vector<uint32_t>& packed) const {
  if (packed_.empty()) pack(weight, scales, packed);
  return {packed_.empty() ? packed.data() : packed_.data(), in, weight.shape[0]};
}

CpuInt4Decide::CpuInt4Decide(const Op& op, const Info& info)
    : node_(op, info),
      down_(node_, "down_weight", "down_scales"),
      up_(node_, "up_weight", "up_scales"),
      router_(node_, "hidden_weight", "hidden_scales") {}

void CpuInt4Decide::compute(const Context& context) const {
  const DecideCall call(node_, context);
  auto unit = decide<float, cpu::Int4, cpu::Int4>(call, context);
  std::vector<uint32_t> packed[3];
  unit.down = down_(call.down_weight, call.down_scales, call.width, packed[0]);
  unit.up = up_(call.up_weight, call.up_scales, call.rank, packed[1]);
  unit.router = router_(call.hidden_weight, call.hidden_scales, call.width, packed[2]);
  best_int4().decide(unit, threads(context));
}

template <typename T>
CpuMlp<T>::CpuMlp(const Op& op, const Info& info)
    : node_(op, info), setting_(info), weights_(node_, {"gate_weight", "up_weight", "down_weight"}) {}

template <typename T>
void CpuMlp<T>::compute(const Context& context) const {
  const MlpCall call(node_, context);
  const Tensor output = context.output(0, {call.batch, call.sequence, call.width});
  cpu::Mlp<T> unit{};
  unit.tokens = call.batch * call.sequence, unit.width = call.width, unit.hidden = call.hidden;
  unit.h = call.h.as<T>(), unit.execute = call.execute.as<bool>();
  unit.gate = weights_(0, call.gate_weight), unit.up = weights_(1, call.up_weight), unit.down = weights_(2, call.down_weight);
  unit.gate_bias = call.gate_bias.as<T>(), unit.up_bias = call.up_bias.as<T>();
  unit.gelu = setting_.gelu;
  unit.contribution = contribution<T>(call.down_bias, call.post_norm, setting_.epsilon, setting_.residual_multiplier,
                                      call.forecast, output);
  best<T>().mlp(unit, threads(context));
}

template <typename T>
CpuAttention<T>::CpuAttention(const Op& op, const Info& info)
    : node_(op, info), setting_(info), weights_(node_, {"q_weight", "k_weight", "v_weight", "o_weight"}) {}

template <typename T>
void CpuAttention<T>::compute(const Context& context) const {
  const AttentionCall call(node_, setting_, context);
  const Tensor output = context.output(0, {call.batch, call.sequence, call.width});
  const auto cache = {call.batch, setting_.kv_heads, call.slots(), setting_.head_dim};
  const Tensor keys = context.output(1, cache), values = context.output(2, cache);
  cpu::Attention<T> unit{};
  unit.batch = call.batch, unit.sequence = call.sequence, unit.width = call.width;
  unit.heads = setting_.heads, unit.kv_heads = setting_.kv_heads;
  unit.head_dim = setting_.head_dim, unit.rotary_dim = setting_.rotary_dim;
  unit.total = call.total, unit.past_slots = call.capacity, unit.slots = call.slots();
  unit.scale = setting_.scale, unit.softcap = setting_.softcap;
  unit.strict = &node_.signature() == &kRoutedAttentionStrict;
  unit.h = call.h.as<T>(), unit.execute = call.execute.as<bool>();
  unit.cos = call.cos.as<T>(), unit.sin = call.sin.as<T>(), unit.mask = call.mask.as<bool>();
  unit.past[0] = call.past_key.as<T>(), unit.past[1] = call.past_value.as<T>();
  unit.present[0] = keys.as<T>(), unit.present[1] = values.as<T>();
  unit.q = weights_(0, call.q_weight), unit.o = weights_(3, call.o_weight);
  unit.kv[0] = weights_(1, call.k_weight), unit.kv[1] = weights_(2, call.v_weight);
  unit.q_bias = call.q_bias.as<T>(), unit.kv_bias[0] = call.k_bias.as<T>(), unit.kv_bias[1] = call.v_bias.as<T>();
  unit.q_norm = call.q_norm.as<T>(), unit.k_norm = call.k_norm.as<T>();
  unit.q_norm_whole = call.q_norm.present && call.q_norm.shape[0] != setting_.head_dim;
  unit.k_norm_whole = call.k_norm.present && call.k_norm.shape[0] != setting_.head_dim;
  unit.contribution = contribution<T>(call.o_bias, call.post_norm, setting_.epsilon, setting_.residual_multiplier,
                                      call.forecast, output);
  best<T>().attention(unit, threads(context));
}

template class CpuDecide<float>;
template class CpuDecide<Half>;
template class CpuMlp<float>;
template class CpuMlp<Half>;
template class CpuAttention<float>;
template class CpuAttention<Half>;

}  // namespace ir
