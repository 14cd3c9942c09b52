#include "ascii_classes.hpp"

#include <array>

#include "instruction_set.hpp"

#if TINYLM_X86_VARIANTS
#include <immintrin.h>
#endif

namespace tinylm {

namespace {

// A character's class as a byte of which at most one bit is set. Each is a set of high halves of
// bytes times a set of low halves, so that two look-ups in tables of 16 tell it.
enum ClassBit : std::uint8_t {
  kAToO = 1,         // 0x41 to 0x4F
  kPToZ = 2,         // 0x50 to 0x5A
  kLowAToO = 4,      // 0x61 to 0x6F
  kLowPToZ = 8,      // 0x70 to 0x7A
  kDigit = 16,       // 0x30 to 0x39
  kControl = 32,     // \t to \r
  kBlank = 64,       // ' '
  kApostrophe = 128  // '
};

using Table16 = std::array<std::uint8_t, 16>;

constexpr Table16 kOfHighHalf = {
    kControl, 0, kBlank | kApostrophe, kDigit, kAToO, kPToZ, kLowAToO, kLowPToZ, 0, 0, 0, 0, 0, 0,
    0,        0};

constexpr Table16 make_of_low_half() {
  Table16 table{};
  for (int half = 0; half < 16; ++half) {
    int bits = 0;
    if (half >= 1) bits |= kAToO | kLowAToO;
    if (half <= 10) bits |= kPToZ | kLowPToZ;
    if (half <= 9) bits |= kDigit;
    if (half >= 9 && half <= 13) bits |= kControl;
    if (half == 0) bits |= kBlank;
    if (half == 7) bits |= kApostrophe;
    table[static_cast<std::size_t>(half)] = static_cast<std::uint8_t>(bits);
  }
  return table;
}

constexpr Table16 kOfLowHalf = make_of_low_half();

constexpr std::array<std::uint8_t, 256> make_of_byte() {
  std::array<std::uint8_t, 256> table{};
  for (std::size_t byte = 0; byte < 256; ++byte) {
    table[byte] = kOfHighHalf[byte >> 4] & kOfLowHalf[byte & 15];
  }
  return table;
}

constexpr std::array<std::uint8_t, 256> kOfByte = make_of_byte();

// Bit k of each of eight bytes as one byte: the product brings byte i's bit to bit 56 + i.
inline std::uint64_t gather_bit(std::uint64_t bytes, int k) {
  return ((bytes >> k & 0x0101010101010101u) * 0x0102040810204080u) >> 56;
}

void classify_portable(const char* text, std::size_t blocks, BlockClasses* classes) {
  const auto* at = reinterpret_cast<const unsigned char*>(text);
  for (std::size_t block = 0; block < blocks; ++block) {
    BlockClasses& out = classes[block] = {};
    for (std::size_t shift = 0; shift < kBlockBytes; shift += 8, at += 8) {
      std::uint64_t bits = 0;
      std::uint64_t bytes = 0;
      for (int i = 0; i < 8; ++i) {
        bits |= std::uint64_t{kOfByte[at[i]]} << (8 * i);
        bytes |= std::uint64_t{at[i]} << (8 * i);
      }
      const auto put = [shift](std::uint64_t& field, std::uint64_t byte) {
        field |= byte << shift;
      };
      const std::uint64_t blank = gather_bit(bits, 6);
      put(out.upper, gather_bit(bits | bits >> 1, 0));
      put(out.lower, gather_bit(bits | bits >> 1, 2));
      put(out.number, gather_bit(bits, 4));
      put(out.space, gather_bit(bits, 5) | blank);
      put(out.blank, blank);
      put(out.apostrophe, gather_bit(bits, 7));
      put(out.wide, gather_bit(bytes, 7) & gather_bit(bytes, 6));
      // Of the control characters, only \n and \r differ from 0x0A in bits 0 to 2 as 0 or 7.
      const std::uint64_t difference = bytes ^ 0x0A0A0A0A0A0A0A0Au;
      const std::uint64_t low = gather_bit(difference, 0);
      const std::uint64_t middle = gather_bit(difference, 1);
      const std::uint64_t high = gather_bit(difference, 2);
      put(out.newline, gather_bit(bits, 5) & ~((low ^ middle) | (middle ^ high)));
    }
  }
}

#if TINYLM_X86_VARIANTS

__attribute__((target("avx2"))) inline std::uint64_t join(std::uint32_t low, std::uint32_t high) {
  return low | std::uint64_t{high} << 32;
}

// Bit k of each byte.
template <int k>
__attribute__((target("avx2"))) inline std::uint64_t bits_of(__m256i low, __m256i high) {
  return join(static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(low, 7 - k))),
              static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(high, 7 - k))));
}

__attribute__((target("avx2"))) inline __m256i broadcast(const Table16& table) {
  return _mm256_broadcastsi128_si256(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.data())));
}

__attribute__((target("avx2"))) inline __m256i class_bits(__m256i bytes) {
  const __m256i high_half = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
  // A shuffle gives 0 where the index's top bit is set.
  return _mm256_and_si256(_mm256_shuffle_epi8(broadcast(kOfHighHalf), high_half),
                          _mm256_shuffle_epi8(broadcast(kOfLowHalf), bytes));
}

__attribute__((target("avx2"))) inline std::uint64_t equal(__m256i low, __m256i high, char c) {
  const __m256i wanted = _mm256_set1_epi8(c);
  return bits_of<7>(_mm256_cmpeq_epi8(low, wanted), _mm256_cmpeq_epi8(high, wanted));
}

__attribute__((target("avx2"))) void classify_avx2(const char* text, std::size_t blocks,
                                                   BlockClasses* classes) {
  for (std::size_t block = 0; block < blocks; ++block, text += kBlockBytes) {
    const auto* at = reinterpret_cast<const __m256i*>(text);
    const __m256i low = _mm256_loadu_si256(at);
    const __m256i high = _mm256_loadu_si256(at + 1);
    const __m256i low_bits = class_bits(low);
    const __m256i high_bits = class_bits(high);
    BlockClasses& out = classes[block];
    out.upper = bits_of<0>(low_bits, high_bits) | bits_of<1>(low_bits, high_bits);
    out.lower = bits_of<2>(low_bits, high_bits) | bits_of<3>(low_bits, high_bits);
    out.number = bits_of<4>(low_bits, high_bits);
    out.blank = bits_of<6>(low_bits, high_bits);
    out.space = bits_of<5>(low_bits, high_bits) | out.blank;
    out.newline = equal(low, high, '\n') | equal(low, high, '\r');
    out.apostrophe = bits_of<7>(low_bits, high_bits);
    out.wide = bits_of<7>(low, high) & bits_of<6>(low, high);
  }
}

__attribute__((target("avx512f,avx512bw"))) inline __m512i broadcast_512(const Table16& table) {
  // The plain broadcast makes GCC 12 warn of its own header.
  return _mm512_maskz_broadcast_i32x4(
      0xFFFF, _mm_loadu_si128(reinterpret_cast<const __m128i*>(table.data())));
}

__attribute__((target("avx512f,avx512bw"))) void classify_avx512(const char* text,
                                                                 std::size_t blocks,
                                                                 BlockClasses* classes) {
  const __m512i of_high_half = broadcast_512(kOfHighHalf);
  const __m512i of_low_half = broadcast_512(kOfLowHalf);
  for (std::size_t block = 0; block < blocks; ++block, text += kBlockBytes) {
    const __m512i bytes = _mm512_loadu_si512(text);
    const __m512i high_half = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
    const __m512i bits = _mm512_and_si512(_mm512_shuffle_epi8(of_high_half, high_half),
                                          _mm512_shuffle_epi8(of_low_half, bytes));
    const auto any = [bits](int wanted) __attribute__((target("avx512f,avx512bw"))) {
      return _mm512_test_epi8_mask(bits, _mm512_set1_epi8(static_cast<char>(wanted)));
    };
    BlockClasses& out = classes[block];
    out.upper = any(kAToO | kPToZ);
    out.lower = any(kLowAToO | kLowPToZ);
    out.number = any(kDigit);
    out.space = any(kControl | kBlank);
    out.newline = _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8('\n')) |
                  _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8('\r'));
    out.blank = any(kBlank);
    out.apostrophe = any(kApostrophe);
    out.wide =
        _mm512_cmp_epu8_mask(bytes, _mm512_set1_epi8(static_cast<char>(0xC0)), _MM_CMPINT_NLT);
  }
}

#endif

}  // namespace

void classify_blocks(const char* text, std::size_t blocks, BlockClasses* classes) {
#if TINYLM_X86_VARIANTS
  switch (instruction_set()) {
    case InstructionSet::kAmx:
    case InstructionSet::kAvx512:
      return classify_avx512(text, blocks, classes);
    case InstructionSet::kAvx2:
      return classify_avx2(text, blocks, classes);
    case InstructionSet::kPortable:
      break;
  }
#endif
  classify_portable(text, blocks, classes);
}

}  // namespace tinylm
