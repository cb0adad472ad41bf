// forecast = up(silu(down(h)));  score = out(silu(hidden(h))), execute = score > threshold
#pragma once

#include "int4.h"
#include "rows.h"

namespace ir::cpu::IR_LEVEL {

// So many multiplications are worth a task of their own: at one token a step, handing out tasks costs more than the work.
inline constexpr int64_t kTaskWork = 1 << 16;

// So many tokens go through all of it at once: they, and a weight's panel, stay in the second cache.
inline constexpr int64_t kGroup = 48;

// Runs tasks one after the other, where they are not worth handing out or are part of one already.
inline Threads alone() {
  return {nullptr, [](void*, size_t count, void (*task)(void*, size_t), void* data) {
            for (size_t i = 0; i < count; ++i) task(data, i);
          }};
}

// Calls f(panel) for all panels of a weight, several to a task where they are small.
template <typename W, typename F>
inline void each_panel(const Weight<W>& weight, int64_t rows, const Threads& threads, const F& f) {
  const int64_t count = panels(weight), at_once = most<int64_t>(1, kTaskWork / most<int64_t>(1, rows * weight.in * kColumns));
  threads.each((count + at_once - 1) / at_once, [&](int64_t task) {
    for (int64_t panel = task * at_once; panel < least(count, (task + 1) * at_once); ++panel) f(panel);
  });
}

// A panel of silu(blocks times weight + bias), [rows, kColumns]; zero past the weight's last column.
template <typename T, typename W>
inline float* bent(const float* blocks, int64_t rows, const Weight<W>& weight, const T* bias, int64_t panel) {
  float* code = scratch(Use::kFirst, kChunk * kColumns);
  multiply(blocks, rows, weight, panel, code);
  const int64_t column = panel * kColumns, columns = least<int64_t>(kColumns, weight.out - column);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = code + r * kColumns;
    add_row(bias + column, columns, row);
    for (int n = 0; n < kColumns; n += kLanes) store(row + n, silu(load(row + n)));
  }
  return code;
}

// The decisions of a chunk. One task does it all, in order: sums do not depend on the number of threads.
template <typename T, typename F, typename R>
inline void judge(const Decide<T, F, R>& unit, const float* blocks, int64_t first, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) unit.score[first + r] = *unit.out_bias;
  for (int64_t panel = 0; panel < panels(unit.router); ++panel) {
    const float* code = bent(blocks, rows, unit.router, unit.hidden_bias, panel);
    const int64_t column = panel * kColumns, columns = least<int64_t>(kColumns, unit.hidden - column);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t n = 0; n < columns; ++n) unit.score[first + r] += code[r * kColumns + n] * unit.out_weight[column + n];
  }
  for (int64_t i = first; i < first + rows; ++i) unit.execute[i] = unit.score[i] > unit.threshold[i];
}

// Tokens `first` on.
template <typename T, typename F, typename R>
inline void decide_rows(const Decide<T, F, R>& unit, int64_t first, int64_t count, const Threads& threads) {
  const float* blocks = gather(count, unit.width, [&](int64_t r) { return unit.h + (first + r) * unit.width; }, threads);
  float* codes = scratch(Use::kHidden, kGroup * most<int64_t>(1, unit.rank));
  const auto task = [&](int64_t i) {
    if (i == 0) return judge(unit, blocks, first, count);
    const int64_t panel = i - 1, column = panel * kColumns;
    const float* code = bent(blocks, count, unit.down, unit.down_bias, panel);
    to_blocks(code, count, column, least<int64_t>(kColumns, unit.rank - column), unit.rank, codes);
  };
  const int64_t tasks = 1 + (unit.rank > 0 ? panels(unit.down) : 0);
  const bool small = count * unit.width * (unit.rank + unit.hidden) < kTaskWork;
  (small ? alone() : threads).each(tasks, task);
  if (unit.rank == 0) {
    for (int64_t r = 0; r < count; ++r)
      std::memcpy(unit.forecast + (first + r) * unit.width, unit.up_bias, static_cast<size_t>(unit.width) * sizeof(T));
    return;
  }
  each_panel(unit.up, count, threads, [&](int64_t panel) {
    float* product = scratch(Use::kFirst, kChunk * kColumns);
    multiply(codes, count, unit.up, panel, product);
    const int64_t column = panel * kColumns, columns = least<int64_t>(kColumns, unit.width - column);
    for (int64_t r = 0; r < count; ++r) {
      add_row(unit.up_bias + column, columns, product + r * kColumns);
      narrow(product + r * kColumns, columns, unit.forecast + (first + r) * unit.width + column);
    }
  });
}

// Threads share the weights' columns where tokens are few, the tokens where they are many.
template <typename T, typename F = T, typename R = float>
inline void decide(const Decide<T, F, R>& unit, const Threads& threads) {
  if (unit.tokens <= kGroup) return decide_rows(unit, 0, unit.tokens, threads);
  threads.each((unit.tokens + kGroup - 1) / kGroup, [&](int64_t group) {
    decide_rows(unit, group * kGroup, least(kGroup, unit.tokens - group * kGroup), alone());
  });
}

}  // namespace ir::cpu::IR_LEVEL
