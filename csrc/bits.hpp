// Bits of 64-bit words.
#pragma once

#include <cstdint>

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif

namespace tinylm {

// The position of the lowest, the highest bit of `bits`, which has one. Constant time.
inline int lowest_bit(std::uint64_t bits) {
#if defined(_MSC_VER) && !defined(__clang__)
  unsigned long position;
  _BitScanForward64(&position, bits);
  return static_cast<int>(position);
#else
  return __builtin_ctzll(bits);
#endif
}

inline int highest_bit(std::uint64_t bits) {
#if defined(_MSC_VER) && !defined(__clang__)
  unsigned long position;
  _BitScanReverse64(&position, bits);
  return static_cast<int>(position);
#else
  return 63 - __builtin_clzll(bits);
#endif
}

// How many bits there are. Constant time.
inline int count_bits(std::uint64_t bits) {
  bits -= bits >> 1 & 0x5555555555555555u;
  bits = (bits & 0x3333333333333333u) + (bits >> 2 & 0x3333333333333333u);
  return static_cast<int>(((bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0Fu) * 0x0101010101010101u >> 56);
}

}  // namespace tinylm
