// The inputs of one call of a unit, read in the order of its signature and held against each other's shapes.
#pragma once

#include "op.h"

namespace ir {

// Whether scales, and zero points where there are any, belong to a weight in int4, [out, blocks, 16]: scales are [out, blocks],
// and so are zero points of their type; those in uint8, two a byte, are [out, zero_bytes(blocks)].
bool scales_fit(const Tensor& weight, const Tensor& scales);
bool zero_points_fit(const Tensor& weight, const Tensor& scales, const Tensor& zero_points);
inline int64_t zero_bytes(int64_t blocks) { return (blocks + 1) / 2; }

struct DecideCall {
  Tensor h, threshold, down_weight, down_bias, up_weight, up_bias;  // without a forecaster, up_bias alone is the forecast
  Tensor hidden_weight, hidden_bias, out_weight, out_bias;
  Tensor scales[3];              // of down, up and hidden, if weights are in int4: [out, blocks], and weights are [out, blocks, 16]
  int64_t batch, sequence, width, rank, hidden;  // h is [batch, sequence, width]

  DecideCall(const Node& node, const Context& context);
};

// The attributes of an MLP.
struct MlpSetting {
  bool gelu;  // its tanh form; or else silu
  float epsilon, residual_multiplier;

  explicit MlpSetting(const Info& info);
};

struct MlpCall {
  Tensor h, forecast, execute;  // the latter two are absent in a plain unit
  Tensor gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, post_norm;
  Tensor scales[3], zero_points[3];  // of gate, up and down, if weights are in int4; the latter are optional
  int64_t batch, sequence, width, hidden;  // h is [batch, sequence, width]

  MlpCall(const Node& node, const Context& context);
};

// The attributes of an attention unit.
struct AttentionSetting {
  int64_t heads, kv_heads, head_dim, rotary_dim;  // rotary_dim as the cosines have it: never 0
  float scale, softcap, epsilon, residual_multiplier;

  explicit AttentionSetting(const Info& info);
};

struct AttentionCall {
  Tensor h, forecast, execute, cos, sin, mask, past_key, past_value;
  Tensor q_weight, k_weight, v_weight, o_weight, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm, post_norm;
  Tensor scales[4], zero_points[4];  // of q, k, v and o, if weights are in int4; the latter are optional
  int64_t batch, sequence, width;
  int64_t total;     // T: slots in use after this call; the new tokens are the last of them
  int64_t capacity;  // of past_key: the present has max(capacity, total) slots

  AttentionCall(const Node& node, const AttentionSetting& setting, const Context& context);

  int64_t start() const { return total - sequence; }
  // Whether the past has room: its slots from start on are written. If not, the present is the past and the new tokens.
  bool in_place() const { return capacity >= total; }
  int64_t slots() const { return in_place() ? capacity : total; }
};

}  // namespace ir
