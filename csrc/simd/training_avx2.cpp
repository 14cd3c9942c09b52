#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "simd/instruction_set.hpp"
#include "simd/training.hpp"

#if TINYLM_X86_VARIANTS
#include <immintrin.h>

#define TINYLM_VARIANT __attribute__((target("avx2,fma")))

namespace tinylm {
namespace {

constexpr std::size_t kWidth = 8, kTileRows = 4, kHeadRows = 256;

struct Floats {
  __m256 v;
  TINYLM_VARIANT static Floats all(float x) { return {_mm256_set1_ps(x)}; }
};

TINYLM_VARIANT inline Floats operator+(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
TINYLM_VARIANT inline Floats operator-(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
TINYLM_VARIANT inline Floats operator*(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
TINYLM_VARIANT inline Floats operator/(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
TINYLM_VARIANT inline Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
// Where one is a NaN, the second.
TINYLM_VARIANT inline Floats largest(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }
TINYLM_VARIANT inline Floats smallest(Floats a, Floats b) { return {_mm256_min_ps(a.v, b.v)}; }

TINYLM_VARIANT inline float largest_of(Floats a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
TINYLM_VARIANT inline float sum_of(Floats a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

TINYLM_VARIANT inline Floats first(Floats a, std::size_t n, float rest) {
  const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i count = _mm256_set1_epi32(static_cast<int>(n < kWidth ? n : kWidth));
  const __m256 mask = _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, places));
  return {_mm256_blendv_ps(_mm256_set1_ps(rest), a.v, mask)};
}

// In two steps, for a power of two below the smallest fp32, or above the largest, is none itself.
TINYLM_VARIANT inline Floats times_power_of_two(Floats a, Floats, Floats shifted) {
  const __m256i magic = _mm256_castps_si256(_mm256_set1_ps(12582912.0f));
  const __m256i whole = _mm256_sub_epi32(_mm256_castps_si256(shifted.v), magic);
  const __m256i half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  const __m256i powers[2] = {half, _mm256_sub_epi32(whole, half)};
  for (const __m256i power : powers) {
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(power, bias), 23);
    a = a * Floats{_mm256_castsi256_ps(bits)};
  }
  return a;
}

TINYLM_VARIANT inline Floats load(const float* from) { return {_mm256_loadu_ps(from)}; }
TINYLM_VARIANT inline void store(float* to, Floats a) { _mm256_storeu_ps(to, a.v); }

TINYLM_VARIANT inline __m256i widened(const Bf16* from) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
TINYLM_VARIANT inline Floats load(const Bf16* from) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(widened(from), 16))};
}
// As words: to the nearest, ties to even; a NaN stays a quiet one.
TINYLM_VARIANT inline __m256i rounded(Floats a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
  const __m256i number = _mm256_srli_epi32(_mm256_add_epi32(bits, up), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(number, _mm256_set1_epi32(0x7FC0), nan);
}
TINYLM_VARIANT inline void store(Bf16* to, Floats a) {
  const __m256i words = rounded(a);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
}

TINYLM_VARIANT inline float to_float(float x) { return x; }
TINYLM_VARIANT inline float to_float(Bf16 x) {
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(x) << 16)));
}

struct Pairs {
  __m256i v;
};

TINYLM_VARIANT inline Pairs load_pairs(const std::uint32_t* from) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))};
}
TINYLM_VARIANT inline Pairs all_pairs(std::uint32_t x) {
  return {_mm256_set1_epi32(static_cast<int>(x))};
}
TINYLM_VARIANT inline void store_pairs(std::uint32_t* to, Pairs a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a.v);
}
TINYLM_VARIANT inline Floats low_of(Pairs a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(a.v, 16))};
}
TINYLM_VARIANT inline Floats high_of(Pairs a) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
  return {_mm256_castsi256_ps(_mm256_and_si256(a.v, mask))};
}
TINYLM_VARIANT inline Floats add_products(Floats sum, Pairs a, Pairs b) {
  return fma(high_of(a), high_of(b), fma(low_of(a), low_of(b), sum));
}
TINYLM_VARIANT inline Pairs pairs_of(__m256i low, __m256i high) {
  return {_mm256_or_si256(low, _mm256_slli_epi32(high, 16))};
}
TINYLM_VARIANT inline Pairs pairs_of(const Bf16* low, const Bf16* high) {
  return pairs_of(widened(low), widened(high));
}
TINYLM_VARIANT inline Pairs pairs_of(Floats low, Floats high) {
  return pairs_of(rounded(low), rounded(high));
}

TINYLM_VARIANT inline void store_rows_and_pairs(Floats low, Floats high, Bf16* to_low,
                                                Bf16* to_high, std::uint32_t* to_pairs) {
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

const TrainingKernels kTrainingKernelsAvx2 = {row_kernels<float>(),
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

}  // namespace tinylm
#endif
