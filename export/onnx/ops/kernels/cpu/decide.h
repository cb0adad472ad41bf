// score = out(silu(hidden(h))), execute = score > threshold;  forecast = up(silu(down(h))) of tokens that do not execute
#pragma once

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
template <typename T, typename W, typename B>
inline float* bent(const B* blocks, int64_t rows, const Weight<W>& weight, const T* bias, int64_t panel) {
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

// The decisions of rows, in the blocks that hold them. Which rows go together does not depend on the number of threads.
template <typename T, typename F, typename R, typename B>
inline void judge(const Decide<T, F, R>& unit, const B* blocks, int64_t first, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) unit.score[first + r] = *unit.out_bias;
  for (int64_t panel = 0; panel < panels(unit.router); ++panel) {
    const float* code = bent(blocks, rows, unit.router, unit.hidden_bias, panel);
    const int64_t column = panel * kColumns, columns = least<int64_t>(kColumns, unit.hidden - column);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t n = 0; n < columns; ++n) unit.score[first + r] += code[r * kColumns + n] * unit.out_weight[column + n];
  }
  for (int64_t i = first; i < first + rows; ++i) unit.execute[i] = unit.score[i] > unit.threshold[i];
}

// The forecasts of these tokens, whose rows of h are in the blocks.
template <typename T, typename F, typename R, typename B>
inline void forecast_rows(const Decide<T, F, R>& unit, const B* blocks, Rows rows, const Threads& threads) {
  float* hidden = scratch(Use::kHidden, kGroup * unit.rank);
  each_panel(unit.down, rows.count, threads, [&](int64_t panel) {
    const float* code = bent(blocks, rows.count, unit.down, unit.down_bias, panel);
    const int64_t column = panel * kColumns;
    collect<F>(code, rows.count, column, least<int64_t>(kColumns, unit.rank - column), unit.rank, hidden);
  });
  const auto* codes = collected<F>(hidden, rows.count, unit.rank, threads);
  each_panel(unit.up, rows.count, threads, [&](int64_t panel) {
    float* product = scratch(Use::kFirst, kChunk * kColumns);
    multiply(codes, rows.count, unit.up, panel, product);
    const int64_t column = panel * kColumns, columns = least<int64_t>(kColumns, unit.width - column);
    for (int64_t r = 0; r < rows.count; ++r) {
      add_row(unit.up_bias + column, columns, product + r * kColumns);
      narrow(product + r * kColumns, columns, unit.forecast + rows.tokens[r] * unit.width + column);
    }
  });
}

// Tokens `first` on. One that executes is forecast as 0: nobody reads it.
template <typename T, typename F, typename R>
inline void decide_rows(const Decide<T, F, R>& unit, int64_t first, int64_t count, const Threads& threads) {
  const auto row = [&](int64_t token) { return unit.h + token * unit.width; };
  const auto* blocks = gather<R>(count, unit.width, [&](int64_t r) { return row(first + r); }, threads);
  const int64_t at_once = unit.tokens <= kGroup ? Blocks<R>::kTogether : kGroup;  // in groups, tasks are handed out already
  const bool small = count * unit.width * unit.hidden < kTaskWork;
  (small ? alone() : threads).each((count + at_once - 1) / at_once, [&](int64_t task) {
    const int64_t done = task * at_once;
    judge(unit, blocks + done * Blocks<R>::row_size(unit.width), first + done, least(at_once, count - done));
  });
  auto* tokens = scratch<int64_t>(Use::kExecuted, kGroup);
  Rows rest{tokens, 0};
  for (int64_t i = first; i < first + count; ++i) {
    T* forecast = unit.forecast + i * unit.width;
    if (!unit.execute[i]) tokens[rest.count++] = i;
    if (unit.execute[i]) std::memset(static_cast<void*>(forecast), 0, static_cast<size_t>(unit.width) * sizeof(T));
    else if (unit.rank == 0) std::memcpy(forecast, unit.up_bias, static_cast<size_t>(unit.width) * sizeof(T));
  }
  if (unit.rank == 0 || rest.count == 0) return;
  if (rest.count < count) blocks = gather<R>(rest.count, unit.width, [&](int64_t r) { return row(rest.tokens[r]); }, threads);
  forecast_rows(unit, blocks, rest, threads);
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
