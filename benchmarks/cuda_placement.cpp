// A stand-in for CUDA's runtime that computes nothing: device memory is the host's, copies are real, kernels are only named.
// It is as much as ONNX Runtime's CUDA provider calls. What a kernel would have counted (4 or 8 bytes that come back to the
// host) is what the environment variable EXECUTED says.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

std::map<const void*, const char*> kernels;  // by the host's function
std::map<char*, size_t> blocks;              // of device memory
std::mutex mutex;
const char* executed = std::getenv("EXECUTED");
thread_local dim3 grid, threads;
thread_local size_t shared;
thread_local cudaStream_t stream;

bool on_device(const void* place) {
  const std::lock_guard lock(mutex);
  auto next = blocks.upper_bound(static_cast<char*>(const_cast<void*>(place)));
  return next != blocks.begin() && static_cast<const char*>(place) < (--next)->first + next->second;
}

cudaError_t allocate(void** memory, size_t bytes) {
  *memory = std::calloc(bytes / 256 + 2, 256);
  const std::lock_guard lock(mutex);
  blocks[static_cast<char*>(*memory)] = bytes + 1;
  return cudaSuccess;
}

cudaError_t release(void* memory) {
  const std::lock_guard lock(mutex);
  blocks.erase(static_cast<char*>(memory));
  std::free(memory);
  return cudaSuccess;
}

cudaError_t copy(void* to, const void* from, size_t bytes) {
  const bool off = on_device(from), onto = on_device(to);
  std::fprintf(stderr, "[cuda] copy %s to %s\n", off ? "device" : "host", onto ? "device" : "host");
  std::memmove(to, from, bytes);
  if (executed != nullptr && off && !onto && (bytes == 4 || bytes == 8)) {
    const long long count = std::atoll(executed);
    std::memcpy(to, &count, bytes);  // little-endian
  }
  return cudaSuccess;
}

cudaError_t launch(const void* function) {
  std::fprintf(stderr, "[cuda] launch %s\n", kernels.count(function) ? kernels[function] : "?");
  return cudaSuccess;
}

}  // namespace

// What only succeeds, and what gives a handle besides.
#define SUCCEEDS(name, ...) \
  cudaError_t name(__VA_ARGS__) { return cudaSuccess; }
#define GIVES(name, value, ...) \
  cudaError_t name(__VA_ARGS__) { return *out = value, cudaSuccess; }

extern "C" {
void** __cudaRegisterFatBinary(void*) {
  static void* binary[4];
  return binary;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels[function] = name;
}
unsigned __cudaPushCallConfiguration(dim3 g, dim3 t, size_t s, cudaStream_t at) {
  return grid = g, threads = t, shared = s, stream = at, 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* t, size_t* s, void* at) {
  return *g = grid, *t = threads, *s = shared, *static_cast<cudaStream_t*>(at) = stream, cudaSuccess;
}
GIVES(__cudaGetKernel, (cudaKernel_t)function, cudaKernel_t* out, const void* function)
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) { return launch(kernel); }
cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t) { return launch(function); }
cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t) { return launch(function); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* function, void**) { return launch(function); }
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) { return function(data), cudaSuccess; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int) {  // those of an H100
  *out = {};
  std::strcpy(out->name, "stand-in");
  out->major = 9, out->warpSize = 32, out->multiProcessorCount = 132, out->maxThreadsPerBlock = 1024, out->regsPerBlock = 65536;
  out->totalGlobalMem = 80ull << 30, out->sharedMemPerBlock = 49152, out->sharedMemPerBlockOptin = 232448;
  out->maxThreadsPerMultiProcessor = 2048, out->sharedMemPerMultiprocessor = 233472, out->l2CacheSize = 50 << 20;
  for (int i = 0; i < 3; ++i) out->maxThreadsDim[i] = i < 2 ? 1024 : 64, out->maxGridSize[i] = i ? 65535 : 2147483647;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* out, cudaDeviceAttr attribute, int) {
  cudaDeviceProp all;
  cudaGetDeviceProperties(&all, 0);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: return *out = all.multiProcessorCount, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return *out = int(all.sharedMemPerBlockOptin), cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return *out = int(all.sharedMemPerMultiprocessor), cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return *out = all.maxThreadsPerMultiProcessor, cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock: return *out = all.maxThreadsPerBlock, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: return *out = all.major, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: return *out = all.minor, cudaSuccess;
    case cudaDevAttrWarpSize: return *out = all.warpSize, cudaSuccess;
    default: return *out = 1, cudaSuccess;
  }
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
  *out = {};
  out->maxThreadsPerBlock = 1024, out->numRegs = 64, out->binaryVersion = out->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* place) {
  *out = {};
  out->type = on_device(place) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  out->devicePointer = const_cast<void*>(place);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) { return *free = *total = 80ull << 30, cudaSuccess; }
GIVES(cudaGetDevice, 0, int* out)
GIVES(cudaGetDeviceCount, 1, int* out)
GIVES(cudaDriverGetVersion, CUDART_VERSION, int* out)
GIVES(cudaRuntimeGetVersion, CUDART_VERSION, int* out)
GIVES(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, 2, int* out, const void*, int, size_t, unsigned)
SUCCEEDS(cudaSetDevice, int)
SUCCEEDS(cudaDeviceSynchronize)
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaPeekAtLastError)
const char* cudaGetErrorName(cudaError_t) { return "error"; }
const char* cudaGetErrorString(cudaError_t) { return "error"; }
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** out, unsigned, unsigned long long, cudaDriverEntryPointQueryResult*) {
  return *out = nullptr, cudaErrorSymbolNotFound;
}
SUCCEEDS(cudaFuncSetAttribute, const void*, cudaFuncAttribute, int)
SUCCEEDS(cudaKernelSetAttributeForDevice, cudaKernel_t, cudaFuncAttribute, int, int)
GIVES(cudaLibraryGetKernel, (cudaKernel_t)1, cudaKernel_t* out, cudaLibrary_t, const char*)
GIVES(cudaLibraryLoadData, (cudaLibrary_t)1, cudaLibrary_t* out, const void*, cudaJitOption*, void**, unsigned, cudaLibraryOption*, void**, unsigned)
SUCCEEDS(cudaLibraryUnload, cudaLibrary_t)

cudaError_t cudaMalloc(void** out, size_t bytes) { return allocate(out, bytes); }
cudaError_t cudaMallocFromPoolAsync(void** out, size_t bytes, cudaMemPool_t, cudaStream_t) { return allocate(out, bytes); }
cudaError_t cudaFree(void* memory) { return release(memory); }
cudaError_t cudaFreeAsync(void* memory, cudaStream_t) { return release(memory); }
cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned) { return *out = std::malloc(bytes + 1), cudaSuccess; }
cudaError_t cudaMallocHost(void** out, size_t bytes) { return *out = std::malloc(bytes + 1), cudaSuccess; }
cudaError_t cudaFreeHost(void* memory) { return std::free(memory), cudaSuccess; }
GIVES(cudaMemPoolCreate, (cudaMemPool_t)1, cudaMemPool_t* out, const cudaMemPoolProps*)
SUCCEEDS(cudaMemPoolDestroy, cudaMemPool_t)
SUCCEEDS(cudaMemPoolGetAttribute, cudaMemPool_t, cudaMemPoolAttr, void*)
SUCCEEDS(cudaMemPoolSetAttribute, cudaMemPool_t, cudaMemPoolAttr, void*)
SUCCEEDS(cudaMemPoolTrimTo, cudaMemPool_t, size_t)
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) { return copy(to, from, bytes); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) { return copy(to, from, bytes); }
cudaError_t cudaMemcpy2DAsync(void* to, size_t pitch, const void* from, size_t other, size_t width, size_t height, cudaMemcpyKind, cudaStream_t) {
  for (size_t row = 0; row < height; ++row) std::memmove((char*)to + row * pitch, (const char*)from + row * other, width);
  return cudaSuccess;
}
SUCCEEDS(cudaMemcpyFromSymbol, void*, const void*, size_t, size_t, cudaMemcpyKind)
cudaError_t cudaMemset(void* memory, int value, size_t bytes) { return std::memset(memory, value, bytes), cudaSuccess; }
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) { return cudaMemset(memory, value, bytes); }

GIVES(cudaEventCreate, (cudaEvent_t)1, cudaEvent_t* out)
GIVES(cudaEventCreateWithFlags, (cudaEvent_t)1, cudaEvent_t* out, unsigned)
GIVES(cudaEventElapsedTime, 1, float* out, cudaEvent_t, cudaEvent_t)
SUCCEEDS(cudaEventDestroy, cudaEvent_t)
SUCCEEDS(cudaEventRecord, cudaEvent_t, cudaStream_t)
SUCCEEDS(cudaEventRecordWithFlags, cudaEvent_t, cudaStream_t, unsigned)
SUCCEEDS(cudaEventSynchronize, cudaEvent_t)
GIVES(cudaStreamCreate, (cudaStream_t)1, cudaStream_t* out)
GIVES(cudaStreamCreateWithFlags, (cudaStream_t)1, cudaStream_t* out, unsigned)
SUCCEEDS(cudaStreamDestroy, cudaStream_t)
SUCCEEDS(cudaStreamSynchronize, cudaStream_t)
SUCCEEDS(cudaStreamWaitEvent, cudaStream_t, cudaEvent_t, unsigned)
SUCCEEDS(cudaStreamBeginCapture, cudaStream_t, cudaStreamCaptureMode)
GIVES(cudaStreamEndCapture, (cudaGraph_t)1, cudaStream_t, cudaGraph_t* out)
GIVES(cudaStreamIsCapturing, cudaStreamCaptureStatusNone, cudaStream_t, cudaStreamCaptureStatus* out)
GIVES(cudaGraphInstantiate, (cudaGraphExec_t)1, cudaGraphExec_t* out, cudaGraph_t, unsigned long long)
SUCCEEDS(cudaGraphLaunch, cudaGraphExec_t, cudaStream_t)
SUCCEEDS(cudaGraphDestroy, cudaGraph_t)
SUCCEEDS(cudaGraphExecDestroy, cudaGraphExec_t)
}
