#include "cpu_weights.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../kernels/cpu/level.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace ir {

#if defined(__x86_64__)
namespace {

// Feature by feature: not all compilers that build for these levels can ask for a level by its name, or for each feature.
bool has_v3() {
  unsigned a = 0, b = 0, c = 0, d = 0, extended = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !__get_cpuid(0x80000001, &a, &b, &extended, &d)) return false;
  return (c & bit_F16C) && (c & bit_MOVBE) && (extended & bit_LZCNT) && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}
bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace
#endif

const Kernels& best_kernels() {
#define IR_KERNELS(name, level, supported) {name, static_cast<bool>(supported), cpu::level::kFloat, cpu::level::kHalf, cpu::level::kInt4}
  static const Kernels all[] = {
#if defined(__x86_64__)
    IR_KERNELS("x86-64-v4-vnni", x86_64_v4_vnni, has_v4() && __builtin_cpu_supports("avx512vnni")),
    IR_KERNELS("x86-64-v4", x86_64_v4, has_v4()),
    IR_KERNELS("x86-64-v3", x86_64_v3, has_v3()),
    IR_KERNELS("x86-64", x86_64, true),
#else
    IR_KERNELS("native", native, true),
#endif
  };
#undef IR_KERNELS
  static const Kernels* const best = [] {
    const char* wanted = std::getenv("IR_CONVERT_OPS_LEVEL");
    bool allowed = wanted == nullptr;
    for (const Kernels& kernels : all) {
      allowed = allowed || std::strcmp(wanted, kernels.level) == 0;
      if (allowed && kernels.supported) return &kernels;
    }
    return static_cast<const Kernels*>(nullptr);
  }();
  if (best == nullptr) throw Error("IR_CONVERT_OPS_LEVEL names no level of this processor's instruction set");
  return *best;
}

template <typename T>
Weights<T>::Weights(const Node& node, std::initializer_list<const char*> names) {
  for (const char* name : names) {
    std::vector<T, HugePages<T>>& packed = packed_.emplace_back();
    const Tensor weight = node.constant(name);
    if (!weight.present || weight.rank != 2) continue;
    packed.resize(best<T>().packed_size(weight.shape[0], weight.shape[1]));
    best<T>().pack(weight.as<T>(), weight.shape[0], weight.shape[1], packed.data());
  }
}

template <typename T>
cpu::Weight<T> Weights<T>::operator()(size_t index, const Tensor& weight) const {
  const std::vector<T, HugePages<T>>& packed = packed_[index];
  return {weight.as<T>(), packed.empty() ? nullptr : packed.data(), weight.shape[0], weight.shape[1]};
}

template class Weights<float>;
template class Weights<Half>;

namespace {

// Of float32 or float16.
std::vector<float> numbers(const Tensor& tensor) {
  std::vector<float> numbers(static_cast<size_t>(tensor.size()));
  if (tensor.element == abi::kFloat16) best_kernels().int4.widen(tensor.as<Half>(), tensor.size(), numbers.data());
  else std::copy_n(tensor.as<float>(), numbers.size(), numbers.data());
  return numbers;
}

// One for each block of each output; in uint8 there are two a byte, the earlier in the low half.
std::vector<float> zeros(const Tensor& tensor, int64_t out, int64_t blocks) {
  if (tensor.element != abi::kUint8) return numbers(tensor);
  std::vector<float> zeros(static_cast<size_t>(out * blocks));
  for (int64_t o = 0; o < out; ++o)
    for (int64_t b = 0; b < blocks; ++b)
      zeros[o * blocks + b] = static_cast<float>(tensor.as<uint8_t>()[o * zero_bytes(blocks) + b / 2] >> (b % 2 * 4) & 15);
  return zeros;
}

// Whether these are the parts of one weight; what has other shapes is left to the call, which refuses it.
bool whole(const Tensor& weight, const Tensor& scales, const Tensor& zero_points) {
  return weight.present && weight.rank == 3 && weight.shape[2] == 16 && scales_fit(weight, scales) &&
         zero_points_fit(weight, scales, zero_points);
}

template <typename Words>
void pack(const Tensor& weight, const Tensor& scales, const Tensor& zero_points, Words& packed) {
  const int64_t in = 32 * weight.shape[1], out = weight.shape[0];  // up to whole blocks: they are packed alike
  const std::vector<float> offsets = zero_points.present ? zeros(zero_points, out, weight.shape[1]) : std::vector<float>{};
  packed.resize(best_kernels().int4.packed_size(in, out, zero_points.present));
  best_kernels().int4.pack(weight.as<uint8_t>(), numbers(scales).data(), zero_points.present ? offsets.data() : nullptr, in, out,
                           packed.data());
}

}  // namespace

Weights<cpu::Int4>::Weights(const Node& node, std::initializer_list<std::string> names) {
  for (const std::string& name : names) {
    Packed& packed = packed_.emplace_back();
    const std::string stem = name.substr(0, name.rfind('_')), zero_name = stem + "_zero_points";
    const Tensor weight = node.constant(name), scales = node.constant(stem + "_scales"), zero_points = node.constant(zero_name);
    if (!whole(weight, scales, zero_points)) continue;
    pack(weight, scales, zero_points, packed.words);
    packed.zeros = zero_points.present;
  }
}

cpu::Weight<cpu::Int4> Weights<cpu::Int4>::operator()(size_t index, const Tensor& weight, const Tensor& scales,
                                                      const Tensor& zero_points, int64_t in) const {
  static thread_local std::vector<uint32_t> anew[4];
  const Packed& packed = packed_[index];
  if (!packed.words.empty() && packed.zeros == zero_points.present)
    return {packed.words.data(), in, weight.shape[0], packed.zeros};
  pack(weight, scales, zero_points, anew[index]);
  return {anew[index].data(), in, weight.shape[0], zero_points.present};
}

}  // namespace ir
