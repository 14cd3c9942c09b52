#include "simd/instruction_set.hpp"
#include "simd/words.hpp"

#if TINYLM_X86_VARIANTS
#if !defined(__clang__)
// GCC 12 warns of what its own header leaves undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define TINYLM_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,bmi,bmi2,popcnt")))

namespace tinylm {
namespace {

constexpr std::size_t kBlock = 64;

// The lowest n bits, n at most 64.
TINYLM_AVX512 inline std::uint64_t low_bits(std::size_t n) {
  return _bzhi_u64(~0ull, static_cast<unsigned>(n));
}

// Up to 64 units as bytes, and a bit for each that is not ASCII.
struct Block {
  __m512i bytes;
  std::uint64_t wide;
};

TINYLM_AVX512 inline Block load_block(const std::uint8_t* in, std::size_t n) {
  const __m512i v = _mm512_maskz_loadu_epi8(low_bits(n), in);
  return {v, _mm512_movepi8_mask(v)};
}

TINYLM_AVX512 inline Block load_block(const std::uint16_t* in, std::size_t n) {
  const std::uint64_t mask = low_bits(n);
  const __m512i a = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask), in);
  const __m512i b = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask >> 32), in + 32);
  const __m512i high = _mm512_set1_epi16(-0x80);
  const std::uint64_t wide = _mm512_test_epi16_mask(a, high) |
                             static_cast<std::uint64_t>(_mm512_test_epi16_mask(b, high)) << 32;
  return {_mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(a)),
                             _mm512_cvtepi16_epi8(b), 1),
          wide};
}

TINYLM_AVX512 inline Block load_block(const std::uint32_t* in, std::size_t n) {
  const std::uint64_t mask = low_bits(n);
  const __m512i high = _mm512_set1_epi32(-0x80);
  alignas(64) char bytes[kBlock];
  std::uint64_t wide = 0;
  for (int i = 0; i < 4; ++i) {
    const __m512i v =
        _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask >> (16 * i)), in + 16 * i);
    wide |= static_cast<std::uint64_t>(_mm512_test_epi32_mask(v, high)) << (16 * i);
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes + 16 * i), _mm512_cvtepi32_epi8(v));
  }
  return {_mm512_load_si512(bytes), wide};
}

// A table of 128 bytes fits into two registers, so mapping is one instruction.
template <class Unit>
TINYLM_AVX512 std::size_t map_ascii(const Unit* in, std::size_t n, char* out) {
  const __m512i low = _mm512_loadu_si512(kAsciiMap.data());
  const __m512i high = _mm512_loadu_si512(kAsciiMap.data() + 64);
  for (std::size_t at = 0; at < n; at += kBlock) {
    const std::size_t left = n - at;
    const Block block = load_block(in + at, left < kBlock ? left : kBlock);
    _mm512_storeu_si512(out + at, _mm512_permutex2var_epi8(low, block.bytes, high));
    if (block.wide != 0) return at + _tzcnt_u64(block.wide);
  }
  return n;
}

// The places where spaces begin or end are compressed out of the numbers 0 to 63.
TINYLM_AVX512 std::uint32_t* find_bounds(const char* text, std::size_t size, std::uint32_t* out) {
  const __m512i space = _mm512_set1_epi8(' ');
  const __m512i numbers = _mm512_set_epi8(
      63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46, 45, 44, 43, 42, 41,
      40, 39, 38, 37, 36, 35, 34, 33, 32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18,
      17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  std::uint64_t before = 1;  // whether a space precedes the block
  for (std::size_t block = 0; block <= size; block += kBlock) {
    const std::uint64_t spaces = _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(text + block), space);
    const std::uint64_t changes = spaces ^ (spaces << 1 | before);
    before = spaces >> 63;
    const __m512i places = _mm512_maskz_compress_epi8(changes, numbers);
    const __m512i base = _mm512_set1_epi32(static_cast<int>(block));
    const auto store = [&](int i, __m128i sixteen) __attribute__((target("avx512f"))) {
      _mm512_storeu_si512(out + 16 * i, _mm512_add_epi32(base, _mm512_cvtepu8_epi32(sixteen)));
    };
    const auto count = static_cast<std::size_t>(_mm_popcnt_u64(changes));
    store(0, _mm512_castsi512_si128(places));
    store(1, _mm512_extracti32x4_epi32(places, 1));
    if (count > 32) {
      store(2, _mm512_extracti32x4_epi32(places, 2));
      store(3, _mm512_extracti32x4_epi32(places, 3));
    }
    out += count;
  }
  return out;
}

}  // namespace

const WordKernels kWordKernelsAvx512 = {&map_ascii, &map_ascii, &map_ascii, &find_bounds};

}  // namespace tinylm
#endif
