// Rows of tokens: which of them execute, how they enter products, and what follows a unit.
#pragma once

#include "product.h"

namespace ir::cpu::IR_LEVEL {

// So many rows go through a unit at a time: their intermediate results stay in the caches, whatever the text's length.
inline constexpr int64_t kChunk = 384;

// The tokens that execute, in order.
struct Rows {
  const int64_t* tokens;
  int64_t count;
};

inline Rows executed(const bool* execute, int64_t tokens, Use use) {
  auto* list = scratch<int64_t>(use, most<int64_t>(tokens, 1));
  int64_t count = 0;
  for (int64_t i = 0; i < tokens; ++i)
    if (execute == nullptr || execute[i]) list[count++] = i;
  return {list, count};
}

inline const float* wide(const float* row, int64_t, float*) { return row; }
inline const float* wide(const Half* row, int64_t width, float* copy) {
  widen(row, width, copy);
  return copy;
}

// Calls f(first, count) for pieces of at most kChunk rows.
template <typename F>
inline void chunks(int64_t rows, const F& f) {
  for (int64_t first = 0; first < rows; first += kChunk) f(first, least(kChunk, rows - first));
}

// Gathers rows row(0) .. row(count - 1), each of this width, into blocks for products.
template <typename F>
inline const float* gather(int64_t count, int64_t width, const F& row, const Threads& threads) {
  float* blocks = scratch(Use::kRows, count * width);
  threads.each((count + kRows - 1) / kRows, [&](int64_t block) {
    const int64_t first = block * kRows, rows = block_rows(count, first);
    float* copies = scratch(Use::kWide, kRows * width);
    const float* pointers[kRows];
    for (int64_t r = 0; r < rows; ++r) pointers[r] = wide(row(first + r), width, copies + r * width);
    interleave(pointers, rows, width, blocks + first * width);
  });
  return blocks;
}

// A panel [rows, kColumns] becomes columns of blocks for the next product, whose rows are of this width.
inline void to_blocks(const float* panel, int64_t rows, int64_t column, int64_t columns, int64_t width, float* blocks) {
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t count = block_rows(rows, row);
    float* block = blocks + row * width + column * count;
    for (int64_t n = 0; n < columns; ++n)
      for (int64_t r = 0; r < count; ++r) block[n * count + r] = panel[(row + r) * kColumns + n];
  }
}

// blocks times weight -> result[row * step + column]; `panel` of panels(weight).
template <typename T>
inline void multiply_into(const float* blocks, int64_t rows, const Weight<T>& weight, int64_t panel, float* result,
                          int64_t step) {
  float* product = scratch(Use::kFirst, kChunk * kColumns);
  multiply(blocks, rows, weight, panel, product);
  const int64_t column = panel * kColumns, columns = least<int64_t>(kColumns, weight.out - column);
  for (int64_t r = 0; r < rows; ++r) narrow(product + r * kColumns, columns, result + r * step + column);
}

template <typename T>
inline void add_row(const T* row, int64_t width, float* y) {
  if (row == nullptr) return;
  for (int64_t i = 0; i < width; ++i) y[i] += to_float(row[i]);
}

// y = y / sqrt(mean(y^2) + epsilon) * weight
template <typename T>
inline void rms_norm(const T* weight, int64_t width, float epsilon, float* y) {
  if (weight == nullptr) return;
  Vector squares{};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) squares += load(y + i) * load(y + i);
  float total = sum(squares);
  for (; i < width; ++i) total += y[i] * y[i];
  const float factor = 1.0F / __builtin_sqrtf(total / static_cast<float>(width) + epsilon);
  for (i = 0; i < width; ++i) y[i] *= factor * to_float(weight[i]);
}

// Rows `first` on of the unit's last product become the outputs of their tokens.
template <typename T>
inline void contribute(const Contribution<T>& unit, const int64_t* tokens, int64_t count, int64_t width, float* product,
                       const Threads& threads) {
  threads.each(count, [&](int64_t r) {
    float* y = product + r * width;
    add_row(unit.bias, width, y);
    rms_norm(unit.post_norm, width, unit.epsilon, y);
    if (unit.multiplier != 1.0F)
      for (int64_t i = 0; i < width; ++i) y[i] *= unit.multiplier;
    narrow(y, width, unit.output + tokens[r] * width);
  });
}

// The tokens that do not execute: their forecasts are in place already, where the output took over their memory.
template <typename T>
inline void keep_forecasts(const Contribution<T>& unit, const bool* execute, int64_t tokens, int64_t width) {
  if (execute == nullptr || unit.forecast == unit.output) return;
  for (int64_t i = 0; i < tokens; ++i)
    if (!execute[i])
      std::memcpy(unit.output + i * width, unit.forecast + i * width, static_cast<size_t>(width) * sizeof(T));
}

}  // namespace ir::cpu::IR_LEVEL
