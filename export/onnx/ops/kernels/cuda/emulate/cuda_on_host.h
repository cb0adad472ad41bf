// Enough of CUDA to compile the kernels with a C++ compiler and to run them without a GPU, slowly, so that they can be tested
// and sanitized anywhere. Blocks run one after the other; a block's threads are fibers, which run until they wait for each
// other. What a race would show depends on their order, so it can be changed. Shared memory starts as NaN in every block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "fibers.h"
#include "numbers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

namespace emulate {

inline dim3 block_index, block_size, grid_size;
inline void* shared = nullptr;
inline bool capturing = false;  // as if a CUDA graph were captured; all is done at once nevertheless

inline dim3 thread_index() {
  const unsigned i = block().current->index;
  return {i % block_size.x, i / block_size.x};
}

template <typename Body>
void launch(dim3 grid, dim3 size, size_t bytes, Body&& body) {
  if (grid.y > 65535 || grid.z > 65535) Block::fail("y and z of a grid are at most 65535");
  grid_size = grid, block_size = size;
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned b = block().order == Order::kReversed ? blocks - 1 - i : i;
    block_index = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    shared = std::aligned_alloc(16, (bytes + 16) / 16 * 16);
    std::memset(shared, 0xFF, bytes);
    block().run(size.x * size.y, body);
    std::free(shared);
  }
}

template <typename T>
struct Exchange {
  T value;
  unsigned argument;
  T result;
};

// What every lane of a warp gives, and which lane's each of them gets.
template <typename T, typename Source>
T shuffle(const char* name, T value, unsigned argument, Source&& source) {
  Exchange<T> mine{value, argument, value};
  block().together(name, &mine, [&](void** lanes) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      auto& to = *static_cast<Exchange<T>*>(lanes[lane]);
      to.result = static_cast<Exchange<T>*>(lanes[source(lane, to.argument)])->value;
    }
  });
  return mine.result;
}

}  // namespace emulate

#define threadIdx (emulate::thread_index())
#define blockIdx (emulate::block_index)
#define blockDim (emulate::block_size)
#define gridDim (emulate::grid_size)

inline void __syncthreads() { emulate::block().synchronize(); }
inline void __syncwarp() {
  emulate::block().together("__syncwarp", nullptr, [](void**) {});
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, unsigned with) {
  return emulate::shuffle("__shfl_xor_sync", value, with, [](unsigned lane, unsigned with) { return lane ^ with; });
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned by) {
  return emulate::shuffle("__shfl_up_sync", value, by, [](unsigned lane, unsigned by) { return lane < by ? lane : lane - by; });
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  emulate::Exchange<unsigned> mine{vote, 0, 0};
  emulate::block().together("__ballot_sync", &mine, [](void** lanes) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) votes |= static_cast<emulate::Exchange<unsigned>*>(lanes[lane])->value << lane;
    for (unsigned lane = 0; lane < 32; ++lane) static_cast<emulate::Exchange<unsigned>*>(lanes[lane])->result = votes;
  });
  return mine.result;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
}

// The runtime: one stream, on which all is done when a call returns.
using cudaStream_t = void*;
using cudaEvent_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorStreamCaptureUnsupported };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice, cudaMemcpyDeviceToHost };
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "not while capturing"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
enum { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  constexpr int kShared = 99 << 10;  // what every GPU has, from compute capability 8.0 on
  return *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? kShared : 7, cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                                     size_t height, cudaMemcpyKind, cudaStream_t) {
  for (size_t i = 0; i < height; ++i)
    std::memcpy(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch, width);
  return cudaSuccess;
}
inline cudaError_t cudaMallocHost(void** to, size_t bytes) {
  *to = std::malloc(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
enum cudaEventFlag { cudaEventDisableTiming };
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t*, cudaEventFlag) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) {
  return emulate::capturing ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulate::capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// What the bindings ask of the runtime, for memory of the units.
using cudaMemPool_t = void*;
enum { cudaMemAllocationTypePinned, cudaMemLocationTypeDevice, cudaMemPoolAttrReleaseThreshold };
struct cudaMemPoolProps {
  int allocType;
  struct {
    int type, id;
  } location;
};
inline cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) { return *pool = pool, cudaSuccess; }
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, int, void*) { return cudaSuccess; }
inline cudaError_t cudaMallocFromPoolAsync(void** to, size_t bytes, cudaMemPool_t, cudaStream_t) {
  *to = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(*to, 0xFF, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t) { return cudaFreeHost(memory); }
