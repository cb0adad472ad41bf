// Attention of many queries on the tensor cores: a block takes one head and one tile of queries of which each warp has 16, and
// goes over the blocks of slots that the tile sees. Scores and weights stay in registers, the softmax is online.
#pragma once

#include "mma.cuh"
#include "tiles.cuh"

namespace ir::cuda {

// Rows of shared memory are 16 bytes longer than what they hold: eight of them then lie in different banks.
template <int kSteps>
constexpr int kRowStride = kSteps * 16 + 8;

template <typename T, int kSteps, int kWarps>
__device__ __forceinline__ void copy_slots(T* to, const T* from, int head_dim, uint64_t wanted) {
  for (int i = threadIdx.x; i < kTileSlots * kSteps * 2; i += kWarps * kWarp) {
    const int slot = i / (kSteps * 2), component = i % (kSteps * 2) * 8;
    const bool inside = component < head_dim && (wanted >> slot & 1) != 0;  // what no query sees may be anything
    copy_16(to + slot * kRowStride<kSteps> + component, inside ? from + static_cast<size_t>(slot) * head_dim + component : from, inside);
  }
}

// Puts the blocks of slots that a tile sees in a list, in order; returns how many. For one warp.
__device__ __forceinline__ int list_blocks(const Seen* seen, int blocks, int* list) {
  const int lane = threadIdx.x % kWarp;
  int listed = 0;
  for (int begin = 0; begin < blocks; begin += kWarp) {
    const bool visible = begin + lane < blocks && seen[begin + lane].any != 0;
    const unsigned votes = __ballot_sync(kAllLanes, visible);
    if (visible) list[listed + __popc(votes & ((1u << lane) - 1))] = begin + lane;
    listed += __popc(votes);
  }
  return listed;
}

// kSteps: of 16 components, as many as a head has.
template <typename T, int kSteps, int kWarps>
__global__ void __launch_bounds__(kWarps * kWarp, kSteps <= 8 ? 3 : 1) attend_tile(Attend<T> a, Tiles tiles) {
  constexpr int kRows = kWarps * 16, kStride = kRowStride<kSteps>, kKeyTiles = kTileSlots / 8;
  const int index = tiles.count - 1 - static_cast<int>(blockIdx.y);  // the last queries see most: they go first
  const Tile tile = find_tile(index, kRows, a.rows);
  if (tile.queries == 0) return;
  const int head = blockIdx.x, kv_head = head / (a.shape.heads / a.shape.kv_heads), head_dim = a.shape.head_dim;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;

  T* queries = shared_memory<T>();
  T* keys = queries + kRows * kStride;
  T* values = keys + kTileSlots * kStride;
  int* count = reinterpret_cast<int*>(values + kTileSlots * kStride);
  int* list = count + 1;

  const size_t pairs = static_cast<size_t>(index) * tiles.blocks;
  const Seen* seen = tiles.seen + pairs;
  const uint64_t* bits = tiles.bits + pairs * kRows + warp * 16 + g;
  if (warp == 0) {
    const int listed = list_blocks(seen, tiles.blocks, list);
    if (lane == 0) *count = listed;
  }
  const int row_width = a.shape.query_width();
  const T* query = a.query + static_cast<size_t>(tile.first) * row_width + head * head_dim;
  for (int i = threadIdx.x; i < kRows * kSteps * 2; i += kWarps * kWarp) {
    const int row = i / (kSteps * 2), component = i % (kSteps * 2) * 8;
    const bool inside = row < tile.queries && component < head_dim;
    copy_16(queries + row * kStride + component, inside ? query + static_cast<size_t>(row) * row_width + component : query, inside);
  }
  __syncthreads();

  const int b = a.rows.token(tile.first) / a.rows.sequence, blocks = *count;
  const size_t base = a.cache.at(a.shape.kv_heads, b, kv_head, 0, head_dim);
  const auto copy = [&](T* to, const T* from, int block) {
    const size_t first = static_cast<size_t>(block) * kTileSlots * head_dim;
    copy_slots<T, kSteps, kWarps>(to, from + base + first, head_dim, seen[block].any);
  };
  // Where a lane's row of each of four matrices lies.
  const T* query_at = queries + (warp * 16 + lane % 16) * kStride + lane / 16 * 8;
  const T* key_at = keys + (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
  const T* value_at = values + lane % 16 * kStride + lane / 16 * 8;

  float output[kSteps * 2][4] = {}, largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  if (blocks > 0) copy(keys, a.cache.key, list[0]);
  close_copies();
  for (int i = 0; i < blocks; ++i) {
    const int block = list[i];
    copy(values, a.cache.value, block);
    close_copies();
    wait_for_copies<1>();  // queries and keys
    __syncthreads();
    float scores[kKeyTiles][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t left[4];
      load_matrices<false>(left, query_at + step * 16);
#pragma unroll
      for (int j = 0; j < kKeyTiles; j += 2) {
        uint32_t right[4];
        load_matrices<false>(right, key_at + j * 8 * kStride + step * 16);
        multiply<T>(scores[j], left, {right[0], right[1]});
        multiply<T>(scores[j + 1], left, {right[2], right[3]});
      }
    }
    __syncthreads();
    if (i + 1 < blocks) copy(keys, a.cache.key, list[i + 1]);
    close_copies();

    uint64_t word[2] = {~uint64_t{0}, ~uint64_t{0}};
    if (seen[block].all != ~uint64_t{0}) word[0] = bits[static_cast<size_t>(block) * kRows], word[1] = bits[static_cast<size_t>(block) * kRows + 8];
    uint32_t weights[kKeyTiles][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // rows g and g + 8
      float most = largest[r];
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& score = scores[j][2 * r + c];
          score = word[r] >> (8 * j + 2 * t + c) & 1 ? a.score(score) : -INFINITY;
          most = fmaxf(most, score);
        }
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      const float from = most == -INFINITY ? 0 : most;  // of a row that sees nothing yet
      const float old = exp2f(largest[r] - from);
      largest[r] = most;
      sum[r] *= old;
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j) {
        const float low = exp2f(scores[j][2 * r] - from), high = exp2f(scores[j][2 * r + 1] - from);
        sum[r] += low + high;
        weights[j][r] = pair<T>(low, high);
      }
#pragma unroll
      for (int j = 0; j < kSteps * 2; ++j) output[j][2 * r] *= old, output[j][2 * r + 1] *= old;
    }

    wait_for_copies<1>();  // values
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kTileSlots / 16; ++step) {
      const uint32_t left[4] = {weights[2 * step][0], weights[2 * step][1], weights[2 * step + 1][0], weights[2 * step + 1][1]};
#pragma unroll
      for (int j = 0; j < kSteps * 2; j += 2) {
        uint32_t right[4];
        load_matrices<true>(right, value_at + step * 16 * kStride + j * 8);
        multiply<T>(output[j], left, {right[0], right[1]});
        multiply<T>(output[j + 1], left, {right[2], right[3]});
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float total = warp_sum<4>(sum[r]);
    const int row = warp * 16 + g + 8 * r;
    if (row >= tile.queries) continue;
    const float factor = total == 0 ? 0 : 1 / total;
    T* to = a.attended + static_cast<size_t>(tile.first + row) * row_width + head * head_dim + 2 * t;
#pragma unroll
    for (int j = 0; j < kSteps * 2; ++j)
      if (j * 8 < head_dim) store(to + j * 8, {output[j][2 * r] * factor, output[j][2 * r + 1] * factor});
  }
}

template <typename T, int kSteps, int kWarps>
void attend_tiles_of(const Device& device, const Attend<T>& a, int rows) {
  constexpr int kRows = kWarps * 16;
  const Tiles tiles = find_tiles(device, a, rows, kRows);
  const size_t shared = (kRows + 2 * kTileSlots) * kRowStride<kSteps> * sizeof(T) + (1 + tiles.blocks) * sizeof(int);
  launch(device, "attention", attend_tile<T, kSteps, kWarps>, dim3(a.shape.heads, tiles.count), kWarps * kWarp, shared, a, tiles);
}

template <typename T>
void attend_tiles(const Device& device, const Attend<T>& a, int rows) {
  const int components = a.shape.head_dim;
  const auto attend = components <= 64   ? attend_tiles_of<T, 4, 4>
                      : components <= 80 ? attend_tiles_of<T, 5, 4>
                      : components <= 96 ? attend_tiles_of<T, 6, 4>
                      : components <= 128 ? attend_tiles_of<T, 8, 4>
                                          : attend_tiles_of<T, 16, 2>;  // of 4 warps not all GPUs could hold the tiles
  attend(device, a, rows);
}

}  // namespace ir::cuda
