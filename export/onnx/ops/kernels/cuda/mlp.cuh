// output = contribution(down(activation(gate(h)) * up(h))) where execute, forecast elsewhere.
#pragma once

#include "activation.cuh"
#include "blas.cuh"
#include "count.cuh"
#include "merge.cuh"
#include "skinny.cuh"

namespace ir::cuda {

// h, forecast, output [batch, sequence, width]; weights [in, out]. Null: biases and norms that are not there, and in a plain
// unit forecast and execute.
template <typename T>
struct Mlp {
  int batch, sequence, width, hidden;
  const T *h, *forecast;
  const bool* execute;
  const T *gate_weight, *up_weight, *down_weight, *gate_bias, *up_bias, *down_bias;
  Activation activation;
  Contribution<T> contribution;
  T* output;
};

// The host learns nothing of what executes: it launches the same kernels every time, whose blocks return at once where they
// have nothing to do.
template <typename T>
void mlp_of_few(const Device& device, const Mlp<T>& m) {
  const Rows rows{m.batch, m.sequence, m.execute, nullptr, nullptr, nullptr};
  const Projections<T> up{{{m.gate_weight, m.hidden, false}, {m.up_weight, m.hidden, false}}, 2};
  const Projections<T> down{{{m.down_weight, m.width, false}}, 1};
  const Slices up_slices(device, up.tiles(), m.width), down_slices(device, down.tiles(), m.hidden);
  auto [up_parts, hidden, down_parts] = allocate<float, T, float>(
      device, size_t(up_slices.count) * rows.count() * 2 * m.hidden, rows.count() * m.hidden, down_slices.count * rows.count() * m.width);

  multiply_skinny(device, "gate and up", up, rows, m.h, m.width, up_slices, up_parts);
  const Parts gate{up_parts, up_slices.count, rows.count(), 2 * m.hidden, 0};
  Parts other = gate;
  other.first = m.hidden;
  activate(device, rows, rows.count(), Biased{gate, m.gate_bias}, Biased{other, m.up_bias}, m.activation, hidden, m.hidden);
  multiply_skinny(device, "down", down, rows, hidden, m.hidden, down_slices, down_parts);
  const Parts y{down_parts, down_slices.count, rows.count(), m.width, 0};
  merge(device, rows, Biased{y, m.down_bias}, m.contribution, m.forecast, m.output, m.width);
}

// Only the executed tokens' rows enter the products, so the host has to know how many they are.
template <typename T>
void mlp_of_many(const Device& device, const Mlp<T>& m) {
  const Rows rows = compact(device, m.batch, m.sequence, m.execute);
  const int count = Count(device, rows).wait();
  const size_t wide = size_t(count) * m.hidden, narrow = size_t(count) * m.width;
  auto [gate, up, gathered] = allocate<T, T, T>(device, wide, wide, narrow);

  const T* x = m.h;
  if (count < rows.count()) {
    gather(device, rows, count, m.h, gathered, m.width);
    x = gathered;
  }
  multiply(device, x, count, m.width, m.gate_weight, m.hidden, gate);
  multiply(device, x, count, m.width, m.up_weight, m.hidden, up);
  const Rows compacted{1, count, nullptr, nullptr, nullptr, nullptr};
  activate(device, compacted, count, Biased{Stored<T>{gate, m.hidden}, m.gate_bias}, Biased{Stored<T>{up, m.hidden}, m.up_bias},
           m.activation, gate, m.hidden);
  T* y = gathered;  // read no more
  multiply(device, gate, count, m.hidden, m.down_weight, m.width, y);
  merge(device, rows, Biased{Stored<T>{y, m.width}, m.down_bias}, m.contribution, m.forecast, m.output, m.width);
}

template <typename T>
void mlp(const Device& device, const Mlp<T>& m) {
  const int tokens = m.batch * m.sequence;
  if (tokens == 0) return;
  tokens <= kFew ? mlp_of_few(device, m) : mlp_of_many(device, m);
}

}  // namespace ir::cuda
