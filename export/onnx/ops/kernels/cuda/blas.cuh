// Products of many rows with weights: cuBLAS, which is found when it is first needed. So the library builds without cuBLAS, and
// loads where there is none.
#pragma once

#include "numbers.cuh"

#ifdef __CUDACC__
#include <dlfcn.h>

#include <map>
#include <mutex>
#endif

namespace ir::cuda {

#ifdef __CUDACC__

// The few functions of cuBLAS that are called, with its enumerations as C passes them.
class Blas {
 public:
  using Handle = void*;

  static Blas& instance() {
    static Blas blas;
    return blas;
  }

  // The handle of a stream, which one thread uses at a time. Handles are kept: making one takes milliseconds.
  Handle handle(cudaStream_t stream) {
    int device = 0;
    check(cudaGetDevice(&device), "cuBLAS");
    const std::lock_guard lock(mutex_);
    Handle& handle = handles_[{device, stream}];
    if (handle == nullptr) {
      Handle made = nullptr;
      succeed(create_(&made));
      succeed(set_stream_(made, stream));
      succeed(set_math_mode_(made, kFullPrecision));
      handle = made;
    }
    return handle;
  }

  // All row-major: y[rows, columns] = x[rows, depth] weight[depth, columns].
  void multiply(cudaStream_t stream, cudaDataType type, const void* x, int rows, int depth, const void* weight, int columns, void* y) {
    const Handle made = handle(stream);  // for no rows too: none can be made once a CUDA graph is captured
    if (rows == 0) return;
    const float one = 1, zero = 0;
    // To cuBLAS, a row-major matrix is the transposed one, column-major.
    succeed(gemm_(made, 0, 0, columns, rows, depth, &one, weight, type, columns, x, type, depth, &zero, y, type, columns,
                  kCompute32F, -1));
  }

 private:
  static constexpr int kCompute32F = 68, kFullPrecision = 16;  // sums of partial sums are fp32 too

  Blas() {
    const char* names[] = {"libcublas.so.13", "libcublas.so.12"};
    void* library = nullptr;
    for (const int flags : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW})  // rather what the process has loaded
      for (const char* name : names)
        if (library == nullptr) library = dlopen(name, flags);
    if (library == nullptr) throw Failure("cuBLAS is missing: neither libcublas.so.13 nor libcublas.so.12 can be loaded");
    find(library, "cublasCreate_v2", create_);
    find(library, "cublasSetStream_v2", set_stream_);
    find(library, "cublasSetMathMode", set_math_mode_);
    find(library, "cublasGemmEx", gemm_);
  }

  template <typename Function>
  static void find(void* library, const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(dlsym(library, name));
    if (function == nullptr) throw Failure(std::string("cuBLAS has no function ") + name);
  }
  static void succeed(int status) {
    if (status != 0) throw Failure("cuBLAS failed with status " + std::to_string(status));
  }

  int (*create_)(Handle*);
  int (*set_stream_)(Handle, cudaStream_t);
  int (*set_math_mode_)(Handle, int);
  int (*gemm_)(Handle, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int, const void*, void*, int, int,
               int, int);
  std::mutex mutex_;
  std::map<std::pair<int, cudaStream_t>, Handle> handles_;
};

template <typename T>
constexpr cudaDataType kDataType = std::is_same_v<T, float> ? CUDA_R_32F : std::is_same_v<T, Half> ? CUDA_R_16F : CUDA_R_16BF;

#endif

template <typename T>
void multiply(const Device& device, const T* x, int rows, int depth, const T* weight, int columns, T* y) {
#ifdef __CUDACC__
  Blas::instance().multiply(device.stream, kDataType<T>, x, rows, depth, weight, columns, y);
#else
  (void)device;
  for (int row = 0; row < rows; ++row)
    for (int column = 0; column < columns; ++column) {
      float sum = 0;
      for (int i = 0; i < depth; ++i)
        sum += to_float(x[static_cast<size_t>(row) * depth + i]) * to_float(weight[static_cast<size_t>(i) * columns + column]);
      y[static_cast<size_t>(row) * columns + column] = from_float<T>(sum);
    }
#endif
}

}  // namespace ir::cuda
