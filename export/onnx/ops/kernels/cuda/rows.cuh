// Which tokens execute, and where their rows lie.
#pragma once

#include "numbers.cuh"

namespace ir::cuda {

// A batch of B sequences of S tokens each, of which some execute. Tensors have a row for every token, or for every one that
// executes, in order: then rank says which row is a token's, and tokens whose a row is; null, where all have one.
struct Rows {
  int batch, sequence;
  const bool* execute;  // null: all
  const int* rank;      // -1 for a token that has no row
  const int* tokens;
  const int* first;  // each sequence's first row, and behind them how many there are

  int count() const { return batch * sequence; }
  __device__ bool executed(int token) const { return execute == nullptr || execute[token]; }
  __device__ int row(int token) const { return rank == nullptr ? token : rank[token]; }
  __device__ int token(int row) const { return tokens == nullptr ? row : tokens[row]; }
  __device__ int begin(int b) const { return first == nullptr ? b * sequence : first[b]; }
};

constexpr int kFlags = 16, kCompacting = 1024;

// One block goes over all flags, 16384 at a time.
template <int kThreads>
__global__ void __launch_bounds__(kThreads) compact_rows(Rows rows, int* rank, int* tokens, int* first) {
  auto* totals = shared_memory<int>();  // of each warp
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp, count = rows.batch * rows.sequence;
  int before = 0;  // executed tokens so far
  for (int begin = 0; begin < count; begin += kThreads * kFlags) {
    const int start = begin + thread * kFlags;
    unsigned flags = 0;
#pragma unroll
    for (int i = 0; i < kFlags; ++i)
      if (start + i < count && rows.execute[start + i]) flags |= 1u << i;
    int upto = __popc(flags);  // in the lanes up to this one
#pragma unroll
    for (int by = 1; by < kWarp; by *= 2) {
      const int other = __shfl_up_sync(kAllLanes, upto, by);
      if (lane >= by) upto += other;
    }
    if (lane == kWarp - 1) totals[warp] = upto;
    __syncthreads();
    int row = before + upto - __popc(flags);
    for (int i = 0; i < kThreads / kWarp; ++i) {
      if (i < warp) row += totals[i];
      before += totals[i];
    }
    for (int i = 0; i < kFlags && start + i < count; ++i) {
      const int token = start + i;
      if (token % rows.sequence == 0) first[token / rows.sequence] = row;
      const bool executed = flags >> i & 1;
      rank[token] = executed ? row : -1;
      if (executed) tokens[row++] = token;
    }
    __syncthreads();
  }
  if (thread == 0) first[rows.batch] = before;
}

// Rows of the executed tokens, one behind the other.
template <typename T, int kWidth>
__global__ void gather_rows(Rows rows, const T* from, T* to, int width) {
  const size_t source = static_cast<size_t>(rows.token(blockIdx.x)) * width, target = static_cast<size_t>(blockIdx.x) * width;
  for (int i = threadIdx.x; i < width / kWidth; i += blockDim.x)
    reinterpret_cast<Pack<T, kWidth>*>(to + target)[i] = reinterpret_cast<const Pack<T, kWidth>*>(from + source)[i];
}

template <typename T>
void gather(const Device& device, const Rows& rows, int count, const T* from, T* to, int width) {
  constexpr int kWidth = 16 / sizeof(T);
  const auto kernel = width % kWidth == 0 ? gather_rows<T, kWidth> : gather_rows<T, 1>;
  launch(device, "gather", kernel, count, 256, 0, rows, from, to, width);
}

// Finds the executed tokens' rows. While a CUDA graph is captured, all tokens have one: it launches the same whatever executes.
inline Rows compact(const Device& device, int batch, int sequence, const bool* execute) {
  Rows rows{batch, sequence, execute, nullptr, nullptr, nullptr};
  if (execute == nullptr || capturing(device)) return rows;
  auto [rank, tokens, first] = allocate<int, int, int>(device, rows.count(), rows.count(), batch + 1);
  launch(device, "compaction", compact_rows<kCompacting>, 1, kCompacting, kCompacting / kWarp * sizeof(int), rows, rank, tokens,
         first);
  rows.rank = rank, rows.tokens = tokens, rows.first = first;
  return rows;
}

}  // namespace ir::cuda
