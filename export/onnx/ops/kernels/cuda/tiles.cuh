// The queries of a long call in tiles, and which blocks of 64 slots each tile sees: any mask at all, of which what is hidden
// from a whole tile costs nothing, and what is visible to all of it is not looked at again.
#pragma once

#include "attend.cuh"

namespace ir::cuda {

constexpr int kTileSlots = 64;

// Of one tile and one block of slots: a bit for each slot.
struct Seen {
  uint64_t any, all;  // whether some query sees it, and whether each one does
};

// Tiles of `size` queries of one sequence.
struct Tiles {
  int size, count;        // count is what there may be at most
  int blocks;             // of slots
  const uint64_t* bits;   // [count, blocks, size]: what a query sees
  const Seen* seen;       // [count, blocks]
};

struct Tile {
  int first, queries;  // rows; none, where there are fewer tiles
};

__device__ __forceinline__ Tile find_tile(int tile, int size, const Rows& rows) {
  for (int b = 0; b < rows.batch; ++b) {
    const int begin = rows.begin(b), queries = rows.begin(b + 1) - begin, tiles = (queries + size - 1) / size;
    if (tile < tiles) return {begin + tile * size, min(size, queries - tile * size)};
    tile -= tiles;
  }
  return {0, 0};
}

// A block of threads looks at one tile and one block of slots.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) look(Attend<T> a, int size, uint64_t* bits, Seen* seen) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, slot = blockIdx.x * kTileSlots + lane;
  const Tile tile = find_tile(blockIdx.y, size, a.rows);
  if (tile.queries == 0) return;
  const size_t at = static_cast<size_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  Seen mine{0, ~uint64_t{0}};
  for (int i = warp; i < size; i += kWarps) {
    uint64_t word = 0;
    if (i < tile.queries) {
      const int token = a.rows.token(tile.first + i);
      word = __ballot_sync(kAllLanes, a.visible(token, slot));
      word |= uint64_t{__ballot_sync(kAllLanes, a.visible(token, slot + kWarp))} << kWarp;
      mine.any |= word, mine.all &= word;
    }
    if (lane == 0) bits[at * size + i] = word;
  }
  auto* each = shared_memory<Seen>();
  if (lane == 0) each[warp] = mine;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < kWarps; ++i) mine.any |= each[i].any, mine.all &= each[i].all;
  seen[at] = mine;
}

// rows: how many queries there are.
template <typename T>
Tiles find_tiles(const Device& device, const Attend<T>& a, int rows, int size) {
  constexpr int kThreads = 128;
  const int count = rows / size + a.rows.batch, blocks = divide_up(a.total, kTileSlots);
  const size_t pairs = static_cast<size_t>(count) * blocks;
  auto [bits, seen] = allocate<uint64_t, Seen>(device, pairs * size, pairs);
  launch(device, "mask", look<T, kThreads>, dim3(blocks, count), kThreads, kThreads / kWarp * sizeof(Seen), a, size, bits, seen);
  return {size, count, blocks, bits, seen};
}

}  // namespace ir::cuda
