// How many tokens execute: the one thing that the host asks the device, and only where it calls cuBLAS;
// never for a CUDA graph, in which all tokens have rows.
#pragma once

#include <memory>

#include "rows.cuh"

namespace ir::cuda {

// What is put on the stream between the making of a Count and wait() is done while the host waits.
class Count {
 public:
  Count(const Device& device, const Rows& rows) : all_(rows.count()) {
    if (rows.first == nullptr) return;
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), kWhat);
    arrived_.reset(event);
    check(cudaMemcpyAsync(pinned(), rows.first + rows.batch, sizeof(int), cudaMemcpyDeviceToHost, device.stream), kWhat);
    check(cudaEventRecord(event, device.stream), kWhat);
    asked_ = true;
  }

  Count(const Count&) = delete;
  ~Count() {
    if (asked_) cudaEventSynchronize(arrived_.get());  // or the copy could arrive after another Count's
  }

  int wait() const {
    if (!asked_) return all_;
    check(cudaEventSynchronize(arrived_.get()), kWhat);
    return *pinned();
  }

 private:
  static constexpr const char* kWhat = "reading the count of executed tokens";

  // Memory that the device can write to while the host goes on; a thread asks for one count at a time.
  static int* pinned() {
    static thread_local const std::unique_ptr<int, FreeHost> memory([] {
      void* memory = nullptr;
      check(cudaMallocHost(&memory, sizeof(int)), kWhat);
      return static_cast<int*>(memory);
    }());
    return memory.get();
  }

  struct FreeHost {
    void operator()(int* memory) const { cudaFreeHost(memory); }
  };
  struct DestroyEvent {
    void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
  };

  int all_;
  bool asked_ = false;
  std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, DestroyEvent> arrived_;
};

}  // namespace ir::cuda
