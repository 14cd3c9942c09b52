#include "simd/instruction_set.hpp"
#include "simd/words.hpp"

#if TINYLM_X86_VARIANTS
#include <immintrin.h>

#define TINYLM_AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt")))

namespace tinylm {
namespace {

constexpr std::size_t kBlock = 32;

TINYLM_AVX2 inline __m256i load(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

// All bits set in the bytes of `v` that lie in [first, last].
TINYLM_AVX2 inline __m256i in_range(__m256i v, int first, int last) {
  const __m256i offset = _mm256_sub_epi8(v, _mm256_set1_epi8(static_cast<char>(first)));
  const __m256i limit = _mm256_set1_epi8(static_cast<char>(last - first));
  return _mm256_cmpeq_epi8(_mm256_min_epu8(offset, limit), offset);
}

// kAsciiMap of each byte.
TINYLM_AVX2 inline __m256i map_block(__m256i v) {
  const __m256i space = _mm256_set1_epi8(' ');
  const __m256i upper = in_range(v, 'A', 'Z');
  const __m256i comma_or_stop =
      _mm256_cmpeq_epi8(_mm256_and_si256(v, _mm256_set1_epi8(~0x02)), _mm256_set1_epi8(','));
  const __m256i question = _mm256_cmpeq_epi8(v, _mm256_set1_epi8('?'));
  const __m256i marks = _mm256_or_si256(_mm256_or_si256(in_range(v, '\'', ')'), comma_or_stop),
                                        _mm256_or_si256(in_range(v, ':', ';'), question));
  // From U+001C to the quotation mark: separators all.
  const __m256i spaces = _mm256_or_si256(in_range(v, 0x09, 0x0D), in_range(v, 0x1C, '"'));
  const __m256i separator = _mm256_or_si256(marks, spaces);
  // The bit that makes a letter small is the space's.
  const __m256i lower = _mm256_or_si256(v, _mm256_and_si256(upper, space));
  return _mm256_blendv_epi8(lower, space, separator);
}

TINYLM_AVX2 inline bool load_ascii(const std::uint8_t* in, __m256i& bytes) {
  bytes = load(in);
  return _mm256_movemask_epi8(bytes) == 0;
}

TINYLM_AVX2 inline bool load_ascii(const std::uint16_t* in, __m256i& bytes) {
  const __m256i a = load(in), b = load(in + 16);
  bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xD8);
  return _mm256_testz_si256(_mm256_or_si256(a, b), _mm256_set1_epi16(-0x80)) != 0;
}

TINYLM_AVX2 inline bool load_ascii(const std::uint32_t* in, __m256i& bytes) {
  const __m256i a = load(in), b = load(in + 8), c = load(in + 16), d = load(in + 24);
  const __m256i packed = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  bytes = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i any = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
  return _mm256_testz_si256(any, _mm256_set1_epi32(-0x80)) != 0;
}

template <class Unit>
TINYLM_AVX2 std::size_t map_ascii(const Unit* in, std::size_t n, char* out) {
  std::size_t at = 0;
  for (__m256i bytes; at + kBlock <= n && load_ascii(in + at, bytes); at += kBlock) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at), map_block(bytes));
  }
  for (; at < n && in[at] < 0x80; ++at) out[at] = kAsciiMap[in[at]];
  return at;
}

TINYLM_AVX2 inline std::uint64_t spaces_in_64(const char* p) {
  const __m256i space = _mm256_set1_epi8(' ');
  const auto bits = [&](const char* q) __attribute__((target("avx2"))) {
    return static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(load(q), space)));
  };
  return bits(p) | static_cast<std::uint64_t>(bits(p + 32)) << 32;
}

// Bounds are written eight at a time, too many if need be, so that there is hardly a branch whose
// outcome is not known in advance.
TINYLM_AVX2 std::uint32_t* find_bounds(const char* text, std::size_t size, std::uint32_t* out) {
  std::uint64_t before = 1;  // whether a space precedes the block
  for (std::size_t block = 0; block <= size; block += 64) {
    const std::uint64_t spaces = spaces_in_64(text + block);
    std::uint64_t changes = spaces ^ (spaces << 1 | before);
    before = spaces >> 63;
    const auto count = static_cast<int>(_mm_popcnt_u64(changes));
    for (int done = 0; done < count; done += 8) {
      for (int i = 0; i < 8; ++i) {
        out[done + i] = static_cast<std::uint32_t>(block + _tzcnt_u64(changes));
        changes = _blsr_u64(changes);
      }
    }
    out += count;
  }
  return out;
}

}  // namespace

const WordKernels kWordKernelsAvx2 = {&map_ascii, &map_ascii, &map_ascii, &find_bounds};

}  // namespace tinylm
#endif
