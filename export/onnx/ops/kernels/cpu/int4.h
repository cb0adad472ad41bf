// Products by weights in int4. A panel holds, for each block of kBlock inputs, a scale for every column, and then words of eight
// inputs' weights, one word for every column: a shift and a mask leave an input's weights in the highest bits of a vector of words.
#pragma once

#include "product.h"

namespace ir::cpu::IR_LEVEL {

inline constexpr int64_t kBlock = 32, kInWord = 8;
inline constexpr float kHighest = 0x1p-28F;  // what a weight's lowest bit is worth there: it goes into the scales
inline constexpr int64_t kBlockWords = (1 + kBlock / kInWord) * kColumns;
static_assert(kDepth % kBlock == 0);

inline int64_t int4_blocks(int64_t in) { return (in + kBlock - 1) / kBlock; }

inline size_t packed_int4_size(int64_t in, int64_t out) {
  return static_cast<size_t>(int4_blocks(in) * (up_to(out, kColumns) / kColumns) * kBlockWords);
}

// From MatMulNBits' layout: weight [out, blocks, 16], two inputs a byte, the earlier in the low half; scales [out, blocks].
inline void pack_int4(const uint8_t* weight, const float* scales, int64_t in, int64_t out, uint32_t* packed) {
  const int64_t blocks = int4_blocks(in);
  for (int64_t column = 0; column < out; column += kColumns) {
    for (int64_t block = 0; block < blocks; ++block, packed += kBlockWords) {
      std::memset(packed, 0, kBlockWords * sizeof *packed);
      for (int64_t n = 0; n < least<int64_t>(kColumns, out - column); ++n) {
        const int64_t place = (column + n) * blocks + block;
        const float scale = scales[place] * kHighest;
        std::memcpy(packed + n, &scale, sizeof scale);
        const uint8_t* bytes = weight + place * kBlock / 2;
        for (int64_t i = 0; i < kBlock / 2; ++i)
          packed[(1 + i / 4) * kColumns + n] |= static_cast<uint32_t>(bytes[i] ^ 0x88U) << (i % 4 * 8);  // q - 8, signed
      }
    }
  }
}

// Of words, the weights of input `place` of their eight, over kHighest.
inline Vector numbers(Integers words, int place) {
  return __builtin_convertvector((words << (28 - 4 * place)) & ~0x0fffffff, Vector);
}

// A panel holds words, and scales among them.
template <typename V>
inline V load_as(const uint32_t* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// One row, or two, times a panel: each weight becomes a number in registers alone. `block` is [in, R].
template <int R>
inline void multiply_few(const float* block, const Weight<Int4>& weight, int64_t panel, float* product) {
  const uint32_t* words = weight.packed + panel * int4_blocks(weight.in) * kBlockWords;
  Vector sums[R][2] = {};
  for (int64_t first = 0; first < weight.in; first += kBlock, words += kBlockWords) {
    const float* h = block + first * R;
    float rest[kBlock * R];
    if (weight.in - first < kBlock) {
      std::memset(rest, 0, sizeof rest);
      std::memcpy(rest, h, static_cast<size_t>((weight.in - first) * R) * sizeof *h);
      h = rest;
    }
    Vector parts[R][2][2] = {};  // two of each, for an addition takes longer than what is between two
    for (int64_t word = 0; word < kBlock / kInWord; ++word, h += kInWord * R) {
      const uint32_t* row = words + (1 + word) * kColumns;
      const Integers columns[2] = {load_as<Integers>(row), load_as<Integers>(row + kLanes)};
#pragma GCC unroll 8
      for (int place = 0; place < kInWord; ++place)
        for (int n = 0; n < 2; ++n) {
          const Vector weights = numbers(columns[n], place);
          for (int r = 0; r < R; ++r) parts[r][n][place % 2] += all(h[place * R + r]) * weights;
        }
    }
    for (int n = 0; n < 2; ++n)
      for (int r = 0; r < R; ++r) sums[r][n] += (parts[r][n][0] + parts[r][n][1]) * load_as<Vector>(words + n * kLanes);
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < 2; ++n) store(product + r * kColumns + n * kLanes, sums[r][n]);
}

// Rows `first` on of a panel as numbers, [depth, kColumns], and more up to a whole block.
inline const float* slab_of(const Weight<Int4>& weight, int64_t panel, int64_t first, int64_t depth) {
  float* slab = scratch(Use::kSlab, kDepth * kColumns);
  const uint32_t* words = weight.packed + (panel * int4_blocks(weight.in) + first / kBlock) * kBlockWords;
  for (int64_t k = 0; k < depth; k += kBlock, words += kBlockWords) {
    for (int64_t word = 0; word < kBlock / kInWord; ++word) {
      for (int n = 0; n < 2; ++n) {
        const Integers columns = load_as<Integers>(words + (1 + word) * kColumns + n * kLanes);
        const Vector scales = load_as<Vector>(words + n * kLanes);
        float* column = slab + (k + word * kInWord) * kColumns + n * kLanes;
#pragma GCC unroll 8
        for (int place = 0; place < kInWord; ++place) store(column + place * kColumns, numbers(columns, place) * scales);
      }
    }
  }
  return slab;
}

// One panel of rows times weight: product [rows, kColumns]. Columns past the weight's last are 0.
inline void multiply(const float* blocks, int64_t rows, const Weight<Int4>& weight, int64_t panel, float* product) {
  if (rows == 1) return multiply_few<1>(blocks, weight, panel, product);
  if (rows == 2) return multiply_few<2>(blocks, weight, panel, product);
  for (int64_t first = 0; first < weight.in; first += kDepth) {
    const int64_t depth = least(kDepth, weight.in - first);
    multiply_slab(blocks, rows, weight.in, slab_of(weight, panel, first, depth), first, depth, product);
  }
}

}  // namespace ir::cpu::IR_LEVEL
