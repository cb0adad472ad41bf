// A projection's output as the kernels behind it read it: rows of numbers, or the parts of sums that are still to be added.
#pragma once

#include "numbers.cuh"

namespace ir::cuda {

template <typename T>
struct Stored {
  const T* data;
  int columns;

  template <int N>
  __device__ __forceinline__ void read(float (&to)[N], int row, int column) const {
    load(to, data + static_cast<size_t>(row) * columns + column);
  }
};

// Each of the parts has rows of `stride` numbers, of which a projection's begin at `first`. They are added in their order.
struct Parts {
  const float* data;
  int parts, rows, stride, first;

  template <int N>
  __device__ __forceinline__ void read(float (&to)[N], int row, int column) const {
    const float* from = data + static_cast<size_t>(row) * stride + first + column;
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = 0;
#pragma unroll 4
    for (int part = 0; part < parts; ++part, from += static_cast<size_t>(rows) * stride) {
      float more[N];
      load(more, from);
#pragma unroll
      for (int i = 0; i < N; ++i) to[i] += more[i];
    }
  }
};

// With a bias, where there is one.
template <typename Source, typename T>
struct Biased {
  Source source;
  const T* bias;

  template <int N>
  __device__ __forceinline__ void read(float (&to)[N], int row, int column) const {
    source.read(to, row, column);
    if (bias == nullptr) return;
    float more[N];
    load(more, bias + column);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] += more[i];
  }
};

template <typename Source, typename T>
Biased(Source, const T*) -> Biased<Source, T>;

}  // namespace ir::cuda
