// Attention of few queries over a long cache: every query's slots are split over blocks, whose results are put together by a
// second kernel. Query heads that share keys and values are computed together.
#pragma once

#include "attend.cuh"

namespace ir::cuda {

constexpr int kSplitWarps = 4, kSplitUnroll = 4;

// Where blocks leave what they saw: the largest score, the sum of weights, and the weighted sum of values.
struct Partials {
  float* values;  // [rows, heads, splits, head_dim]
  float2* sums;   // [rows, heads, splits]: largest, sum
  int splits;
};

// A softmax over some slots, for kGroup heads, of 8 components.
template <int kGroup>
struct Running {
  float largest[kGroup], sum[kGroup], values[kGroup][8];

  __device__ __forceinline__ Running() {
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      largest[g] = -INFINITY, sum[g] = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) values[g][i] = 0;
    }
  }
};

// Adds up what a block's groups of lanes have seen, in their order.
template <int kGroup, int kLanes>
__device__ __forceinline__ void put_together(const Running<kGroup>& running, size_t head, int heads, int split, int head_dim,
                                             const Partials& partials) {
  constexpr int kParts = kSplitWarps * kWarp / kLanes, kWidth = kLanes * 8;
  auto* largest = shared_memory<float>();      // [kParts, kGroup]
  float* sum = largest + kParts * kGroup;      // [kParts, kGroup]
  float* values = sum + kParts * kGroup;       // [kParts, kGroup, kWidth]
  const int part = threadIdx.x / kLanes, component = threadIdx.x % kLanes * 8;
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    if (component == 0) largest[part * kGroup + g] = running.largest[g], sum[part * kGroup + g] = running.sum[g];
    store(values + (part * kGroup + g) * kWidth + component, running.values[g]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < heads * head_dim; i += blockDim.x) {
    const int g = i / head_dim;
    float most = -INFINITY, total = 0, value = 0;
    for (int p = 0; p < kParts; ++p) most = fmaxf(most, largest[p * kGroup + g]);
    for (int p = 0; p < kParts; ++p) {
      const float weight = most == -INFINITY ? 0 : exp2f(largest[p * kGroup + g] - most);
      total += weight * sum[p * kGroup + g];
      value += weight * values[(p * kGroup + g) * kWidth + i % head_dim];
    }
    const size_t at = (head + g) * partials.splits + split;
    partials.values[at * head_dim + i % head_dim] = value;
    if (i % head_dim == 0) partials.sums[at] = make_float2(most, total);
  }
}

// kLanes lanes hold a head, 8 components each; so many slots are looked at together as groups of lanes are in a block.
template <typename T, int kGroup, int kLanes>
__global__ void __launch_bounds__(kSplitWarps * kWarp) attend_slots(Attend<T> a, Partials partials, int slots_each) {
  constexpr int kSlots = kWarp / kLanes;  // of a warp at a time
  const int token = blockIdx.x, split = blockIdx.z, head_dim = a.shape.head_dim;
  if (!a.rows.executed(token)) return;
  const int group = a.shape.heads / a.shape.kv_heads, chunks = (group + kGroup - 1) / kGroup;
  const int kv_head = blockIdx.y / chunks, head = kv_head * group + blockIdx.y % chunks * kGroup;
  const int heads = min(kGroup, kv_head * group + group - head);  // of this block
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, component = lane % kLanes * 8;
  const bool mine = component < head_dim;
  const size_t row = a.rows.row(token);

  float query[kGroup][8] = {};
#pragma unroll
  for (int g = 0; g < kGroup; ++g)
    if (mine && g < heads) load(query[g], a.query + (row * a.shape.heads + head + g) * head_dim + component);

  Running<kGroup> running;
  const size_t base = a.cache.at(a.shape.kv_heads, token / a.rows.sequence, kv_head, 0, head_dim) + component;
  const int end = min(a.total, (split + 1) * slots_each);
  for (int begin = split * slots_each + warp * kSlots * kSplitUnroll; begin < end; begin += kSplitWarps * kSlots * kSplitUnroll) {
    bool visible[kSplitUnroll], any = false;
    Pack<T, 8> keys[kSplitUnroll] = {}, values[kSplitUnroll] = {};
#pragma unroll
    for (int u = 0; u < kSplitUnroll; ++u) {
      const int slot = begin + u * kSlots + lane / kLanes;
      visible[u] = slot < end && a.visible(token, slot);
      any = any || visible[u];
      if (!visible[u] || !mine) continue;
      keys[u] = *reinterpret_cast<const Pack<T, 8>*>(a.cache.key + base + static_cast<size_t>(slot) * head_dim);
      values[u] = *reinterpret_cast<const Pack<T, 8>*>(a.cache.value + base + static_cast<size_t>(slot) * head_dim);
    }
    if (!__any_sync(kAllLanes, any)) continue;
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      float weights[kSplitUnroll], largest = running.largest[g];
#pragma unroll
      for (int u = 0; u < kSplitUnroll; ++u) {
        float product = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) product += query[g][i] * to_float(keys[u].values[i]);
        weights[u] = a.score(warp_sum<kLanes>(product));
        if (visible[u]) largest = fmaxf(largest, weights[u]);
      }
      if (!any) continue;  // this lane's slots; so with all lanes that hold the same head
      const float old = exp2f(running.largest[g] - largest);
      running.largest[g] = largest;
      running.sum[g] *= old;
#pragma unroll
      for (int i = 0; i < 8; ++i) running.values[g][i] *= old;
#pragma unroll
      for (int u = 0; u < kSplitUnroll; ++u) {
        const float weight = visible[u] ? exp2f(weights[u] - largest) : 0;
        running.sum[g] += weight;
#pragma unroll
        for (int i = 0; i < 8; ++i) running.values[g][i] += weight * to_float(values[u].values[i]);
      }
    }
  }
  put_together<kGroup, kLanes>(running, row * a.shape.heads + head, heads, split, head_dim, partials);
}

// The last step: all splits of one head of one token.
template <typename T>
__global__ void combine_splits(Attend<T> a, Partials partials) {
  const int token = blockIdx.x, head_dim = a.shape.head_dim;
  if (!a.rows.executed(token)) return;
  const size_t head = static_cast<size_t>(a.rows.row(token)) * a.shape.heads + blockIdx.y, at = head * partials.splits;
  float most = -INFINITY, total = 0;
  for (int split = 0; split < partials.splits; ++split) most = fmaxf(most, partials.sums[at + split].x);
  for (int i = threadIdx.x; i < head_dim; i += blockDim.x) {
    float value = 0;
    total = 0;
    for (int split = 0; split < partials.splits; ++split) {
      const float2 sums = partials.sums[at + split];
      const float weight = most == -INFINITY ? 0 : exp2f(sums.x - most);
      total += weight * sums.y;
      value += weight * partials.values[(at + split) * head_dim + i];
    }
    a.attended[head * head_dim + i] = from_float<T>(total == 0 ? 0 : value / total);
  }
}

template <typename T, int kGroup>
auto slots_kernel(int lanes) {
  return lanes == 8 ? attend_slots<T, kGroup, 8> : lanes == 16 ? attend_slots<T, kGroup, 16> : attend_slots<T, kGroup, 32>;
}

// count: how many rows there are at most.
template <typename T>
void attend_split(const Device& device, const Attend<T>& a, int count) {
  const int group = a.shape.heads / a.shape.kv_heads, together = group == 1 ? 1 : group <= 4 ? 4 : 8;
  const int blocks = a.rows.count() * a.shape.kv_heads * divide_up(group, together);
  const int lanes = a.shape.head_dim <= 64 ? 8 : a.shape.head_dim <= 128 ? 16 : 32;
  constexpr int kLeast = 128;  // slots; fewer are not worth a block of their own
  const int most = min(divide_up(4 * device.multiprocessors, blocks), divide_up(a.total, kLeast));
  const int each = divide_up(divide_up(a.total, most), 32) * 32, splits = divide_up(a.total, each);

  const size_t heads = static_cast<size_t>(count) * a.shape.heads * splits;
  auto [values, sums] = allocate<float, float2>(device, heads * a.shape.head_dim, heads);
  const Partials partials{values, sums, splits};
  const auto kernel = together == 1 ? slots_kernel<T, 1>(lanes) : together == 4 ? slots_kernel<T, 4>(lanes) : slots_kernel<T, 8>(lanes);
  const size_t parts = kSplitWarps * kWarp / lanes * together, shared = parts * (lanes * 8 + 2) * sizeof(float);
  launch(device, "attention", kernel, dim3(a.rows.count(), a.shape.kv_heads * divide_up(group, together), splits),
         kSplitWarps * kWarp, shared, a, partials, each);
  launch(device, "combination", combine_splits<T>, dim3(a.rows.count(), a.shape.heads), 64, 0, a, partials);
}

}  // namespace ir::cuda
