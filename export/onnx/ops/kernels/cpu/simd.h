// Vectors as wide as the instruction set has them, and functions of them.
//
// All kernels live in a namespace of their level: no function that they share with another level, the standard library's
// included, may be left to the linker, which could pick the one for a newer processor.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "units.h"

namespace ir::cpu::IR_LEVEL {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));

template <typename T>
inline T least(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
inline T most(T a, T b) {
  return a < b ? b : a;
}
inline int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }
inline Vector all(float x) { return x - Vector{}; }
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

inline float sum(Vector v) {
  typedef float Four __attribute__((vector_size(16)));
  Four parts[kLanes / 4];
  std::memcpy(parts, &v, sizeof v);
  for (int half = kLanes / 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

inline float largest(Vector v) {
  float value = -__builtin_inff();
  for (int i = 0; i < kLanes; ++i) value = most(value, v[i]);
  return value;
}

inline constexpr float kRounding = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits

// e^x within 2 units in the last place; 0 from -87.3 down, for x of at most 88.
inline Vector exp(Vector x) {
  const Vector magic = all(kRounding);
  const Vector lowest = all(-87.3F);
  const Vector shifted = x * all(1.44269504F) + magic;
  const Vector n = shifted - magic;
  const Vector r = (x - n * all(0.693145752F)) - n * all(1.42860677e-6F);  // ln 2 in two parts
  Vector p = all(1.0F / 720);
  p = p * r + all(1.0F / 120);
  p = p * r + all(1.0F / 24);
  p = p * r + all(1.0F / 6);
  p = p * r + all(0.5F);
  p = p * r + all(1.0F);
  p = p * r + all(1.0F);
  Integers power;
  std::memcpy(&power, &shifted, sizeof power);  // its low bits are n
  power = (power + 127) << 23;
  Vector scale;
  std::memcpy(&scale, &power, sizeof scale);
  return x <= lowest ? Vector{} : p * scale;  // what is not a number stays so
}

// 1 / (1 + e^-x)
inline Vector sigmoid(Vector x) {
  const Vector e = exp(-(x > all(-80.0F) ? x : all(-80.0F)));
  return all(1.0F) / (all(1.0F) + e);
}

inline Vector silu(Vector x) { return x * sigmoid(x); }

inline Vector tanh(Vector x) {
  const Vector limit = all(10.0F);
  const Vector clipped = x > limit ? limit : (x < -limit ? -limit : x);
  const Vector e = exp(clipped + clipped);
  const Vector far = (e - all(1.0F)) / (e + all(1.0F));
  const Vector s = x * x;  // near zero that cancels; Taylor's series does not
  Vector p = all(-1382.0F / 155925);
  p = p * s + all(62.0F / 2835);
  p = p * s + all(-17.0F / 315);
  p = p * s + all(2.0F / 15);
  p = p * s + all(-1.0F / 3);
  p = p * s + all(1.0F);
  return (s < all(0.09F)) ? x * p : far;
}

inline float to_float(float x) { return x; }
inline float to_float(Half half) {
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000U) << 16, rest = half.bits & 0x7fffU;
  uint32_t bits = (rest << 13) + (112U << 23);
  float value;
  if (rest >= 0x7c00U) bits += 112U << 23;  // infinity, or not a number
  if (rest < 0x0400U) {                     // zero, or subnormal: rest * 2^-24
    value = static_cast<float>(rest) * 0x1p-24F;
    std::memcpy(&bits, &value, sizeof bits);
  }
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, Half* out) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000U;
  bits &= 0x7fffffffU;
  uint32_t half;
  if (bits >= 0x47800000U) {  // 65536 and more, or not a number
    half = bits > 0x7f800000U ? 0x7e00U : 0x7c00U;
  } else if (bits < 0x38800000U) {  // below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    float value;
    std::memcpy(&value, &bits, sizeof value);
    value += 0.5F;
    std::memcpy(&half, &value, sizeof half);
    half -= 0x3f000000U;
  } else {
    half = (bits + 0xfffU + (bits >> 13 & 1U) - (112U << 23)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// Rows of n elements to float32, and back.
inline void widen(const float* in, int64_t n, float* out) { std::memcpy(out, in, static_cast<size_t>(n) * sizeof *in); }
inline void narrow(const float* in, int64_t n, float* out) { std::memcpy(out, in, static_cast<size_t>(n) * sizeof *in); }

inline void widen(const Half* in, int64_t n, float* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  for (; i < n; ++i) out[i] = to_float(in[i]);
}

inline void narrow(const float* in, int64_t n, Half* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
#endif
  for (; i < n; ++i) from_float(in[i], out + i);
}

// Memory of a thread's own that is kept from call to call: one buffer for each use, those of tasks apart from those of units.
enum class Use {
  kExecuted, kRanges, kKept, kBlocks, kBias, kNorm, kRows, kHidden, kResult, kQueries, kAttended,  // of a unit
  kWide, kSlab, kFirst, kSecond, kTurned, kScores, kSums, kKeys, kValues,                          // of a task
  kCount
};

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};

inline Buffer& buffer(Use use) {
  static thread_local Buffer buffers[static_cast<int>(Use::kCount)];
  return buffers[static_cast<int>(use)];
}

template <typename T = float>
inline T* scratch(Use use, int64_t count) {
  Buffer& kept = buffer(use);
  const size_t size = static_cast<size_t>(count) * sizeof(T);
  if (kept.size < size) {
    std::free(kept.data);
    kept.size = (size + 4095) / 4096 * 4096;
    kept.data = std::aligned_alloc(64, kept.size);
    if (kept.data == nullptr) std::abort();  // no exception may leave a thread of the runtime's
  }
  return static_cast<T*>(kept.data);
}

}  // namespace ir::cpu::IR_LEVEL
