// The units' buffers, allocated and freed in a stream's order: the host never waits for them, calls on several streams cannot
// meet in one, and in a CUDA graph they become nodes of it.
#pragma once

#include <map>
#include <mutex>
#include <vector>

#include "../kernels/cuda/device.cuh"

namespace ir {

class StreamScratch : public cuda::Scratch {
 public:
  explicit StreamScratch(cudaStream_t stream) : stream_(stream) {}
  StreamScratch(const StreamScratch&) = delete;
  ~StreamScratch() override {
    for (void* memory : all_)
      if (cudaFreeAsync(memory, stream_) != cudaSuccess) cudaGetLastError();  // forgets it, as check does
  }

  void allocate(size_t count, const size_t* bytes, void** buffers) override {
    constexpr size_t kAlignment = 256;
    size_t size = kAlignment;  // never none
    for (size_t i = 0; i < count; ++i) size += (bytes[i] + kAlignment - 1) / kAlignment * kAlignment;
    void* memory = nullptr;
    cuda::check(cudaMallocFromPoolAsync(&memory, size, pool(), stream_), "allocating buffers");
    all_.push_back(memory);
    auto* next = static_cast<char*>(memory);
    for (size_t i = 0; i < count; ++i) {
      buffers[i] = next;
      next += (bytes[i] + kAlignment - 1) / kAlignment * kAlignment;
    }
  }

 private:
  // The pool of the current device. It keeps all that it got: it would give back what is over a limit whenever the host waits,
  // which it does for every count of tokens, and asking the driver anew takes long.
  static cudaMemPool_t pool() {
    static std::mutex mutex;
    static std::map<int, cudaMemPool_t> pools;
    int device = 0;
    cuda::check(cudaGetDevice(&device), "allocating buffers");
    const std::lock_guard lock(mutex);
    cudaMemPool_t& pool = pools[device];
    if (pool == nullptr) {
      cudaMemPoolProps properties = {};
      properties.allocType = cudaMemAllocationTypePinned;
      properties.location = {cudaMemLocationTypeDevice, device};
      cuda::check(cudaMemPoolCreate(&pool, &properties), "making a memory pool");
      uint64_t kept = UINT64_MAX;
      cuda::check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept), "making a memory pool");
    }
    return pool;
  }

  cudaStream_t stream_;
  std::vector<void*> all_;
};

}  // namespace ir
