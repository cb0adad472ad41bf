#include "calls.h"

namespace ir {

namespace {

// Takes a call's inputs one after the other.
class Reader {
 public:
  Reader(const Node& node, const Context& context) : node_(node), context_(context) {}

  Tensor next() {
    const Input& input = node_.signature().inputs[index_];
    Tensor tensor = node_.input(context_, index_++);
    if (!tensor.present && !input.optional) throw Error(std::string(input.name) + " is missing");
    return tensor;
  }
  void skip() { ++index_; }
  template <size_t N>
  void fill(Tensor (&tensors)[N]) {
    for (Tensor& tensor : tensors) tensor = next();
  }

 private:
  const Node& node_;
  const Context& context_;
  size_t index_ = 0;
};

// Throws unless the tensor, if it is there at all, has this shape.
void expect(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (!tensor.present) return;
  bool same = tensor.rank == shape.size();
  for (size_t i = 0; same && i < tensor.rank; ++i) same = tensor.shape[i] == shape.begin()[i];
  if (same) return;
  Tensor wanted;
  for (const int64_t size : shape) wanted.shape[wanted.rank++] = size;
  throw Error(std::string(name) + " has shape " + tensor.text() + ", not " + wanted.text());
}

void expect_rank(const char* name, const Tensor& tensor, size_t rank) {
  if (tensor.rank != rank)
    throw Error(std::string(name) + " has shape " + tensor.text() + ", not " + std::to_string(rank) + " dimensions");
}

// The weights of a projection, of whichever kind.
void expect_weight(const char* name, const Tensor& weight, int64_t in, int64_t out, const Tensor& scales,
                   const Tensor& zero_points = {}) {
  if (!scales.present) return expect(name, weight, {in, out});
  const int64_t blocks = (in + 31) / 32;
  expect(name, weight, {out, blocks, 16});
  if (!scales_fit(weight, scales))
    throw Error(std::string(name) + "'s scales have shape " + scales.text() + ", its weights " + weight.text());
  if (!zero_points_fit(weight, scales, zero_points))
    throw Error(std::string(name) + "'s zero points have shape " + zero_points.text() + ", its weights " + weight.text() +
                ", or are neither uint8 nor of the scales' type");
}

}  // namespace

bool scales_fit(const Tensor& weight, const Tensor& scales) {
  return scales.rank == 2 && scales.shape[0] == weight.shape[0] && scales.shape[1] == weight.shape[1];
}

bool zero_points_fit(const Tensor& weight, const Tensor& scales, const Tensor& zero_points) {
  if (!zero_points.present) return true;
  const bool packed = zero_points.element == abi::kUint8;
  return (packed || zero_points.element == scales.element) && zero_points.rank == 2 && zero_points.shape[0] == weight.shape[0] &&
         zero_points.shape[1] == (packed ? zero_bytes(weight.shape[1]) : weight.shape[1]);
}

DecideCall::DecideCall(const Node& node, const Context& context) {
  Reader reader(node, context);
  h = reader.next(), threshold = reader.next();
  down_weight = reader.next(), down_bias = reader.next(), up_weight = reader.next(), up_bias = reader.next();
  hidden_weight = reader.next(), hidden_bias = reader.next(), out_weight = reader.next(), out_bias = reader.next();

  if (node.signature().int4) reader.fill(scales);

  expect_rank("h", h, 3);
  expect_rank("hidden_bias", hidden_bias, 1);
  if (down_bias.present) expect_rank("down_bias", down_bias, 1);
  if (down_weight.present != down_bias.present || down_weight.present != up_weight.present)
    throw Error("of down_weight, down_bias and up_weight there must be all or none");
  batch = h.shape[0], sequence = h.shape[1], width = h.shape[2];
  rank = down_bias.present ? down_bias.shape[0] : 0, hidden = hidden_bias.shape[0];
  expect("threshold", threshold, {batch, sequence});
  expect_weight("down_weight", down_weight, width, rank, scales[0]);
  expect_weight("up_weight", up_weight, rank, width, scales[1]);
  expect("up_bias", up_bias, {width});
  expect_weight("hidden_weight", hidden_weight, width, hidden, scales[2]);
  expect("out_weight", out_weight, {hidden});
  expect("out_bias", out_bias, {1});
}

MlpSetting::MlpSetting(const Info& info)
    : epsilon(info.attribute("epsilon", 1e-5F)), residual_multiplier(info.attribute("residual_multiplier", 1.0F)) {
  const std::string activation = info.attribute("activation", "silu");
  gelu = activation == "gelu_pytorch_tanh";
  if (!gelu && activation != "silu") throw Error("activation '" + activation + "' is not supported", abi::kNotImplemented);
}

MlpCall::MlpCall(const Node& node, const Context& context) {
  Reader reader(node, context);
  h = reader.next();
  if (node.signature().routed) forecast = reader.next(), execute = reader.next();
  gate_weight = reader.next(), up_weight = reader.next(), down_weight = reader.next();
  gate_bias = reader.next(), up_bias = reader.next(), down_bias = reader.next();
  post_norm = reader.next();
  const bool int4 = node.signature().int4;
  if (int4) reader.fill(scales), reader.fill(zero_points);

  expect_rank("h", h, 3);
  expect_rank("gate_weight", gate_weight, int4 ? 3 : 2);
  batch = h.shape[0], sequence = h.shape[1], width = h.shape[2], hidden = gate_weight.shape[int4 ? 0 : 1];
  expect("forecast", forecast, {batch, sequence, width});
  expect("execute", execute, {batch, sequence});
  expect_weight("gate_weight", gate_weight, width, hidden, scales[0], zero_points[0]);
  expect_weight("up_weight", up_weight, width, hidden, scales[1], zero_points[1]);
  expect_weight("down_weight", down_weight, hidden, width, scales[2], zero_points[2]);
  expect("gate_bias", gate_bias, {hidden});
  expect("up_bias", up_bias, {hidden});
  expect("down_bias", down_bias, {width});
  expect("post_norm", post_norm, {width});
}

AttentionSetting::AttentionSetting(const Info& info)
    : heads(info.required("num_heads")),
      kv_heads(info.required("kv_num_heads")),
      head_dim(info.required("head_dim")),
      rotary_dim(info.attribute("rotary_dim", int64_t{0})),
      scale(info.required_float("scale")),
      softcap(info.attribute("softcap", 0.0F)),
      epsilon(info.attribute("epsilon", 1e-5F)),
      residual_multiplier(info.attribute("residual_multiplier", 1.0F)) {
  if (rotary_dim == 0) rotary_dim = head_dim;
  if (kv_heads < 1 || head_dim < 1 || heads < 1 || heads % kv_heads != 0)
    throw Error(std::to_string(heads) + " query heads over " + std::to_string(kv_heads) + " key/value heads of " +
                std::to_string(head_dim));
  if (rotary_dim < 0 || rotary_dim > head_dim || rotary_dim % 2 != 0)
    throw Error("rotary_dim " + std::to_string(rotary_dim) + " of heads of " + std::to_string(head_dim));
}

AttentionCall::AttentionCall(const Node& node, const AttentionSetting& setting, const Context& context) {
  Reader reader(node, context);
  h = reader.next();
  if (node.signature().routed) forecast = reader.next(), execute = reader.next();
  cos = reader.next(), sin = reader.next(), mask = reader.next();
  for (int hint = 0; hint < 4; ++hint) reader.skip();  // step_bias, start, total, step
  past_key = reader.next(), past_value = reader.next();
  q_weight = reader.next(), k_weight = reader.next(), v_weight = reader.next(), o_weight = reader.next();
  q_bias = reader.next(), k_bias = reader.next(), v_bias = reader.next(), o_bias = reader.next();
  q_norm = reader.next(), k_norm = reader.next(), post_norm = reader.next();
  if (node.signature().int4) reader.fill(scales), reader.fill(zero_points);

  expect_rank("h", h, 3);
  expect_rank("mask", mask, 3);
  expect_rank("past_key", past_key, 4);
  batch = h.shape[0], sequence = h.shape[1], width = h.shape[2];
  total = mask.shape[2], capacity = past_key.shape[2];
  const int64_t q = setting.heads * setting.head_dim, kv = setting.kv_heads * setting.head_dim;
  expect("forecast", forecast, {batch, sequence, width});
  expect("execute", execute, {batch, sequence});
  expect("cos", cos, {batch, sequence, setting.rotary_dim / 2});
  expect("sin", sin, {batch, sequence, setting.rotary_dim / 2});
  expect("mask", mask, {batch, sequence, total});
  expect("past_key", past_key, {batch, setting.kv_heads, capacity, setting.head_dim});
  expect("past_value", past_value, {batch, setting.kv_heads, capacity, setting.head_dim});
  expect_weight("q_weight", q_weight, width, q, scales[0], zero_points[0]);
  expect_weight("k_weight", k_weight, width, kv, scales[1], zero_points[1]);
  expect_weight("v_weight", v_weight, width, kv, scales[2], zero_points[2]);
  expect_weight("o_weight", o_weight, q, width, scales[3], zero_points[3]);
  expect("q_bias", q_bias, {q});
  expect("k_bias", k_bias, {kv});
  expect("v_bias", v_bias, {kv});
  expect("o_bias", o_bias, {width});
  // A norm is of each head, or of all heads together.
  expect("q_norm", q_norm, {q_norm.shape[0] == setting.head_dim ? setting.head_dim : q});
  expect("k_norm", k_norm, {k_norm.shape[0] == setting.head_dim ? setting.head_dim : kv});
  expect("post_norm", post_norm, {width});
  if (total < sequence || (!in_place() && capacity != start()))
    throw Error("mask " + mask.text() + " and past_key " + past_key.text() + " do not fit " + std::to_string(sequence) +
                " new tokens");
}

}  // namespace ir
