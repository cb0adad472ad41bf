#include "signatures.h"

#include <iterator>

namespace ir {

namespace {

constexpr Type kF = Type::kF;
constexpr bool kOptional = true;

#define IR_ROUTING {"forecast"}, {"execute", Type::kBool}
#define IR_MLP                                                                                    \
  {"gate_weight"}, {"up_weight"}, {"down_weight"}, {"gate_bias", kF, kOptional},                  \
      {"up_bias", kF, kOptional}, {"down_bias", kF, kOptional}, {"post_norm", kF, kOptional}
// start, total, step and step_bias say for the functions' own nodes what mask and the shapes say as well.
#define IR_ATTENTION                                                                              \
  {"cos"}, {"sin"}, {"mask", Type::kBool}, {"step_bias"}, {"start", Type::kInt32},                \
      {"total", Type::kInt32, false, true}, {"step", Type::kBool, false, true}, {"past_key"},     \
      {"past_value"}, {"q_weight"}, {"k_weight"}, {"v_weight"}, {"o_weight"},                     \
      {"q_bias", kF, kOptional}, {"k_bias", kF, kOptional}, {"v_bias", kF, kOptional},            \
      {"o_bias", kF, kOptional}, {"q_norm", kF, kOptional}, {"k_norm", kF, kOptional},            \
      {"post_norm", kF, kOptional}

constexpr Input kDecideInputs[] = {
    {"h"}, {"threshold", Type::kFloat}, {"down_weight", kF, kOptional}, {"down_bias", kF, kOptional},
    {"up_weight", kF, kOptional}, {"up_bias"}, {"hidden_weight", Type::kFloat}, {"hidden_bias", Type::kFloat},
    {"out_weight", Type::kFloat}, {"out_bias", Type::kFloat}};
constexpr Input kInt4DecideInputs[] = {
    {"h"}, {"threshold", Type::kFloat}, {"down_weight", Type::kUint8}, {"down_bias"}, {"up_weight", Type::kUint8}, {"up_bias"},
    {"hidden_weight", Type::kUint8}, {"hidden_bias", Type::kFloat}, {"out_weight", Type::kFloat}, {"out_bias", Type::kFloat},
    {"down_scales"}, {"up_scales"}, {"hidden_scales"}};
constexpr Input kRoutedMlpInputs[] = {{"h"}, IR_ROUTING, IR_MLP};
constexpr Input kDenseMlpInputs[] = {{"h"}, IR_MLP};
constexpr Input kRoutedAttentionInputs[] = {{"h"}, IR_ROUTING, IR_ATTENTION};
constexpr Input kDenseAttentionInputs[] = {{"h"}, IR_ATTENTION};

// A unit's outputs: what it gives, and attention's caches as well.
template <size_t N>
constexpr Signature signature(const char* name, const Input (&inputs)[N], size_t outputs, bool routed) {
  return {name, inputs, N, {kF, kF, kF}, outputs, routed};
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

}  // namespace ir
