// Products by weights in int4, of activations rounded to int8, a block of inputs at a time: as MatMulNBits does it at accuracy
// level 4.
//
//     y[o] = sum over blocks b of a[b] s[o, b] (sum over i of x[i] q[o, i]  -  z[o, b] sum over i of x[i]),   h[i] ~ a[b] x[i]
//
// A panel holds, for each block of kBlock inputs, s for every column, -s z too if the weight has zero points (or else they are
// all kZero), and then words of eight inputs' q, one word for every column: in their low halves the bytes of the first four
// inputs, in their high halves those of the others. Coded rows are interleaved in blocks of kCoded rows; for each block of
// inputs there are a, the sum of x, and words of four x of every row.
#pragma once

#include "product.h"

namespace ir::cpu::IR_LEVEL {

inline constexpr int64_t kBlock = 32, kInWord = 8, kWords = kBlock / kInWord;
inline constexpr int32_t kZero = 8;
inline constexpr int64_t kCodedBlock = 2 + kBlock / 4;  // words of one row
inline constexpr float kLargest = 127.0F;
inline constexpr int kCoded = 4;
inline constexpr int64_t kCodedAhead = 8192;  // of fetch: its stream is the narrower one, and gains from looking further

// Adds up products of q, 0 .. 15, and x, -127 .. 127, of four inputs in each lane.
#if defined(__AVX512VNNI__)
using Sums = Integers;
inline void add_products(Integers q, Integers x, Sums& sums) {
  sums = reinterpret_cast<Integers>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(q),
                                                        reinterpret_cast<__m512i>(x)));
}
inline Integers whole(Sums sums) { return sums; }
#elif defined(__AVX2__)
// Of a block, half a lane adds up 16 products: at most 16 * 15 * 127 = 30480.
typedef int16_t Sums __attribute__((vector_size(kLanes * 4)));
#if defined(__AVX512BW__)
inline void add_products(Integers q, Integers x, Sums& sums) {
  sums += reinterpret_cast<Sums>(_mm512_maddubs_epi16(reinterpret_cast<__m512i>(q), reinterpret_cast<__m512i>(x)));
}
inline Integers whole(Sums sums) {
  return reinterpret_cast<Integers>(_mm512_madd_epi16(reinterpret_cast<__m512i>(sums), _mm512_set1_epi16(1)));
}
#else
inline void add_products(Integers q, Integers x, Sums& sums) {
  sums += reinterpret_cast<Sums>(_mm256_maddubs_epi16(reinterpret_cast<__m256i>(q), reinterpret_cast<__m256i>(x)));
}
inline Integers whole(Sums sums) {
  return reinterpret_cast<Integers>(_mm256_madd_epi16(reinterpret_cast<__m256i>(sums), _mm256_set1_epi16(1)));
}
#endif
#else
using Sums = Integers;
inline void add_products(Integers q, Integers x, Sums& sums) {
  for (int bit = 0; bit < 32; bit += 8) sums += ((q >> bit) & 15) * ((x << (24 - bit)) >> 24);
}
inline Integers whole(Sums sums) { return sums; }
#endif

inline Integers all_of(int32_t x) { return x - Integers{}; }

// A panel holds words, and floats among them.
template <typename V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline int64_t int4_blocks(int64_t in) { return (in + kBlock - 1) / kBlock; }
inline int64_t panel_block(bool zeros) { return (kWords + (zeros ? 2 : 1)) * kColumns; }

inline size_t packed_int4_size(int64_t in, int64_t out, bool zeros) {
  return static_cast<size_t>(int4_blocks(in) * (up_to(out, kColumns) / kColumns) * panel_block(zeros));
}

// Eight inputs' q, the first in the lowest bits, in the order of a panel's words.
inline uint32_t shuffled(uint32_t q) {
  const auto bytes = [](uint32_t x) {
    x = (x | x << 8) & 0x00ff00ffU;
    return (x | x << 4) & 0x0f0f0f0fU;
  };
  return bytes(q & 0xffffU) | bytes(q >> 16) << 4;
}

// From MatMulNBits' layout: weight [out, blocks, 16], two inputs a byte, the earlier in the low half; scales, and zeros if not
// null, [out, blocks].
inline void pack_int4(const uint8_t* weight, const float* scales, const float* zeros, int64_t in, int64_t out, uint32_t* packed) {
  const int64_t blocks = int4_blocks(in);
  for (int64_t column = 0; column < out; column += kColumns) {
    for (int64_t block = 0; block < blocks; ++block, packed += panel_block(zeros != nullptr)) {
      std::memset(packed, 0, static_cast<size_t>(panel_block(zeros != nullptr)) * sizeof *packed);
      for (int64_t n = 0; n < least<int64_t>(kColumns, out - column); ++n) {
        const int64_t place = (column + n) * blocks + block;
        uint32_t* to = packed + n;
        std::memcpy(to, scales + place, sizeof *to);
        if (zeros != nullptr) {
          const float offset = -scales[place] * zeros[place];
          std::memcpy(to += kColumns, &offset, sizeof *to);
        }
        for (int64_t word = 0; word < kWords; ++word)
          *(to += kColumns) = shuffled(load_as<uint32_t>(weight + place * kBlock / 2 + word * 4));
      }
    }
  }
}

// Rounds a row to its place in a block of `rows`; past its width it is 0.
inline void code_row(const float* h, int64_t width, int64_t row, int64_t rows, int32_t* coded) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  const Vector magic = all(kRounding);
  for (int64_t first = 0; first < width; first += kBlock, h += kBlock, coded += kCodedBlock * rows) {
    float rest[kBlock];
    const float* inputs = h;
    if (width - first < kBlock) {
      std::memset(rest, 0, sizeof rest);
      std::memcpy(rest, h, static_cast<size_t>(width - first) * sizeof *h);
      inputs = rest;
    }
    Vector highest{}, nothing{};  // 0, or not a number where an input is not finite
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      highest = larger(highest, larger(load(inputs + i), -load(inputs + i)));
      nothing += load(inputs + i) * Vector{};
    }
    const float peak = most(0.0F, largest(highest));
    const float scale = peak / kLargest + sum(nothing);
    const Vector factor = all(peak > 1e-30F ? kLargest / peak : 0.0F);
    int8_t bytes[kBlock];
    Integers sums{};
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const Vector shifted = load(inputs + i) * factor + magic;
      const Integers x = load_as<Integers>(&shifted) - load_as<Integers>(&magic);
      const Bytes low = __builtin_convertvector(x, Bytes);
      std::memcpy(bytes + i, &low, sizeof low);
      sums += x;
    }
    int32_t sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
    std::memcpy(coded + row, &scale, sizeof scale);
    coded[rows + row] = sum;
    for (int64_t word = 0; word < kBlock / 4; ++word)
      std::memcpy(coded + (2 + word) * rows + row, bytes + word * 4, sizeof *coded);
  }
}

// R coded rows times a panel -> product [R, kColumns]
template <int R, bool kZeros>
inline void coded_tile(const int32_t* coded, const uint32_t* panel, int64_t blocks, float* product) {
  Vector sums[R][2] = {};
  for (int64_t block = 0; block < blocks; ++block, coded += kCodedBlock * R) {
    const uint32_t* words = panel + block * panel_block(kZeros);
    fetch<(kWords + 1) * kColumns * 4>(words, kCodedAhead);
    const Vector scales[2] = {load_as<Vector>(words), load_as<Vector>(words + kLanes)};
    Vector offsets[2] = {};
    words += kColumns;
    if (kZeros) {
      for (int n = 0; n < 2; ++n) offsets[n] = load_as<Vector>(words + n * kLanes);
      words += kColumns;
    }
    Sums parts[R][2] = {};
#pragma GCC unroll 4
    for (int word = 0; word < kWords; ++word, words += kColumns) {
      const int32_t* x = coded + (2 + 2 * word) * R;
      const Integers columns[2] = {load_as<Integers>(words), load_as<Integers>(words + kLanes)};
      for (int half = 0; half < 2; ++half, x += R) {
        const Integers q[2] = {(columns[0] >> (4 * half)) & 0x0f0f0f0f, (columns[1] >> (4 * half)) & 0x0f0f0f0f};
        for (int r = 0; r < R; ++r)
          for (int n = 0; n < 2; ++n) add_products(q[n], all_of(x[r]), parts[r][n]);
      }
    }
    for (int r = 0; r < R; ++r) {
      const float scale = load_as<float>(coded + r);
      const int32_t sum = coded[R + r];
      for (int n = 0; n < 2; ++n) {
        Integers dots = whole(parts[r][n]);
        if (kZeros) sums[r][n] += offsets[n] * all(scale * static_cast<float>(sum));
        else dots -= all_of(kZero * sum);
        sums[r][n] += __builtin_convertvector(dots, Vector) * (scales[n] * all(scale));
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < 2; ++n) store(product + r * kColumns + n * kLanes, sums[r][n]);
}

using CodedTile = void (*)(const int32_t*, const uint32_t*, int64_t, float*);

template <bool kZeros, int R = kCoded>
inline CodedTile coded_tile_of(int64_t rows) {
  if constexpr (R == 1) {
    return coded_tile<1, kZeros>;
  } else {
    return rows == R ? coded_tile<R, kZeros> : coded_tile_of<kZeros, R - 1>(rows);
  }
}

// One panel of coded rows times weight: product [rows, kColumns]. Columns past the weight's last are 0.
inline void multiply(const int32_t* coded, int64_t rows, const Weight<Int4>& weight, int64_t panel, float* product) {
  const int64_t blocks = int4_blocks(weight.in);
  const uint32_t* packed = weight.packed + panel * blocks * panel_block(weight.zeros);
  for (int64_t row = 0; row < rows; row += kCoded) {
    const int64_t count = least<int64_t>(kCoded, rows - row);
    const CodedTile tile = weight.zeros ? coded_tile_of<true>(count) : coded_tile_of<false>(count);
    tile(coded + row * blocks * kCodedBlock, packed, blocks, product + row * kColumns);
  }
}

}  // namespace ir::cpu::IR_LEVEL
