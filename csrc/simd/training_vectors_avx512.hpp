// Vectors of AVX-512, for a variant that has defined TINYLM_VARIANT and includes this within its
// own namespace: `Floats`, and `Pairs` of bf16.

constexpr std::size_t kWidth = 16;

struct Floats {
  __m512 v;
  TINYLM_VARIANT static Floats all(float x) { return {_mm512_set1_ps(x)}; }
};

TINYLM_VARIANT inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
TINYLM_VARIANT inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
TINYLM_VARIANT inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
TINYLM_VARIANT inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
TINYLM_VARIANT inline Floats fma(Floats a, Floats b, Floats c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
// Where one is a NaN, the second.
TINYLM_VARIANT inline Floats largest(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
TINYLM_VARIANT inline Floats smallest(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
TINYLM_VARIANT inline float largest_of(Floats a) { return _mm512_reduce_max_ps(a.v); }
TINYLM_VARIANT inline float sum_of(Floats a) { return _mm512_reduce_add_ps(a.v); }

TINYLM_VARIANT inline Floats first(Floats a, std::size_t n, float rest) {
  const auto mask = static_cast<__mmask16>(n >= kWidth ? 0xFFFF : (1u << n) - 1);
  return {_mm512_mask_mov_ps(_mm512_set1_ps(rest), mask, a.v)};
}

TINYLM_VARIANT inline Floats times_power_of_two(Floats a, Floats whole, Floats) {
  return {_mm512_scalef_ps(a.v, whole.v)};
}

TINYLM_VARIANT inline Floats load(const float* from) { return {_mm512_loadu_ps(from)}; }
TINYLM_VARIANT inline void store(float* to, Floats a) { _mm512_storeu_ps(to, a.v); }

TINYLM_VARIANT inline __m512i widened(const Bf16* from) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
TINYLM_VARIANT inline Floats load(const Bf16* from) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(widened(from), 16))};
}
TINYLM_VARIANT inline __m256i rounded(Floats a) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
}
TINYLM_VARIANT inline void store(Bf16* to, Floats a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded(a));
}

TINYLM_VARIANT inline float to_float(float x) { return x; }
TINYLM_VARIANT inline float to_float(Bf16 x) {
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(x) << 16)));
}

struct Pairs {
  __m512i v;
};

TINYLM_VARIANT inline Pairs load_pairs(const std::uint32_t* from) {
  return {_mm512_loadu_si512(from)};
}
TINYLM_VARIANT inline Pairs all_pairs(std::uint32_t x) {
  return {_mm512_set1_epi32(static_cast<int>(x))};
}
TINYLM_VARIANT inline void store_pairs(std::uint32_t* to, Pairs a) { _mm512_storeu_si512(to, a.v); }
TINYLM_VARIANT inline Floats add_products(Floats sum, Pairs a, Pairs b) {
  return {
      _mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
TINYLM_VARIANT inline Pairs pairs_of(__m512i low, __m512i high) {
  return {_mm512_or_si512(low, _mm512_slli_epi32(high, 16))};
}
TINYLM_VARIANT inline Pairs pairs_of(const Bf16* low, const Bf16* high) {
  return pairs_of(widened(low), widened(high));
}
// Rounds two rows once, and stores each of them and their pairs.
TINYLM_VARIANT inline void store_rows_and_pairs(Floats low, Floats high, Bf16* to_low,
                                                Bf16* to_high, std::uint32_t* to_pairs) {
  alignas(64) static constexpr std::uint16_t kOrder[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_low), _mm512_castsi512_si256(both));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_high), _mm512_extracti64x4_epi64(both, 1));
  _mm512_storeu_si512(to_pairs, _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both));
}
TINYLM_VARIANT inline Pairs pairs_of(Floats low, Floats high) {
  return pairs_of(_mm512_cvtepu16_epi32(rounded(low)), _mm512_cvtepu16_epi32(rounded(high)));
}
