// The cache of a call: what it takes over from the last, and in a strict one, whom it holds.
#pragma once

#include "numbers.cuh"

namespace ir::cuda {

// Copies [rows, from, width] into [rows, to, width]; nothing, where both are one buffer.
template <typename T>
void copy_past(const Device& device, const T* past, T* present, int rows, int from, int to, int width) {
  if (past == present || from == 0 || rows == 0) return;
  const size_t slot = width * sizeof(T), copied = slot * min(from, to);
  check(cudaMemcpy2DAsync(present, slot * to, past, slot * from, copied, rows, cudaMemcpyDeviceToDevice, device.stream),
        "copying the cache");
}

// kept[b, slot]: whether a key of the slot is not zero, in any head. A warp looks at a slot 16 bytes a lane at a time, and most
// often need not look twice.
template <typename T>
__global__ void find_kept(const T* key, int kv_heads, int slots, int head_dim, int total, bool* kept) {
  constexpr int kWidth = 16 / sizeof(T);
  const int b = blockIdx.y, slot = blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (slot >= total) return;
  const int packs = head_dim / kWidth;
  bool found = false;
  for (int begin = 0; begin < kv_heads * packs && !found; begin += kWarp) {
    const int i = begin + lane;
    bool mine = false;
    if (i < kv_heads * packs) {
      float values[kWidth];
      load(values, key + ((static_cast<size_t>(b) * kv_heads + i / packs) * slots + slot) * head_dim + i % packs * kWidth);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) mine = mine || values[j] != 0;
    }
    found = __any_sync(kAllLanes, mine);
  }
  if (lane == 0) kept[static_cast<size_t>(b) * total + slot] = found;
}

}  // namespace ir::cuda
