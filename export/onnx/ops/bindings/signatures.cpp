#include "signatures.h"

#include <iterator>

namespace ir {

namespace {

constexpr Type kF = Type::kF, kUint8 = Type::kUint8, kAny = Type::kAny;
constexpr bool kOptional = true;

#define IR_ROUTING {"forecast"}, {"execute", Type::kBool}
#define IR_MLP(type)                                                                              \
  {"gate_weight", type}, {"up_weight", type}, {"down_weight", type}, {"gate_bias", kF, kOptional}, \
      {"up_bias", kF, kOptional}, {"down_bias", kF, kOptional}, {"post_norm", kF, kOptional}
#define IR_MLP_INT4                                                                               \
  IR_MLP(kUint8), {"gate_scales"}, {"up_scales"}, {"down_scales"}, {"gate_zero_points", kAny, kOptional}, \
      {"up_zero_points", kAny, kOptional}, {"down_zero_points", kAny, kOptional}
// start, total, step and step_bias say for the functions' own nodes what mask and the shapes say as well.
#define IR_ATTENTION(type)                                                                            \
  {"cos"}, {"sin"}, {"mask", Type::kBool}, {"step_bias"}, {"start", Type::kInt32},                \
      {"total", Type::kInt32, false, true}, {"step", Type::kBool, false, true}, {"past_key"},     \
      {"past_value"}, {"q_weight", type}, {"k_weight", type}, {"v_weight", type}, {"o_weight", type}, \
      {"q_bias", kF, kOptional}, {"k_bias", kF, kOptional}, {"v_bias", kF, kOptional},            \
      {"o_bias", kF, kOptional}, {"q_norm", kF, kOptional}, {"k_norm", kF, kOptional},            \
      {"post_norm", kF, kOptional}
#define IR_ATTENTION_INT4                                                                         \
  IR_ATTENTION(kUint8), {"q_scales"}, {"k_scales"}, {"v_scales"}, {"o_scales"},                   \
      {"q_zero_points", kAny, kOptional}, {"k_zero_points", kAny, kOptional},                     \
      {"v_zero_points", kAny, kOptional}, {"o_zero_points", kAny, kOptional}

constexpr Input kDecideInputs[] = {
    {"h"}, {"threshold", Type::kFloat}, {"down_weight", kF, kOptional}, {"down_bias", kF, kOptional},
    {"up_weight", kF, kOptional}, {"up_bias"}, {"hidden_weight", Type::kFloat}, {"hidden_bias", Type::kFloat},
    {"out_weight", Type::kFloat}, {"out_bias", Type::kFloat}};
constexpr Input kInt4DecideInputs[] = {
    {"h"}, {"threshold", Type::kFloat}, {"down_weight", kUint8}, {"down_bias"}, {"up_weight", kUint8}, {"up_bias"},
    {"hidden_weight", kUint8}, {"hidden_bias", Type::kFloat}, {"out_weight", Type::kFloat}, {"out_bias", Type::kFloat},
    {"down_scales"}, {"up_scales"}, {"hidden_scales"}};
constexpr Input kRoutedMlpInputs[] = {{"h"}, IR_ROUTING, IR_MLP(kF)};
constexpr Input kDenseMlpInputs[] = {{"h"}, IR_MLP(kF)};
constexpr Input kRoutedAttentionInputs[] = {{"h"}, IR_ROUTING, IR_ATTENTION(kF)};
constexpr Input kDenseAttentionInputs[] = {{"h"}, IR_ATTENTION(kF)};
constexpr Input kInt4RoutedMlpInputs[] = {{"h"}, IR_ROUTING, IR_MLP_INT4};
constexpr Input kInt4DenseMlpInputs[] = {{"h"}, IR_MLP_INT4};
constexpr Input kInt4RoutedAttentionInputs[] = {{"h"}, IR_ROUTING, IR_ATTENTION_INT4};
constexpr Input kInt4DenseAttentionInputs[] = {{"h"}, IR_ATTENTION_INT4};

// A unit's outputs: what it gives, and attention's caches as well.
template <size_t N>
constexpr Signature signature(const char* name, const Input (&inputs)[N], size_t outputs, bool routed, bool int4 = false) {
  return {name, inputs, N, {kF, kF, kF}, outputs, routed, int4};
}

template <size_t N>
constexpr Signature decide(const Input (&inputs)[N], bool int4) {
  return {"Decide", inputs, N, {kF, Type::kBool, Type::kFloat}, 3, false, int4};
}

}  // namespace

constexpr Signature kDecide = decide(kDecideInputs, false), kInt4Decide = decide(kInt4DecideInputs, true);
constexpr Signature kRoutedMlp = signature("RoutedMLP", kRoutedMlpInputs, 1, true);
constexpr Signature kDenseMlp = signature("DenseMLP", kDenseMlpInputs, 1, false);
constexpr Signature kRoutedAttention = signature("RoutedAttention", kRoutedAttentionInputs, 3, true);
constexpr Signature kRoutedAttentionStrict = signature("RoutedAttentionStrict", kRoutedAttentionInputs, 3, true);
constexpr Signature kDenseAttention = signature("DenseAttention", kDenseAttentionInputs, 3, false);
constexpr Signature kInt4RoutedMlp = signature("RoutedMLP", kInt4RoutedMlpInputs, 1, true, true);
constexpr Signature kInt4DenseMlp = signature("DenseMLP", kInt4DenseMlpInputs, 1, false, true);
constexpr Signature kInt4RoutedAttention = signature("RoutedAttention", kInt4RoutedAttentionInputs, 3, true, true);
constexpr Signature kInt4RoutedAttentionStrict = signature("RoutedAttentionStrict", kInt4RoutedAttentionInputs, 3, true, true);
constexpr Signature kInt4DenseAttention = signature("DenseAttention", kInt4DenseAttentionInputs, 3, false, true);

}  // namespace ir
