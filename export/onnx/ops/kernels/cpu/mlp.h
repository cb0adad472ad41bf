// output = multiplier * post_norm(down(activation(gate(h)) * up(h))) where execute, forecast elsewhere
#pragma once

#include "rows.h"

namespace ir::cpu::IR_LEVEL {

// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), without the cancellation
inline Vector gelu(Vector x) { return x * sigmoid(all(1.59576912F) * (x + all(0.044715F) * x * x * x)); }

// A panel of activation(gate) * up, for the next product.
template <typename T, typename W, typename B>
inline void gated(const Mlp<T, W>& unit, const B* blocks, int64_t rows, int64_t panel, float* hidden) {
  float* gate = scratch(Use::kFirst, kChunk * kColumns);
  float* up = scratch(Use::kSecond, kChunk * kColumns);
  multiply(blocks, rows, unit.gate, panel, gate);
  multiply(blocks, rows, unit.up, panel, up);
  const int64_t column = panel * kColumns, columns = least<int64_t>(kColumns, unit.hidden - column);
  for (int64_t r = 0; r < rows; ++r) {
    float *g = gate + r * kColumns, *u = up + r * kColumns;
    if (unit.gate_bias != nullptr) add_row(unit.gate_bias + column, columns, g);
    if (unit.up_bias != nullptr) add_row(unit.up_bias + column, columns, u);
    for (int n = 0; n < kColumns; n += kLanes) {
      const Vector x = load(g + n);
      store(g + n, (unit.gelu ? gelu(x) : silu(x)) * load(u + n));
    }
  }
  collect<W>(gate, rows, column, columns, unit.hidden, hidden);
}

template <typename T, typename W>
inline void mlp(const Mlp<T, W>& unit, const Threads& threads) {
  keep_forecasts(unit.contribution, unit.execute, unit.tokens, unit.width);
  const Rows rows = executed(unit.execute, unit.tokens, Use::kExecuted);
  chunks(rows.count, [&](int64_t first, int64_t count) {
    const int64_t* tokens = rows.tokens + first;
    const auto h = [&](int64_t r) { return unit.h + tokens[r] * unit.width; };
    const auto* blocks = gather<W>(count, unit.width, h, threads);
    float* hidden = scratch(Use::kHidden, kChunk * unit.hidden);
    threads.each(panels(unit.gate), [&](int64_t panel) { gated(unit, blocks, count, panel, hidden); });
    const auto* ready = collected<W>(hidden, count, unit.hidden, threads);
    float* result = scratch(Use::kResult, kChunk * unit.width);
    threads.each(panels(unit.down), [&](int64_t panel) {
      multiply_into(ready, count, unit.down, panel, result, unit.width);
    });
    contribute(unit.contribution, tokens, count, unit.width, result, threads);
  });
}

}  // namespace ir::cpu::IR_LEVEL
