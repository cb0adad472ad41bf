// The tensor cores' instructions for numbers of 16 bits, sm_80 and newer, and copies that pass the registers by.
#pragma once

#include <type_traits>

#include "numbers.cuh"

#ifndef __CUDACC__
#include "emulate/tensor_cores.h"
#endif

namespace ir::cuda {

// c[16, 8] += a[16, 16] b[16, 8], spread over a warp. With g = lane / 4 and t = lane % 4, a lane has of a the pairs of columns
// from 2 t and 2 t + 8 on, in rows g (registers 0, 2) and g + 8 (1, 3); of b the pairs of rows from 2 t and 2 t + 8 on, in
// column g; of c the columns 2 t and 2 t + 1, in rows g and g + 8.
template <typename T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, Half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulate::multiply(c, a, b, [](uint16_t bits) { return to_float(T{bits}); });
#endif
}

// Four matrices [8, 8] from shared memory: lane 8 m + r names row r of matrix m. A lane gets of each the pair of columns from
// 2 t on in row g; transposed, the pair of rows from 2 t on in column g.
template <bool kTransposed, typename T>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const T* row) {
#ifdef __CUDACC__
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
#else
  emulate::load_matrices(to, row, kTransposed);
#endif
}

// 16 bytes to shared memory in the background; zeros where they are not wanted, and then nothing is read.
__device__ __forceinline__ void copy_16(void* to, const void* from, bool wanted) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "l"(from), "r"(wanted ? 16 : 0)
               : "memory");
#else
  wanted ? std::memcpy(to, from, 16) : std::memset(to, 0, 16);
#endif
}

// Closes a group of copies, and waits for all groups but the last few.
__device__ __forceinline__ void close_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// 16 bytes of a weight, which are read once: the cache of the multiprocessor is left to others.
__device__ __forceinline__ uint4 stream_16(const void* from) {
#ifdef __CUDACC__
  uint4 x;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from));
  return x;
#else
  return *static_cast<const uint4*>(from);
#endif
}

}  // namespace ir::cuda
