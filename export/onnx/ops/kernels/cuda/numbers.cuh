// Numbers in memory and in registers, where all of them are fp32; and sums over a warp or a block.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cmath>
#include <cstdint>

#include "device.cuh"

namespace ir::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(BFloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float(float x) { return x; }
template <>
__device__ __forceinline__ Half from_float(float x) { return __float2half(x); }
template <>
__device__ __forceinline__ BFloat16 from_float(float x) { return __float2bfloat16(x); }

// N neighbours, read and written 16 bytes at a time where they are as many.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T values[N];
};

template <int N, typename T>
__device__ __forceinline__ void load(float (&to)[N], const T* from) {
  const auto pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(pack.values[i]);
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.values[i] = from_float<T>(from[i]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// Two numbers of 16 bits in one register.
template <typename T>
__device__ __forceinline__ uint32_t pair(float low, float high) {
  union {
    Pack<T, 2> numbers;
    uint32_t bits;
  } both{{{from_float<T>(low), from_float<T>(high)}}};
  return both.bits;
}

// The sum over groups of as many neighbouring lanes, in each of them.
template <int kLanes = kWarp>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int with = kLanes / 2; with > 0; with /= 2) x += __shfl_xor_sync(kAllLanes, x, with);
  return x;
}

// The sum over a block, in each of its threads; takes a float of shared memory for each warp.
__device__ __forceinline__ float block_sum(float x, float* sums) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = threadIdx.x % kWarp < blockDim.x / kWarp ? sums[threadIdx.x % kWarp] : 0;
  return warp_sum(x);
}

}  // namespace ir::cuda
