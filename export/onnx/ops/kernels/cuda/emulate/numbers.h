// fp16 and bf16 as CUDA names them, rounded to nearest even.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

namespace emulate {

template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace emulate

inline float __bfloat162float(__nv_bfloat16 x) { return emulate::bit_cast<float>(uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
  const auto bits = emulate::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return {0x7FFF};
  return {static_cast<uint16_t>((uint64_t{bits} + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00) return emulate::bit_cast<float>(sign | 0x7F800000u | (magnitude & 0x3FF) << 13);
  // Moving the exponent is a product with a power of two, which takes care of subnormal numbers.
  return emulate::bit_cast<float>(sign | emulate::bit_cast<uint32_t>(emulate::bit_cast<float>(magnitude << 13) * 0x1p112f));
}
inline __half __float2half(float x) {
  const auto sign = static_cast<uint16_t>(emulate::bit_cast<uint32_t>(x) >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return {0x7FFF};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  if (magnitude < 0x1p-14f) return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f)))};
  const uint32_t bits = emulate::bit_cast<uint32_t>(magnitude) - (112u << 23);
  return {static_cast<uint16_t>(sign | (bits + 0xFFF + (bits >> 13 & 1)) >> 13)};
}
