// Up to 15 bytes as two registers, up to 31 as four, to be looked up and compared at once; and the
// hashes of all tables of words and pieces.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tinylm {

constexpr std::size_t kMaxShortKey = 15;
constexpr std::size_t kMaxMiddleKey = 31;

// The bytes, zeros behind them, and in the last byte how many there are, so that "a" and "a\0"
// differ and no key but the empty one has a `high` of zero.
struct ShortKey {
  std::uint64_t low, high;

  bool operator==(const ShortKey& other) const {
    return ((low ^ other.low) | (high ^ other.high)) == 0;
  }
  bool is_empty() const { return high == 0; }
};

// The same for 16 to 31 bytes: the first 16, then those behind them as a ShortKey, but for its last
// byte, which is how many there are in all.
struct MiddleKey {
  ShortKey first, rest;

  bool operator==(const MiddleKey& other) const {
    return ((first.low ^ other.first.low) | (first.high ^ other.first.high) |
            (rest.low ^ other.rest.low) | (rest.high ^ other.rest.high)) == 0;
  }
  bool is_empty() const { return rest.high == 0; }
};

// Which bits of two words the first bytes are, by how many, and where the last byte is.
struct ShortKeyMasks {
  ShortKey keep[kMaxShortKey + 1] = {};
  int size_shift = 0;
};

constexpr ShortKeyMasks make_short_key_masks() {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  constexpr bool kIsLittleEndian = false;
#else
  constexpr bool kIsLittleEndian = true;
#endif
  ShortKeyMasks masks;
  masks.size_shift = kIsLittleEndian ? 56 : 0;
  for (std::size_t size = 0; size <= kMaxShortKey; ++size) {
    for (std::size_t i = 0; i < size; ++i) {
      std::uint64_t& word = i < 8 ? masks.keep[size].low : masks.keep[size].high;
      word |= std::uint64_t{0xFF} << 8 * (kIsLittleEndian ? i % 8 : 7 - i % 8);
    }
  }
  return masks;
}

inline constexpr ShortKeyMasks kShortKeyMasks = make_short_key_masks();

// The key of `size` bytes at `begin`, where sizeof(ShortKey) bytes can be read.
inline ShortKey short_key(const char* begin, std::size_t size) {
  ShortKey key;
  std::memcpy(&key, begin, sizeof(key));
  const ShortKey& keep = kShortKeyMasks.keep[size];
  return {key.low & keep.low,
          (key.high & keep.high) | std::uint64_t{size} << kShortKeyMasks.size_shift};
}

// The same where only the `size` bytes can be read.
inline ShortKey short_key_exactly(const char* begin, std::size_t size) {
  char padded[sizeof(ShortKey)] = {};
  std::memcpy(padded, begin, size);
  return short_key(padded, size);
}

inline MiddleKey middle_key(const char* begin, std::size_t size) {
  MiddleKey key;
  std::memcpy(&key.first, begin, sizeof(key.first));
  key.rest = short_key(begin + sizeof(key.first), size - sizeof(key.first));
  key.rest.high |= std::uint64_t{sizeof(key.first)} << kShortKeyMasks.size_shift;
  return key;
}

inline MiddleKey middle_key_exactly(const char* begin, std::size_t size) {
  char padded[sizeof(MiddleKey)] = {};
  std::memcpy(padded, begin, size);
  return middle_key(padded, size);
}

inline std::size_t size_of(const ShortKey& key) {
  return static_cast<std::size_t>(key.high >> kShortKeyMasks.size_shift & 0xFF);
}

// Every bit of the key reaches the top bits, which are the ones to use.
inline std::uint64_t mix(std::uint64_t low, std::uint64_t high) {
  return (low ^ high * 0xC2B2AE3D27D4EB4Fu) * 0x9E3779B97F4A7C15u;
}

inline std::uint64_t key_hash(const ShortKey& key) { return mix(key.low, key.high); }
inline std::uint64_t key_hash(const MiddleKey& key) {
  return mix(key_hash(key.first) ^ key.rest.low, key.rest.high);
}

// The two halves of the product, one on the other.
inline std::uint64_t fold(std::uint64_t a, std::uint64_t b) {
#if defined(__SIZEOF_INT128__)
  __extension__ using Wide = unsigned __int128;
  const Wide product = static_cast<Wide>(a) * b;
  return static_cast<std::uint64_t>(product >> 64) ^ static_cast<std::uint64_t>(product);
#else
  return mix(a, b) ^ mix(b, a) >> 32;
#endif
}

// Of a word of at least 16 bytes, 16 at a time, of which the last may have been seen before.
inline std::uint64_t long_hash(const char* word, std::size_t size) {
  std::uint64_t hash = size, chunk[2];
  const auto add = [&](const char* bytes) {
    std::memcpy(chunk, bytes, 16);
    hash = fold(chunk[0] ^ hash, chunk[1] ^ 0x9E3779B97F4A7C15u);
  };
  for (std::size_t at = 0; at + 16 < size; at += 16) add(word + at);
  add(word + size - 16);
  return mix(hash, hash >> 32);
}

}  // namespace tinylm
