// What the CPU kernels take and give, free of any framework.

#pragma once

#include <cstddef>
#include <cstdint>

namespace ir::cpu {

struct Half {  // IEEE binary16, as it is stored
  uint16_t bits;
};

// Runs task(data, 0 .. count - 1) on the runtime's threads, and returns when all are done.
struct Threads {
  void* runtime;
  void (*run)(void* runtime, size_t count, void (*task)(void* data, size_t index), void* data);

  template <typename F>
  void each(int64_t count, const F& f) const {
    if (count == 1) f(0);
    if (count <= 1) return;
    const auto call = [](void* data, size_t index) { (*static_cast<const F*>(data))(static_cast<int64_t>(index)); };
    run(runtime, static_cast<size_t>(count), call, const_cast<F*>(&f));
  }
};

// A weight [in, out]. Packed, if not null, holds it as Level::pack left it, and is what is read.
template <typename T>
struct Weight {
  const T* data;
  const T* packed;
  int64_t in, out;
};

// Names the weights that are stored in 4 bits, in blocks of 32 inputs that share a scale: scale * (q - zero), q in 0..15.
struct Int4 {};

template <>
struct Weight<Int4> {
  const uint32_t* packed;  // as Int4Level::pack left it
  int64_t in, out;
  bool zeros;  // whether it has zero points; if not, they are all 8
};

// What follows a unit's last product: output = multiplier * norm(y + bias), merged with the forecast.
template <typename T>
struct Contribution {
  const T* bias;       // [width] or null
  const T* post_norm;  // [width] or null
  float epsilon, multiplier;
  const T* forecast;  // [tokens, width]; null in a plain unit. It may be the output's own memory.
  T* output;          // [tokens, width]
};

// F: the forecaster's weights. R: the router's.
template <typename T, typename F = T, typename R = float>
struct Decide {
  int64_t tokens, width, rank, hidden;  // without a forecaster, rank is 0 and up_bias the forecast of every token
  const T* h;                           // [tokens, width]
  const float* threshold;               // [tokens]
  Weight<F> down, up;
  const T *down_bias, *up_bias;  // [rank], [width]
  Weight<R> router;              // [width, hidden]
  const float *hidden_bias, *out_weight, *out_bias;  // [hidden], [hidden], [1]
  T* forecast;                                       // [tokens, width]
  bool* execute;                                     // [tokens]
  float* score;                                      // [tokens]
};

// W: its weights.
template <typename T, typename W = T>
struct Mlp {
  int64_t tokens, width, hidden;
  const T* h;           // [tokens, width]
  const bool* execute;  // [tokens]; null: all
  Weight<W> gate, up, down;
  const T *gate_bias, *up_bias;  // [hidden] or null
  bool gelu;                     // its tanh form; or else silu
  Contribution<T> contribution;
};

template <typename T, typename W = T>
struct Attention {
  int64_t batch, sequence, width;
  int64_t heads, kv_heads, head_dim, rotary_dim;
  int64_t total, past_slots, slots;  // in use after this call; of the past; of the present
  float scale, softcap;
  bool strict;
  const T* h;            // [batch, sequence, width]
  const bool* execute;   // [batch, sequence]; null: all
  const T *cos, *sin;    // [batch, sequence, rotary_dim / 2]
  const bool* mask;      // [batch, sequence, total]
  const T* past[2];      // keys, values: [batch, kv_heads, past_slots, head_dim]
  T* present[2];         // [batch, kv_heads, slots, head_dim]; may be the pasts' own memory
  Weight<W> q, kv[2], o;
  const T *q_bias, *kv_bias[2];  // or null
  const T *q_norm, *k_norm;      // or null
  bool q_norm_whole, k_norm_whole;  // of all heads together, not of each
  Contribution<T> contribution;
};

template <typename T>
struct Level {
  size_t (*packed_size)(int64_t in, int64_t out);  // in elements
  void (*pack)(const T* weight, int64_t in, int64_t out, T* packed);
  void (*decide)(const Decide<T>& unit, const Threads& threads);
  void (*mlp)(const Mlp<T>& unit, const Threads& threads);
  void (*attention)(const Attention<T>& unit, const Threads& threads);
  void (*int4_mlp)(const Mlp<T, Int4>& unit, const Threads& threads);
  void (*int4_attention)(const Attention<T, Int4>& unit, const Threads& threads);
};

// What there is for weights in int4 beside the units.
struct Int4Level {
  size_t (*packed_size)(int64_t in, int64_t out, bool zeros);  // in words
  void (*pack)(const uint8_t* weight, const float* scales, const float* zeros, int64_t in, int64_t out, uint32_t* packed);
  void (*widen)(const Half* in, int64_t count, float* out);
  void (*decide)(const Decide<float, Int4, Int4>& unit, const Threads& threads);
};

}  // namespace ir::cpu
