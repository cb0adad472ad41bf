// forecast = up(silu(down(h)));  score = out(silu(hidden(h))), execute = score > threshold.
//
// Of few tokens in two kernels: the first layers of forecaster and router in parts of the depth, then all that follows. Of many
// cuBLAS computes the forecaster's products. The router is fp32 at every precision.
#pragma once

#include "activation.cuh"
#include "blas.cuh"
#include "merge.cuh"
#include "skinny.cuh"

namespace ir::cuda {

// Without a forecaster, rank is 0 and up_bias the forecast of every token.
template <typename T>
struct Decide {
  int tokens, width, rank, hidden;
  const T* h;              // [tokens, width]
  const float* threshold;  // [tokens]
  const T *down_weight, *down_bias, *up_weight, *up_bias;  // [width, rank], [rank], [rank, width], [width]
  const float *hidden_weight, *hidden_bias, *out_weight, *out_bias;  // [width, hidden], [hidden], [hidden], [1]
  T* forecast;    // [tokens, width]
  bool* execute;  // [tokens]
  float* score;   // [tokens]
};

constexpr int kFirstThreads = 256;

// parts[slice, token, column] of h times [down | hidden]. A block takes 16 tokens and kColumns columns; its threads share the
// columns' depth, 8 rows at a time. `rank`: how many columns of down_weight come first.
template <typename T, int kColumns, bool kWhole>
__global__ void __launch_bounds__(kFirstThreads) first_layers(Decide<T> d, int rank, int slice, float* parts) {
  constexpr int kShares = kFirstThreads / kColumns;
  auto* shared = shared_memory<float>();  // [shares, 16, columns]
  const int share = threadIdx.x / kColumns, lane = threadIdx.x % kColumns, columns = rank + d.hidden;
  const int column = blockIdx.z * kColumns + lane, token = blockIdx.x * kFew, count = min(kFew, d.tokens - token);
  const int end = min(d.width, static_cast<int>(blockIdx.y + 1) * slice);
  float sums[kFew] = {};
  for (int from = blockIdx.y * slice + 8 * share; from < end; from += 8 * kShares) {
    float weights[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const size_t row = from + i;
      weights[i] = column >= columns || from + i >= end ? 0
                   : column < rank                      ? to_float(d.down_weight[row * rank + column])
                                                        : d.hidden_weight[row * d.hidden + column - rank];
    }
#pragma unroll
    for (int r = 0; r < kFew; ++r) {
      const auto pack = read_x<kWhole>(d.h + static_cast<size_t>(token + r) * d.width, r < count, from, d.width);
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[r] += to_float(pack.values[i]) * weights[i];
    }
  }
#pragma unroll
  for (int r = 0; r < kFew; ++r) shared[(share * kFew + r) * kColumns + lane] = sums[r];
  __syncthreads();
  for (int i = threadIdx.x; i < count * kColumns; i += kFirstThreads) {
    const int r = i / kColumns, c = i % kColumns, at = blockIdx.z * kColumns + c;
    if (at >= columns) continue;
    float sum = 0;
    for (int s = 0; s < kShares; ++s) sum += shared[(s * kFew + r) * kColumns + c];
    parts[(static_cast<size_t>(blockIdx.y) * d.tokens + token + r) * columns + at] = sum;
  }
}

__device__ __forceinline__ float silu(float x) { return activated(x, Activation::kSilu); }

// A block takes a token: its decision, and a chunk of its forecast's columns if there are any in `first`, which holds `rank` of
// the forecaster's and then the router's.
template <typename T, int kWidth>
__global__ void second_layers(Decide<T> d, int rank, Parts first, int chunk) {
  auto* codes = shared_memory<float>();  // [rank + hidden]
  const int token = blockIdx.x, columns = rank + d.hidden;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    float sum[1];
    first.read(sum, token, i);
    codes[i] = silu(sum[0] + (i < rank ? to_float(d.down_bias[i]) : d.hidden_bias[i - rank]));
  }
  __syncthreads();
  if (blockIdx.y == 0 && threadIdx.x < kWarp) {
    float sum = 0;
    for (int i = threadIdx.x; i < d.hidden; i += kWarp) sum += codes[rank + i] * d.out_weight[i];
    sum = warp_sum(sum) + d.out_bias[0];
    if (threadIdx.x == 0) {
      d.score[token] = sum;
      d.execute[token] = sum > d.threshold[token];
    }
  }
  const int begin = blockIdx.y * chunk, end = min(d.width, begin + chunk);
  for (int column = begin + threadIdx.x * kWidth; column < end; column += blockDim.x * kWidth) {
    float sums[kWidth];
    load(sums, d.up_bias + column);
    for (int k = 0; k < rank; ++k) {
      float weights[kWidth];
      load(weights, d.up_weight + static_cast<size_t>(k) * d.width + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums[i] += codes[k] * weights[i];
    }
    store(d.forecast + static_cast<size_t>(token) * d.width + column, sums);
  }
}

// In place.
template <typename T>
__global__ void bend(T* codes, const T* bias, int rank, int size) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < size) codes[i] = from_float<T>(silu(to_float(codes[i]) + to_float(bias[i % rank])));
}

// The first layers' products that are not cuBLAS's: of the router, and of a forecaster of `rank`, if any.
template <typename T>
Parts multiply_first(const Device& device, const Decide<T>& d, int rank) {
  const int columns = rank + d.hidden, groups = divide_up(d.tokens, kFew);
  const bool whole = d.width % 8 == 0;
  const int wide = columns > 16 ? 32 : columns > 8 ? 16 : 8, tiles = divide_up(columns, wide);
  // Every thread has some rows, every multiprocessor some blocks.
  const int round = kFirstThreads / wide * 8, wanted = divide_up(2 * device.multiprocessors, tiles * groups);
  const int slice = divide_up(divide_up(d.width, wanted), round) * round, slices = divide_up(d.width, slice);
  auto [parts] = allocate<float>(device, static_cast<size_t>(slices) * d.tokens * columns);
  const auto kernel = wide == 32   ? whole ? first_layers<T, 32, true> : first_layers<T, 32, false>
                      : wide == 16 ? whole ? first_layers<T, 16, true> : first_layers<T, 16, false>
                                   : whole ? first_layers<T, 8, true> : first_layers<T, 8, false>;
  launch(device, "first layers", kernel, dim3(groups, slices, tiles), kFirstThreads, kFirstThreads * kFew * sizeof(float), d, rank,
         slice, parts);
  return {parts, slices, d.tokens, columns, 0};
}

// `columns` of the forecast, all or none.
template <typename T>
void finish(const Device& device, const Decide<T>& d, int rank, const Parts& first, int columns) {
  constexpr int kThreads = 128;
  const int each = d.width % 8 == 0 ? 8 : 1, chunk = columns == 0 ? 0 : kThreads * each;
  const auto kernel = each == 8 ? second_layers<T, 8> : second_layers<T, 1>;
  launch(device, "second layers", kernel, dim3(d.tokens, columns == 0 ? 1 : divide_up(columns, chunk)), kThreads,
         (rank + d.hidden) * sizeof(float), d, rank, first, chunk);
}

template <typename T>
void decide(const Device& device, const Decide<T>& d) {
  if (d.tokens == 0) return;
  if (d.tokens <= kFew || d.rank == 0) return finish(device, d, d.rank, multiply_first(device, d, d.rank), d.width);
  finish(device, d, 0, multiply_first(device, d, 0), 0);
  const int size = d.tokens * d.rank;
  auto [codes] = allocate<T>(device, size);
  multiply(device, d.h, d.tokens, d.width, d.down_weight, d.rank, codes);
  launch(device, "activation", bend<T>, divide_up(size, 256), 256, 0, codes, d.down_bias, d.rank, size);
  multiply(device, codes, d.tokens, d.rank, d.up_weight, d.width, d.forecast);
  const Rows all{1, d.tokens, nullptr, nullptr, nullptr, nullptr};
  merge(device, all, Biased{Stored<T>{d.forecast, d.width}, d.up_bias}, Contribution<T>{nullptr, 0, 1}, d.forecast, d.forecast, d.width);
}

}  // namespace ir::cuda
