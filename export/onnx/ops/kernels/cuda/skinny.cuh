// Products of at most 16 rows with weights, as fast as the weights can be read.
//
// A block computes 64 columns over a slice of the depth, for all rows at once; its warps take turns at 32 rows of the weight.
// A weight goes from memory to registers once, 16 bytes to a load. For numbers of 16 bits the tensor cores multiply: their
// operand wants pairs of neighbours in depth, and which of the depth and of the columns a lane holds is free as long as all
// agree, so two loaded rows are interleaved and nothing passes through shared memory.
#pragma once

#include "mma.cuh"
#include "rows.cuh"
#include "sources.cuh"

namespace ir::cuda {

constexpr int kFew = 16;  // rows
constexpr int kTileColumns = 64, kTileDepth = 32, kSkinnyWarps = 8;
constexpr int kBlocksEach = 6;  // of a multiprocessor, which holds two at a time: the last to end leave few idle

template <typename T>
struct Projection {
  const T* weight;  // [depth, columns]
  int columns;
  bool all;  // rows of all tokens, or of those that execute
};

// Up to three projections of the same rows.
template <typename T>
struct Projections {
  Projection<T> list[3];
  int count;

  int columns() const {
    int sum = 0;
    for (int i = 0; i < count; ++i) sum += list[i].columns;
    return sum;
  }
  int tiles() const {
    int sum = 0;
    for (int i = 0; i < count; ++i) sum += divide_up(list[i].columns, kTileColumns);
    return sum;
  }
};

// What one lane multiplies at a time: 8 rows of 8 columns of the weight.
template <typename T, bool kWhole>
struct WeightTile {
  Pack<T, 8> rows[8];

  // Takes the rows from `row` on and the columns from `column` on; what lies outside is zero.
  __device__ __forceinline__ void load(const T* weight, int row, int depth, int column, int columns) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const T* from = weight + static_cast<size_t>(row + i) * columns + column;
      if constexpr (kWhole) {  // all of the 8 or none
        constexpr int kLoads = sizeof(rows[i]) / sizeof(uint4);
        union {
          uint4 words[kLoads];
          Pack<T, 8> pack;
        } loaded{};
#pragma unroll
        for (int part = 0; part < kLoads; ++part)
          if (row < depth && column < columns) loaded.words[part] = stream_16(reinterpret_cast<const uint4*>(from) + part);
        rows[i] = loaded.pack;
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j)
          rows[i].values[j] = row + i < depth && column + j < columns ? from[j] : from_float<T>(0);
      }
    }
  }
};

// 8 neighbours of a row of x; zeros where it is not live or outside.
template <bool kWhole, typename T>
__device__ __forceinline__ Pack<T, 8> read_x(const T* x, bool live, int from, int depth) {
  Pack<T, 8> pack;
  if (kWhole && live && from < depth) return *reinterpret_cast<const Pack<T, 8>*>(x + from);
#pragma unroll
  for (int i = 0; i < 8; ++i) pack.values[i] = !kWhole && live && from + i < depth ? x[from + i] : from_float<T>(0);
  return pack;
}

// Sums of a lane: 16 rows of 8 columns, over its part of the depth.
template <typename T>
struct PlainSums {
  float sums[kFew][8] = {};

  template <bool kWhole>
  __device__ __forceinline__ void add(const WeightTile<T, kWhole>& w, const T* x, int depth, int from, unsigned live) {
#pragma unroll
    for (int row = 0; row < kFew; ++row) {
      if ((live >> row & 1) == 0) continue;
      const auto pack = read_x<kWhole>(x + static_cast<size_t>(row) * depth, true, from, depth);
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[row][j] += to_float(pack.values[i]) * to_float(w.rows[i].values[j]);
    }
  }

  // To shared memory [16, 64].
  __device__ __forceinline__ void put(float* to, int g, int t, unsigned live) {
#pragma unroll
    for (int row = 0; row < kFew; ++row) {
      if ((live >> row & 1) == 0) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[row][j] = warp_sum<4>(sums[row][j]);
      if (t == 0) store(to + row * kTileColumns + 8 * g, sums[row]);
    }
  }
};

// The same by tensor cores: product j is of the columns 8 n + j, n = 0 to 7.
template <typename T>
struct TensorSums {
  float sums[8][4] = {};

  template <bool kWhole>
  __device__ __forceinline__ void add(const WeightTile<T, kWhole>& w, const T* x, int depth, int from, unsigned live) {
    const int g = threadIdx.x % kWarp / 4;
    union {
      Pack<T, 8> pack;
      uint32_t words[4];
    } upper{read_x<kWhole>(x + static_cast<size_t>(g) * depth, live >> g & 1, from, depth)},
        lower{read_x<kWhole>(x + static_cast<size_t>(g + 8) * depth, live >> (g + 8) & 1, from, depth)};
    const auto* words = reinterpret_cast<const uint32_t(*)[4]>(w.rows);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint32_t a[4] = {upper.words[2 * step], lower.words[2 * step], upper.words[2 * step + 1], lower.words[2 * step + 1]};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const unsigned half = j % 2 == 0 ? 0x5410 : 0x7632;
        const uint32_t b[2] = {__byte_perm(words[4 * step][j / 2], words[4 * step + 1][j / 2], half),
                               __byte_perm(words[4 * step + 2][j / 2], words[4 * step + 3][j / 2], half)};
        multiply<T>(sums[j], a, b);
      }
    }
  }

  __device__ __forceinline__ void put(float* to, int g, int t, unsigned live) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if ((live >> (g + 8 * row) & 1) == 0) continue;
      float* at = to + (g + 8 * row) * kTileColumns + 16 * t;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float neighbours[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) neighbours[j] = sums[j][2 * row + i];
        store(at + 8 * i, neighbours);
      }
    }
  }
};

// Whether the next tile is fetched while this one is multiplied; it takes registers that other types have not left.
template <typename T, bool kWhole>
constexpr bool kAhead = sizeof(T) == 2 && kWhole;

// parts[split, token, column] of x[token, depth] weight[depth, column], where the token is wanted.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kSkinnyWarps * kWarp, kAhead<T, kWhole> ? 2 : 1)
    skinny_products(Projections<T> projections, Rows tokens, const T* x, int depth, int slice, float* parts) {
  using Sums = std::conditional_t<sizeof(T) == 2, TensorSums<T>, PlainSums<T>>;
  auto* shared = shared_memory<float>();  // [warps, 16, 64]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4, count = tokens.batch * tokens.sequence;

  Projection<T> projection{};
  int tile = -1, first = 0, stride = 0, before = 0;  // first: the projection's first column among all
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (i >= projections.count) break;
    const int columns = projections.list[i].columns, tiles = (columns + kTileColumns - 1) / kTileColumns;
    if (tile < 0 && static_cast<int>(blockIdx.x) < before + tiles) {
      projection = projections.list[i];
      tile = blockIdx.x - before;
      first = stride;
    }
    before += tiles;
    stride += columns;
  }
  const unsigned live = __ballot_sync(kAllLanes, lane < count && (projection.all || tokens.executed(lane)));
  if (live == 0) return;  // and the weight is not read

  const int column = tile * kTileColumns, end = min(depth, static_cast<int>(blockIdx.y + 1) * slice);
  const auto fetch = [&](WeightTile<T, kWhole>& w, int from) {
    w.load(projection.weight, from + 8 * t, end, column + 8 * g, projection.columns);
  };
  Sums sums;
  WeightTile<T, kWhole> w;
  constexpr int kStep = kSkinnyWarps * kTileDepth;
  int from = blockIdx.y * slice + warp * kTileDepth;
  if (kAhead<T, kWhole> && from < end) fetch(w, from);
  for (; from < end; from += kStep) {
    if constexpr (kAhead<T, kWhole>) {
      const auto now = w;
      if (from + kStep < end) fetch(w, from + kStep);
      sums.add(now, x, depth, from + 8 * t, live);
    } else {
      fetch(w, from);
      sums.add(w, x, depth, from + 8 * t, live);
    }
  }
  sums.put(shared + warp * kFew * kTileColumns, g, t, live);
  __syncthreads();

  const int width = min(kTileColumns, projection.columns - column);
  for (int i = threadIdx.x; i < count * kTileColumns; i += kSkinnyWarps * kWarp) {
    const int token = i / kTileColumns, c = i % kTileColumns;
    if ((live >> token & 1) == 0 || c >= width) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kSkinnyWarps; ++w) sum += shared[(w * kFew + token) * kTileColumns + c];
    parts[(static_cast<size_t>(blockIdx.y) * count + token) * stride + first + column + c] = sum;
  }
}

// How the depth is cut, so that every multiprocessor has some blocks.
struct Slices {
  int size, count;

  Slices(const Device& device, int tiles, int depth) {
    constexpr int kRound = kSkinnyWarps * kTileDepth;  // every warp has something to do
    const int wanted = divide_up(kBlocksEach * device.multiprocessors, tiles);
    size = divide_up(divide_up(depth, wanted), kRound) * kRound;
    count = divide_up(depth, size);
  }
};

// Writes what Parts reads, of Slices(...).count parts.
template <typename T>
void multiply_skinny(const Device& device, const char* name, const Projections<T>& projections, const Rows& tokens, const T* x,
                     int depth, const Slices& slices, float* parts) {
  bool whole = depth % 8 == 0;
  for (int i = 0; i < projections.count; ++i) whole = whole && projections.list[i].columns % 8 == 0;
  const auto kernel = whole ? skinny_products<T, true> : skinny_products<T, false>;
  launch(device, name, kernel, dim3(projections.tiles(), slices.count), kSkinnyWarps * kWarp,
         kSkinnyWarps * kFew * kTileColumns * sizeof(float), projections, tokens, x, depth, slices.size, parts);
}

}  // namespace ir::cuda
