// activation(gate) * up
#pragma once

#include "rows.cuh"
#include "sources.cuh"

namespace ir::cuda {

enum class Activation { kSilu, kGeluTanh };

__device__ __forceinline__ float activated(float x, Activation activation) {
  if (activation == Activation::kSilu) return x / (1 + expf(-x));
  constexpr float kRootOfTwoOverPi = 0.7978845608f;
  return 0.5f * x * (1 + tanhf(kRootOfTwoOverPi * (x + 0.044715f * x * x * x)));
}

// A row is of a token where rows has a flag for every one, else any row is computed. to may be gate's own memory.
template <typename T, int kWidth, typename Source>
__global__ void gated_rows(Rows rows, Biased<Source, T> gate, Biased<Source, T> up, Activation activation, T* to, int width) {
  const int row = blockIdx.x, column = (blockIdx.y * blockDim.x + threadIdx.x) * kWidth;
  if (column >= width || !rows.executed(rows.token(row))) return;
  float g[kWidth], u[kWidth];
  gate.read(g, row, column);
  up.read(u, row, column);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) g[i] = activated(g[i], activation) * u[i];
  store(to + static_cast<size_t>(row) * width + column, g);
}

template <typename T, typename Source>
void activate(const Device& device, const Rows& rows, int count, Biased<Source, T> gate, Biased<Source, T> up,
              Activation activation, T* to, int width) {
  constexpr int kThreads = 128;
  const int each = width % 8 == 0 ? 8 : 1;
  const auto kernel = each == 8 ? gated_rows<T, 8, Source> : gated_rows<T, 1, Source>;
  launch(device, "activation", kernel, dim3(count, divide_up(width, kThreads * each)), kThreads, 0, rows, gate, up, activation, to,
         width);
}

}  // namespace ir::cuda
