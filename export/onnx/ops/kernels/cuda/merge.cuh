// What a unit adds to the stream: its last projection, normed and scaled, where it executed; the forecast elsewhere.
#pragma once

#include "rows.cuh"
#include "sources.cuh"

namespace ir::cuda {

template <typename T>
struct Contribution {
  const T* post_norm;  // null: none
  float epsilon, multiplier;
};

// A block takes one token, and all of its columns where they are normed. output may be forecast's own memory.
template <typename T, int kWidth, typename Source>
__global__ void merged_rows(Rows rows, Biased<Source, T> y, Contribution<T> contribution, const T* forecast, T* output, int width,
                            int chunk) {
  const int token = blockIdx.x, row = rows.row(token), begin = blockIdx.y * chunk, end = min(width, begin + chunk);
  const size_t at = static_cast<size_t>(token) * width;
  const bool executed = rows.executed(token);
  float values[kWidth], factor = contribution.multiplier;
  if (executed && contribution.post_norm != nullptr) {
    float squares = 0;
    for (int column = begin + threadIdx.x * kWidth; column < end; column += blockDim.x * kWidth) {
      y.read(values, row, column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) squares += values[i] * values[i];
    }
    factor *= rsqrtf(block_sum(squares, shared_memory<float>()) / width + contribution.epsilon);
  }
  for (int column = begin + threadIdx.x * kWidth; column < end; column += blockDim.x * kWidth) {
    if (!executed) {
      load(values, forecast + at + column);
    } else {
      y.read(values, row, column);
      float weights[kWidth];
      if (contribution.post_norm != nullptr) load(weights, contribution.post_norm + column);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) values[i] *= contribution.post_norm != nullptr ? factor * weights[i] : factor;
    }
    store(output + at + column, values);
  }
}

template <typename T, typename Source>
void merge(const Device& device, const Rows& rows, Biased<Source, T> y, const Contribution<T>& contribution, const T* forecast,
           T* output, int width) {
  const int each = width % 8 == 0 ? 8 : 1;
  const bool normed = contribution.post_norm != nullptr;
  const int threads = normed ? 512 : 128, chunk = normed ? width : threads * each;
  const auto kernel = each == 8 ? merged_rows<T, 8, Source> : merged_rows<T, 1, Source>;
  launch(device, "merge", kernel, dim3(rows.count(), divide_up(width, chunk)), threads, threads / kWarp * sizeof(float), rows, y,
         contribution, forecast, output, width, chunk);
}

}  // namespace ir::cuda
