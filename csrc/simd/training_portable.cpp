#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "simd/instruction_set.hpp"
#include "simd/training.hpp"

#define TINYLM_VARIANT

namespace tinylm {
namespace {

constexpr std::size_t kWidth = 8, kTileRows = 4, kHeadRows = 256;

std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
float of_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

float to_float(float x) { return x; }
float to_float(Bf16 x) { return of_bits(std::uint32_t{x} << 16); }

// To the nearest, ties to even; a NaN stays a quiet one.
Bf16 rounded(float x) {
  const std::uint32_t bits = bits_of(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
  return static_cast<Bf16>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Loops of known length, for the compiler to make vectors of.
struct Floats {
  float v[kWidth];
  static Floats all(float x) {
    Floats result;
    for (float& number : result.v) number = x;
    return result;
  }
};

template <class Function>
Floats map(Floats a, Floats b, Function function) {
  for (std::size_t i = 0; i < kWidth; ++i) a.v[i] = function(a.v[i], b.v[i]);
  return a;
}

Floats operator+(Floats a, Floats b) {
  return map(a, b, [](float x, float y) { return x + y; });
}
Floats operator-(Floats a, Floats b) {
  return map(a, b, [](float x, float y) { return x - y; });
}
Floats operator*(Floats a, Floats b) {
  return map(a, b, [](float x, float y) { return x * y; });
}
Floats operator/(Floats a, Floats b) {
  return map(a, b, [](float x, float y) { return x / y; });
}
Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
// Where one is a NaN, the second.
Floats largest(Floats a, Floats b) {
  return map(a, b, [](float x, float y) { return x > y ? x : y; });
}
Floats smallest(Floats a, Floats b) {
  return map(a, b, [](float x, float y) { return x < y ? x : y; });
}
float largest_of(Floats a) {
  float result = a.v[0];
  for (const float number : a.v) result = result > number ? result : number;
  return result;
}
float sum_of(Floats a) {
  float result = 0.0f;
  for (const float number : a.v) result += number;
  return result;
}

Floats first(Floats a, std::size_t n, float rest) {
  for (std::size_t i = n; i < kWidth; ++i) a.v[i] = rest;
  return a;
}

// In two steps, for a power of two below the smallest fp32, or above the largest, is none itself.
Floats times_power_of_two(Floats a, Floats, Floats shifted) {
  for (std::size_t i = 0; i < kWidth; ++i) {
    const std::uint32_t whole = bits_of(shifted.v[i]) - bits_of(12582912.0f);
    const std::uint32_t half = ((whole + 1024) >> 1) - 512;  // of a number from -1024 on
    a.v[i] = a.v[i] * of_bits((half + 127) << 23) * of_bits((whole - half + 127) << 23);
  }
  return a;
}

Floats load(const float* from) {
  Floats a;
  std::memcpy(a.v, from, sizeof a.v);
  return a;
}
void store(float* to, Floats a) { std::memcpy(to, a.v, sizeof a.v); }
Floats load(const Bf16* from) {
  Floats a;
  for (std::size_t i = 0; i < kWidth; ++i) a.v[i] = to_float(from[i]);
  return a;
}
void store(Bf16* to, Floats a) {
  for (std::size_t i = 0; i < kWidth; ++i) to[i] = rounded(a.v[i]);
}

struct Pairs {
  std::uint32_t v[kWidth];
};

Pairs load_pairs(const std::uint32_t* from) {
  Pairs a;
  std::memcpy(a.v, from, sizeof a.v);
  return a;
}
Pairs all_pairs(std::uint32_t x) {
  Pairs a;
  for (std::uint32_t& word : a.v) word = x;
  return a;
}
void store_pairs(std::uint32_t* to, Pairs a) { std::memcpy(to, a.v, sizeof a.v); }
Floats add_products(Floats sum, Pairs a, Pairs b) {
  for (std::size_t i = 0; i < kWidth; ++i) {
    sum.v[i] += of_bits(a.v[i] << 16) * of_bits(b.v[i] << 16);
    sum.v[i] += of_bits(a.v[i] & 0xFFFF0000u) * of_bits(b.v[i] & 0xFFFF0000u);
  }
  return sum;
}
Pairs pairs_of(const Bf16* low, const Bf16* high) {
  Pairs a;
  for (std::size_t i = 0; i < kWidth; ++i) a.v[i] = low[i] | std::uint32_t{high[i]} << 16;
  return a;
}
Pairs pairs_of(Floats low, Floats high) {
  Bf16 numbers[2][kWidth];
  store(numbers[0], low);
  store(numbers[1], high);
  return pairs_of(numbers[0], numbers[1]);
}

void store_rows_and_pairs(Floats low, Floats high, Bf16* to_low, Bf16* to_high,
                          std::uint32_t* to_pairs) {
  store(to_low, low);
  store(to_high, high);
  store_pairs(to_pairs, pairs_of(low, high));
}

// clang-format off: each uses those before it.
#include "simd/training_rows.hpp"
#include "simd/training_matrices.hpp"
#include "simd/training_products.hpp"
#include "simd/training_attention.hpp"
#include "simd/training_head.hpp"
#include "simd/training_projections.hpp"
#include "simd/training_feed_forward.hpp"
#include "simd/training_muon.hpp"
// clang-format on

}  // namespace

const TrainingKernels kTrainingKernelsPortable = {row_kernels<float>(),
                                                  row_kernels<Bf16>(),
                                                  norm_kernels<float, float>(),
                                                  norm_kernels<float, Bf16>(),
                                                  norm_kernels<Bf16, Bf16>(),
                                                  attention_kernels(),
                                                  head_kernels(),
                                                  pack_kernels(),
                                                  projection_kernels(),
                                                  feed_forward_kernels(),
                                                  &muon_step};

const TrainingKernels& training_kernels() {
#if TINYLM_X86_VARIANTS
  static const bool has_bf16 = __builtin_cpu_supports("avx512bf16");
  static const bool has_fma = __builtin_cpu_supports("fma");
  const InstructionSet set = instruction_set();
#if TINYLM_AMX_VARIANT
  if (set == InstructionSet::kAmx) return kTrainingKernelsAmx;
#endif
  if (set >= InstructionSet::kAvx512 && has_bf16) return kTrainingKernelsAvx512;
  if (set != InstructionSet::kPortable && has_fma) return kTrainingKernelsAvx2;
#endif
  return kTrainingKernelsPortable;
}

bool multiplies_bf16(const TrainingKernels& kernels) {
#if TINYLM_AMX_VARIANT
  if (&kernels == &kTrainingKernelsAmx) return true;
#endif
#if TINYLM_X86_VARIANTS
  return &kernels == &kTrainingKernelsAvx512;
#else
  return false;
#endif
}

}  // namespace tinylm
