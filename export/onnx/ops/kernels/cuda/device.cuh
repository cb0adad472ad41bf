// What a launcher is given of the device, and how kernels are launched. Compiled without nvcc, all of this runs on the host.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <tuple>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emulate/cuda_on_host.h"
#endif

namespace ir::cuda {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where a unit's buffers come from. They are the caller's to free, once what was put on the stream is done or in its order.
struct Scratch {
  virtual ~Scratch() = default;
  virtual void allocate(size_t count, const size_t* bytes, void** buffers) = 0;
};

struct Device {
  cudaStream_t stream;
  int multiprocessors;
  Scratch& scratch;
};

// All buffers of one step at once: auto [sums, flags] = allocate<float, bool>(device, 12, 3).
template <typename... T, typename... Count>
std::tuple<T*...> allocate(const Device& device, Count... counts) {
  const size_t bytes[] = {sizeof(T) * static_cast<size_t>(counts)...};
  void* buffers[sizeof...(T)] = {};
  device.scratch.allocate(sizeof...(T), bytes, buffers);
  std::tuple<T*...> typed;
  void** next = buffers;
  std::apply([&](T*&... buffer) { ((buffer = static_cast<T*>(*next++)), ...); }, typed);
  return typed;
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets the error, which the next call would take for its own
  throw Failure(std::string(what) + " failed: " + cudaGetErrorString(error));
}

// Whether a CUDA graph is captured: what is put on the stream runs later then, and as often as the graph is replayed.
inline bool capturing(const Device& device) {
  cudaStreamCaptureStatus status = {};
  check(cudaStreamIsCapturing(device.stream, &status), "asking for a capture");
  return status != cudaStreamCaptureStatusNone;
}

// Lets a kernel's blocks have all shared memory that the device has: as much for every call, for calls may meet here.
inline void allow_shared(const void* kernel, size_t shared, const char* name) {
  int device = 0, most = 0;
  check(cudaGetDevice(&device), name);
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
  if (shared > static_cast<size_t>(most))
    throw Failure(std::string(name) + " needs " + std::to_string(shared) + " bytes of shared memory a block, of which the GPU has " +
                  std::to_string(most));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
}

// A block's dynamic shared memory: the only kind that is used, for its size is then told at the launch.
template <typename T>
__device__ T* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ uint4 memory[];
  return reinterpret_cast<T*>(memory);
#else
  return static_cast<T*>(emulate::shared);
#endif
}

// Runs a kernel on the grid, in blocks of as many threads, each with shared memory of as many bytes.
template <typename... Parameters, typename... Arguments>
void launch(const Device& device, const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared,
            Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  // More than this has to be asked for.
  if (shared > 48 << 10) allow_shared(reinterpret_cast<const void*>(kernel), shared, name);
#ifdef __CUDACC__
  kernel<<<grid, threads, shared, device.stream>>>(Parameters(arguments)...);
  check(cudaGetLastError(), name);
#else
  (void)device;
  emulate::launch(grid, threads, shared, [&] { kernel(Parameters(arguments)...); });
#endif
}

constexpr int divide_up(int x, int by) { return (x + by - 1) / by; }

}  // namespace ir::cuda
