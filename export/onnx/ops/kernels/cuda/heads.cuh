// What lies between the projections and the attention: biases, norms, the rotary embedding, and the new slots of the cache.
#pragma once

#include "rows.cuh"
#include "sources.cuh"

namespace ir::cuda {

struct HeadShape {
  int heads, kv_heads, head_dim;

  __host__ __device__ int all() const { return heads + 2 * kv_heads; }
  __host__ __device__ int query_width() const { return heads * head_dim; }
  __host__ __device__ int key_width() const { return kv_heads * head_dim; }
};

// An RMS norm of each head, or of all heads of a token together: then inverse says by what its row is multiplied.
template <typename T>
struct HeadNorm {
  const T* weight;  // null: none
  float* inverse;   // null: each head's own
};

// The present cache: keys and values [batch, kv_heads, slots, head_dim].
template <typename T>
struct Cache {
  T *key, *value;
  int slots;
  const int* start;  // of each sequence, where its first new token goes

  __device__ size_t at(int kv_heads, int b, int head, int slot, int head_dim) const {
    return ((static_cast<size_t>(b) * kv_heads + head) * slots + slot) * head_dim;
  }
};

template <typename T>
struct Rotary {
  const T *cos, *sin;  // [batch, sequence, dim / 2]
  int dim;             // the first components of a head, which are rotated
};

// inverse[row] = 1 / root mean square of the row
template <typename T, typename Source>
__global__ void root_mean_squares(Rows rows, bool all, Biased<Source, T> source, int width, float epsilon, float* inverse) {
  const int token = blockIdx.x, row = all ? token : rows.row(token);
  if (!all && !rows.executed(token)) return;
  float squares = 0;
  for (int column = threadIdx.x; column < width; column += blockDim.x) {
    float value[1];
    source.read(value, row, column);
    squares += value[0] * value[0];
  }
  squares = block_sum(squares, shared_memory<float>());
  if (threadIdx.x == 0) inverse[row] = rsqrtf(squares / width + epsilon);
}

// One warp: reads a head of a row, norms and rotates it in shared memory.
template <typename T, typename Source>
__device__ __forceinline__ void prepare_head(const Biased<Source, T>& source, int row, int head, int head_dim, const HeadNorm<T>& norm,
                                             float epsilon, const Rotary<T>& rotary, int token, float* head_values) {
  const int lane = threadIdx.x % kWarp;
  float squares = 0;
  for (int i = lane; i < head_dim; i += kWarp) {
    float value[1];
    source.read(value, row, head * head_dim + i);
    head_values[i] = value[0];
    squares += value[0] * value[0];
  }
  if (norm.weight != nullptr) {
    const float factor = norm.inverse != nullptr ? norm.inverse[row] : rsqrtf(warp_sum(squares) / head_dim + epsilon);
    const T* weight = norm.weight + (norm.inverse != nullptr ? head * head_dim : 0);
    for (int i = lane; i < head_dim; i += kWarp) head_values[i] *= factor * to_float(weight[i]);
  }
  __syncwarp();
  const int half = rotary.dim / 2;
  for (int i = lane; i < half; i += kWarp) {
    const size_t angle = static_cast<size_t>(token) * half + i;
    const float cos = to_float(rotary.cos[angle]), sin = to_float(rotary.sin[angle]);
    const float a = head_values[i], b = head_values[i + half];
    head_values[i] = a * cos - b * sin;
    head_values[i + half] = b * cos + a * sin;
  }
  __syncwarp();
}

// A warp takes one head of one token. strict: approximated tokens leave zeros in the cache. query may be q's own memory.
template <typename T, typename Source>
__global__ void finish_heads(Rows rows, HeadShape shape, bool strict, Biased<Source, T> q, Biased<Source, T> k, Biased<Source, T> v,
                             HeadNorm<T> q_norm, HeadNorm<T> k_norm, float epsilon, Rotary<T> rotary, T* query, Cache<T> cache) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, token = blockIdx.x, head_dim = shape.head_dim;
  int head = blockIdx.y * (blockDim.x / kWarp) + warp;
  if (head >= shape.all()) return;
  const bool executed = rows.executed(token);
  float* values = shared_memory<float>() + warp * head_dim;
  if (head < shape.heads) {
    if (!executed) return;
    const int row = rows.row(token);
    prepare_head(q, row, head, head_dim, q_norm, epsilon, rotary, token, values);
    T* to = query + static_cast<size_t>(row) * shape.query_width() + head * head_dim;
    for (int i = lane; i < head_dim; i += kWarp) to[i] = from_float<T>(values[i]);
    return;
  }
  head -= shape.heads;
  const bool is_key = head < shape.kv_heads;
  if (!is_key) head -= shape.kv_heads;
  const int b = token / rows.sequence, slot = cache.start[b] + token % rows.sequence, row = strict ? rows.row(token) : token;
  if (slot < 0 || slot >= cache.slots) return;  // nothing is written outside, whatever start says
  T* to = (is_key ? cache.key : cache.value) + cache.at(shape.kv_heads, b, head, slot, head_dim);
  if (strict && !executed) {
    for (int i = lane; i < head_dim; i += kWarp) to[i] = from_float<T>(0);
  } else if (is_key) {
    prepare_head(k, row, head, head_dim, k_norm, epsilon, rotary, token, values);
    for (int i = lane; i < head_dim; i += kWarp) to[i] = from_float<T>(values[i]);
  } else {
    for (int i = lane; i < head_dim; i += kWarp) {
      float value[1];
      v.read(value, row, head * head_dim + i);
      to[i] = from_float<T>(value[0]);
    }
  }
}

template <typename T, typename Source>
void finish(const Device& device, const Rows& rows, const HeadShape& shape, bool strict, Biased<Source, T> q, Biased<Source, T> k,
            Biased<Source, T> v, HeadNorm<T> q_norm, HeadNorm<T> k_norm, float epsilon, const Rotary<T>& rotary, T* query,
            const Cache<T>& cache) {
  constexpr int kThreads = 128, kHeads = kThreads / kWarp;
  const size_t sums = kHeads * sizeof(float);
  if (q_norm.inverse != nullptr)
    launch(device, "query norm", root_mean_squares<T, Source>, rows.count(), kThreads, sums, rows, false, q, shape.query_width(), epsilon,
           q_norm.inverse);
  if (k_norm.inverse != nullptr)
    launch(device, "key norm", root_mean_squares<T, Source>, rows.count(), kThreads, sums, rows, !strict, k, shape.key_width(), epsilon,
           k_norm.inverse);
  launch(device, "rotary embedding", finish_heads<T, Source>, dim3(rows.count(), divide_up(shape.all(), kHeads)), kThreads,
         sums * shape.head_dim, rows, shape, strict, q, k, v, q_norm, k_norm, epsilon, rotary, query, cache);
}

}  // namespace ir::cuda
