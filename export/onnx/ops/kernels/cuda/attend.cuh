// What both attention kernels are given.
#pragma once

#include "heads.cuh"

namespace ir::cuda {

template <typename T>
struct Attend {
  Rows rows;          // of the queries
  HeadShape shape;
  const T* query;     // [rows, heads, head_dim]
  Cache<T> cache;
  const bool* mask;   // [batch, sequence, total]
  const bool* kept;   // [batch, total]; null: all
  int total;
  float scale, softcap;
  T* attended;  // [rows, heads, head_dim]

  __device__ bool visible(int token, int slot) const {
    return slot < total && mask[static_cast<size_t>(token) * total + slot] &&
           (kept == nullptr || kept[static_cast<size_t>(token / rows.sequence) * total + slot]);
  }
  // The logarithm to base 2 of what a dot product weighs.
  __device__ float score(float product) const {
    constexpr float kLog2OfE = 1.4426950409f;
    product *= scale;
    return (softcap > 0 ? softcap * tanhf(product / softcap) : product) * kLog2OfE;
  }
};

}  // namespace ir::cuda
