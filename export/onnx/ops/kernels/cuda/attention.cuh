// k, v = key(h), value(h), appended to the cache;
// output = contribution(o(softmax(scale * q(h) k^T where mask) v)) where execute, forecast elsewhere.
#pragma once

#include "attend_split.cuh"
#include "attend_tiles.cuh"
#include "blas.cuh"
#include "cache.cuh"
#include "count.cuh"
#include "merge.cuh"
#include "skinny.cuh"

namespace ir::cuda {

// h, forecast, output [batch, sequence, width]; weights [in, out]; mask [batch, sequence, total]. Null: biases and norms that
// are not there, and in a plain unit forecast and execute.
template <typename T>
struct Attention {
  int batch, sequence, width, total;
  int past_slots;  // of past_key and past_value [batch, kv_heads, past_slots, head_dim], which may be the present's own memory
  HeadShape shape;
  bool strict;  // approximated tokens leave zeros in the cache, which nothing sees
  const T *h, *forecast;
  const bool *execute, *mask;
  Rotary<T> rotary;
  const T *past_key, *past_value;
  const T *q_weight, *k_weight, *v_weight, *o_weight, *q_bias, *k_bias, *v_bias, *o_bias, *q_norm, *k_norm;
  bool whole_q_norm, whole_k_norm;  // of all heads of a token together
  float scale, softcap;
  Contribution<T> contribution;  // its epsilon is that of all norms
  T* output;
  Cache<T> cache;  // the present
};

// The longest calls whose queries each go over the cache by themselves.
constexpr int kFewQueries = 4;

template <typename T>
class AttentionUnit {
 public:
  AttentionUnit(const Device& device, const Attention<T>& a)
      : device_(device), a_(a), tokens_(a.batch * a.sequence), queries_(a.shape.query_width()), keys_(a.shape.key_width()) {}

  void run() {
    if (a_.shape.head_dim % 8 != 0 || a_.shape.head_dim > 256)
      throw Failure("heads of " + std::to_string(a_.shape.head_dim) + " components; they may have 8, 16, ... 256");
    const int rows = a_.batch * a_.shape.kv_heads;
    copy_past(device_, a_.past_key, a_.cache.key, rows, a_.past_slots, a_.cache.slots, a_.shape.head_dim);
    copy_past(device_, a_.past_value, a_.cache.value, rows, a_.past_slots, a_.cache.slots, a_.shape.head_dim);
    if (tokens_ == 0) return;
    tokens_ <= kFew ? few() : many();
  }

 private:
  // The same launches whatever executes, as in mlp_of_few.
  void few() {
    const Rows rows{a_.batch, a_.sequence, a_.execute, nullptr, nullptr, nullptr};
    const Projections<T> qkv{{{a_.q_weight, queries_, false}, {a_.k_weight, keys_, !a_.strict}, {a_.v_weight, keys_, !a_.strict}}, 3};
    const Projections<T> o{{{a_.o_weight, a_.width, false}}, 1};
    const Slices qkv_slices(device_, qkv.tiles(), a_.width), o_slices(device_, o.tiles(), queries_);
    auto [qkv_parts, query, attended, o_parts] =
        allocate<float, T, T, float>(device_, size_t(qkv_slices.count) * tokens_ * qkv.columns(), tokens_ * queries_, tokens_ * queries_,
                                     size_t(o_slices.count) * tokens_ * a_.width);

    multiply_skinny(device_, "q, k and v", qkv, rows, a_.h, a_.width, qkv_slices, qkv_parts);
    Parts q{qkv_parts, qkv_slices.count, tokens_, qkv.columns(), 0}, k = q, v = q;
    k.first = queries_, v.first = queries_ + keys_;
    finish_all(rows, q, k, v, query);
    attend_split(device_, attend(rows, query, attended), tokens_);
    multiply_skinny(device_, "o", o, rows, attended, queries_, o_slices, o_parts);
    finish_output(rows, Parts{o_parts, o_slices.count, tokens_, a_.width, 0});
  }

  // Keys and values of all tokens do not wait for the count of those that execute.
  void many() {
    const Rows rows = compact(device_, a_.batch, a_.sequence, a_.execute);
    const Count counting(device_, rows);
    auto [k, v] = allocate<T, T>(device_, size_t(tokens_) * keys_, size_t(tokens_) * keys_);
    if (!a_.strict) project_keys(a_.h, tokens_, k, v);
    const int count = counting.wait();

    auto [query, attended, gathered] =
        allocate<T, T, T>(device_, size_t(count) * queries_, size_t(count) * queries_, size_t(count) * a_.width);
    const T* x = a_.h;
    if (count < tokens_) {
      gather(device_, rows, count, a_.h, gathered, a_.width);
      x = gathered;
    }
    if (a_.strict) project_keys(x, count, k, v);
    multiply(device_, x, count, a_.width, a_.q_weight, queries_, query);
    finish_all(rows, Stored<T>{query, queries_}, Stored<T>{k, keys_}, Stored<T>{v, keys_}, query);
    if (count > 0) {
      const Attend<T> attention = attend(rows, query, attended);
      if constexpr (sizeof(T) == 2)
        a_.sequence <= kFewQueries ? attend_split(device_, attention, count) : attend_tiles(device_, attention, count);
      else
        attend_split(device_, attention, count);
    }
    T* y = gathered;  // read no more
    multiply(device_, attended, count, queries_, a_.o_weight, a_.width, y);
    finish_output(rows, Stored<T>{y, a_.width});
  }

  void project_keys(const T* x, int rows, T* k, T* v) {
    multiply(device_, x, rows, a_.width, a_.k_weight, keys_, k);
    multiply(device_, x, rows, a_.width, a_.v_weight, keys_, v);
  }

  template <typename Source>
  void finish_all(const Rows& rows, Source q, Source k, Source v, T* query) {
    HeadNorm<T> q_norm{a_.q_norm, nullptr}, k_norm{a_.k_norm, nullptr};
    if (a_.whole_q_norm) std::tie(q_norm.inverse) = allocate<float>(device_, tokens_);
    if (a_.whole_k_norm) std::tie(k_norm.inverse) = allocate<float>(device_, tokens_);
    finish(device_, rows, a_.shape, a_.strict, Biased{q, a_.q_bias}, Biased{k, a_.k_bias}, Biased{v, a_.v_bias}, q_norm, k_norm,
           a_.contribution.epsilon, a_.rotary, query, a_.cache);
  }

  // With what a strict cache holds, which is known once the new keys are in it.
  Attend<T> attend(const Rows& rows, const T* query, T* attended) {
    bool* kept = nullptr;
    if (a_.strict) {
      constexpr int kThreads = 128;
      std::tie(kept) = allocate<bool>(device_, size_t(a_.batch) * a_.total);
      launch(device_, "strict cache", find_kept<T>, dim3(divide_up(a_.total, kThreads / kWarp), a_.batch), kThreads, 0, a_.cache.key,
             a_.shape.kv_heads, a_.cache.slots, a_.shape.head_dim, a_.total, kept);
    }
    return {rows, a_.shape, query, a_.cache, a_.mask, kept, a_.total, a_.scale, a_.softcap, attended};
  }

  template <typename Source>
  void finish_output(const Rows& rows, Source y) {
    merge(device_, rows, Biased{y, a_.o_bias}, a_.contribution, a_.forecast, a_.output, a_.width);
  }

  const Device& device_;
  const Attention<T>& a_;
  int tokens_, queries_, keys_;
};

template <typename T>
void attention(const Device& device, const Attention<T>& a) {
  AttentionUnit<T>(device, a).run();
}

}  // namespace ir::cuda
