// Rows of tokens: which of them execute, how they enter products, and what follows a unit.
#pragma once

#include <type_traits>

#include "int4.h"

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

// What products by weights W read: blocks of kTogether rows, each row of row_size(its width) elements.
template <typename W>
struct Blocks {
  using Element = float;
  static constexpr int64_t kTogether = kRows;
  static int64_t row_size(int64_t width) { return width; }
};
template <>
struct Blocks<Int4> {
  using Element = int32_t;
  static constexpr int64_t kTogether = kCoded;
  static int64_t row_size(int64_t width) { return int4_blocks(width) * kCodedBlock; }
};

inline void fill_block(const float* const* rows, int64_t count, int64_t width, float* block) {
  interleave(rows, count, width, block);
}
inline void fill_block(const float* const* rows, int64_t count, int64_t width, int32_t* block) {
  for (int64_t r = 0; r < count; ++r) code_row(rows[r], width, r, count, block);
}

// Gathers rows row(0) .. row(count - 1), each of this width, into blocks for products by W.
template <typename W, typename F>
inline const typename Blocks<W>::Element* gather(int64_t count, int64_t width, const F& row, const Threads& threads) {
  constexpr int64_t together = Blocks<W>::kTogether;
  const int64_t size = Blocks<W>::row_size(width);
  auto* blocks = scratch<typename Blocks<W>::Element>(Use::kRows, count * size);
  threads.each((count + together - 1) / together, [&](int64_t block) {
    const int64_t first = block * together, rows = least(together, count - first);
    float* copies = scratch(Use::kWide, together * width);
    const float* pointers[together];
    for (int64_t r = 0; r < rows; ++r) pointers[r] = wide(row(first + r), width, copies + r * width);
    fill_block(pointers, rows, width, blocks + first * size);
  });
  return blocks;
}

// A panel [rows, kColumns] becomes columns of `hidden`, the rows of the next product, by W: blocks already, but for int4, whose
// rows are coded as a whole.
template <typename W>
inline void collect(const float* panel, int64_t rows, int64_t column, int64_t columns, int64_t width, float* hidden) {
  constexpr int64_t together = std::is_same_v<W, Int4> ? 1 : kRows;
  for (int64_t row = 0; row < rows; row += together) {
    const int64_t count = least(together, rows - row);
    float* block = hidden + row * width + column * count;
    for (int64_t n = 0; n < columns; ++n)
      for (int64_t r = 0; r < count; ++r) block[n * count + r] = panel[(row + r) * kColumns + n];
  }
}

// Blocks of what was collected; int4's take the place of those that were gathered before.
template <typename W>
inline const typename Blocks<W>::Element* collected(const float* hidden, int64_t rows, int64_t width, const Threads& threads) {
  if constexpr (!std::is_same_v<W, Int4>) return hidden;
  else return gather<W>(rows, width, [&](int64_t r) { return hidden + r * width; }, threads);
}

// blocks times weight -> result[row * step + column]; `panel` of panels(weight).
template <typename B, typename W>
inline void multiply_into(const B* blocks, int64_t rows, const Weight<W>& weight, int64_t panel, float* result, int64_t step) {
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
