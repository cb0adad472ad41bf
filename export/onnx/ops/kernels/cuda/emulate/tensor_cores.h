// What mma.cuh wraps, by the layouts that the PTX manual documents.
#pragma once

#include "cuda_on_host.h"

namespace emulate {

struct Loading {
  const uint16_t* row;
  uint32_t* result;
};

// ldmatrix.x4: lane 8 m + r gives row r of matrix m; a lane gets two neighbours of row lane / 4, or of column lane / 4.
inline void load_matrices(uint32_t (&result)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::abort();
  Loading mine{static_cast<const uint16_t*>(row), result};
  block().together(transposed ? "ldmatrix.trans" : "ldmatrix", &mine, [transposed](void** lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m) {
        uint32_t pair = 0;
        for (int i = 0; i < 2; ++i) {
          const int along = 2 * (lane % 4) + i, across = lane / 4;
          const int row = transposed ? along : across, column = transposed ? across : along;
          pair |= uint32_t{static_cast<Loading*>(lanes[8 * m + row])->row[column]} << 16 * i;
        }
        static_cast<Loading*>(lanes[lane])->result[m] = pair;
      }
  });
}

struct Multiplying {
  float* c;
  const uint32_t *a, *b;
};

// mma.m16n8k16: c[16, 8] += a[16, 16] b[16, 8]. to_float reads a number of 16 bits.
template <typename ToFloat>
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], ToFloat&& to_float) {
  Multiplying mine{c, a, b};
  block().together("mma", &mine, [&](void** lanes) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const auto& from = *static_cast<Multiplying*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 8; ++i)  // registers 0 and 1 are rows g and g + 8 of columns 0 to 7, 2 and 3 of columns 8 to 15
        left[g + 8 * (i / 2 % 2)][2 * t + i % 2 + 8 * (i / 4)] = to_float(static_cast<uint16_t>(from.a[i / 2] >> 16 * (i % 2)));
      for (int i = 0; i < 4; ++i)
        right[2 * t + i % 2 + 8 * (i / 2)][g] = to_float(static_cast<uint16_t>(from.b[i / 2] >> 16 * (i % 2)));
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        static_cast<Multiplying*>(lanes[lane])->c[i] += sum;
      }
  });
}

}  // namespace emulate
