// Matrix products. A weight is read in panels of kColumns columns, each [in, kColumns] in one piece; rows are interleaved in
// blocks of kRows, [in, kRows], so that the innermost loop reads both in order.
#pragma once

#include <type_traits>

#include "simd.h"

namespace ir::cpu::IR_LEVEL {

inline constexpr int kColumns = 2 * kLanes;
// With kRows x 2 vectors of results, 2 of a panel and one of a row, the registers are full.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRows = 12;
#else
inline constexpr int kRows = 6;
#endif
// So many rows of a panel are multiplied at once: they stay in the second cache, those that are made numbers first in the first.
template <typename T>
inline constexpr int64_t kDepth = std::is_same_v<T, float> ? 1024 : 256;

// Asks for kBytes of what a stream will read `ahead` bytes from now. Left to themselves, some processors fetch too few lines early
// where several rows are multiplied at once.
template <int kBytes>
inline void fetch(const void* now, int64_t ahead) {
  constexpr int kLine = 64;
  for (int byte = 0; byte < kBytes; byte += kLine) __builtin_prefetch(static_cast<const char*>(now) + ahead + byte);
}
// How far ahead pays is measured: 2048 bytes on a Xeon; on Zen 1 they cost one row a sixth of its speed, and 896 gain a tenth.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int64_t kAhead = 2048;
#else
inline constexpr int64_t kAhead = 896;
#endif

// c[r][0..N vectors] (+)= sum over k of a[r * a_row + k * a_step] * b[k * b_step + ...]
template <int R, int N>
inline void tile(int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, float* c,
                 int64_t c_step, bool add) {
  Vector sums[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) sums[r][n] = add ? load(c + r * c_step + n * kLanes) : Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector columns[N];
    for (int n = 0; n < N; ++n) columns[n] = load(b + n * kLanes);
    fetch<N * kLanes * 4>(b, kAhead);
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) sums[r][n] += all(a[r * a_row]) * columns[n];
    a += a_step;
    b += b_step;
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) store(c + r * c_step + n * kLanes, sums[r][n]);
}

using Tile = void (*)(int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t, bool);

// The tile of this many rows and vectors.
template <int N, int R = kRows>
inline Tile tile_of(int64_t rows) {
  if constexpr (R == 1) {
    return tile<1, N>;
  } else {
    return rows == R ? tile<R, N> : tile_of<N, R - 1>(rows);
  }
}

// Rows as products read them: blocks of kRows, the last one of fewer, each [width, its rows].
inline int64_t block_rows(int64_t rows, int64_t first) { return least<int64_t>(kRows, rows - first); }

// Interleaves rows[i], i < count of one block, each of this width.
inline void interleave(const float* const* rows, int64_t count, int64_t width, float* block) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t k = 0; k < width; ++k) block[k * count + r] = rows[r][k];
}

template <typename T>
inline int64_t panels(const Weight<T>& weight) {
  return (weight.out + kColumns - 1) / kColumns;
}

inline size_t packed_size(int64_t in, int64_t out) { return static_cast<size_t>(in * up_to(out, kColumns)); }

// Copies rows from `first` on, of columns from `column` on, to [depth, kColumns], filled up with zeros.
template <typename T, typename To>
inline void copy_slab(const T* weight, int64_t out, int64_t first, int64_t depth, int64_t column, To* slab) {
  const int64_t columns = least<int64_t>(kColumns, out - column);
  for (int64_t k = 0; k < depth; ++k, slab += kColumns) {
    const T* row = weight + (first + k) * out + column;
    if constexpr (sizeof(T) == sizeof(To)) {
      std::memcpy(slab, row, static_cast<size_t>(columns) * sizeof(T));
    } else {
      widen(row, columns, slab);
    }
    for (int64_t n = columns; n < kColumns; ++n) slab[n] = To{};
  }
}

template <typename T>
inline void pack(const T* weight, int64_t in, int64_t out, T* packed) {
  for (int64_t column = 0; column < out; column += kColumns, packed += in * kColumns)
    copy_slab(weight, out, 0, in, column, packed);
}

inline const float* numbers_of(const float* packed, int64_t) { return packed; }
inline const float* numbers_of(const Half* packed, int64_t depth) {
  float* slab = scratch(Use::kSlab, kDepth<Half> * kColumns);
  widen(packed, depth * kColumns, slab);
  return slab;
}

// Rows `first` on of a panel as numbers, [depth, kColumns].
template <typename T>
inline const float* slab_of(const Weight<T>& weight, int64_t panel, int64_t first, int64_t depth) {
  if (weight.packed != nullptr) return numbers_of(weight.packed + (panel * weight.in + first) * kColumns, depth);
  float* slab = scratch(Use::kSlab, kDepth<T> * kColumns);
  copy_slab(weight.data, weight.out, first, depth, panel * kColumns, slab);
  return slab;
}

// What inputs `first` on of rows, each of width `in`, add to a panel's product by that slab.
inline void multiply_slab(const float* blocks, int64_t rows, int64_t in, const float* slab, int64_t first, int64_t depth,
                          float* product) {
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t count = block_rows(rows, row);
    const float* block = blocks + row * in + first * count;
    tile_of<2>(count)(depth, block, 1, count, slab, kColumns, product + row * kColumns, kColumns, first > 0);
  }
}

// One panel of rows times weight: product [rows, kColumns]. Columns past the weight's last are 0.
template <typename T>
inline void multiply(const float* blocks, int64_t rows, const Weight<T>& weight, int64_t panel, float* product) {
  for (int64_t first = 0; first < weight.in; first += kDepth<T>) {
    const int64_t depth = least(kDepth<T>, weight.in - first);
    multiply_slab(blocks, rows, weight.in, slab_of(weight, panel, first, depth), first, depth, product);
  }
}

}  // namespace ir::cpu::IR_LEVEL
