// A hash table from words to 32-bit numbers, made for lookups of mostly short words.
//
// Words of up to 15 bytes are their own keys: 16 bytes, zero-padded, the length in the last one, so
// that "a" and "a\0" differ and no key is all zero. They are compared in registers. Longer words
// are compared by a 64-bit hash, then byte by byte. Both tables use open addressing with linear
// probing and are at most half full: expected constant time. Nothing depends on the order of the
// slots.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "word_text.hpp"

namespace tinylm {

constexpr std::size_t kMaxShortWord = 15;

struct ShortKey {
  std::uint64_t low, high;
};

struct ShortKeyMasks {
  std::array<ShortKey, kMaxShortWord + 1> keep{}, length{};
  ShortKeyMasks() {
    for (std::size_t n = 0; n <= kMaxShortWord; ++n) {
      unsigned char bytes[16] = {};
      std::memset(bytes, 0xFF, n);
      std::memcpy(&keep[n], bytes, 16);
      std::memset(bytes, 0, 16);
      bytes[15] = static_cast<unsigned char>(n);
      std::memcpy(&length[n], bytes, 16);
    }
  }
};
inline const ShortKeyMasks kShortKeyMasks;

// Needs kReadAhead readable bytes at `word`.
inline ShortKey short_key(const char* word, std::size_t size) {
  ShortKey key;
  std::memcpy(&key, word, sizeof key);
  const ShortKey &keep = kShortKeyMasks.keep[size], &length = kShortKeyMasks.length[size];
  return {(key.low & keep.low) | length.low, (key.high & keep.high) | length.high};
}

inline std::uint64_t mix(std::uint64_t low, std::uint64_t high) {
  std::uint64_t hash = low * 0x9E3779B97F4A7C15u ^ (high * 0xC2B2AE3D27D4EB4Fu + (high >> 29));
  hash ^= hash >> 32;
  hash *= 0xD6E8FEB86659FD93u;
  return hash ^ hash >> 32;
}

inline std::uint64_t short_hash(ShortKey key) { return mix(key.low, key.high); }

// Of a word of at least 8 bytes.
inline std::uint64_t long_hash(const char* word, std::size_t size) {
  std::uint64_t hash = size, chunk;
  for (std::size_t at = 0; at + 8 < size; at += 8) {
    std::memcpy(&chunk, word + at, 8);
    hash = mix(hash, chunk);
  }
  std::memcpy(&chunk, word + size - 8, 8);
  return mix(hash, chunk);
}

class WordMap {
 public:
  static constexpr std::uint32_t kNone = 0xFFFFFFFF;  // the value of words that are not there

  WordMap() : short_slots_(kMinSlots), long_slots_(kMinSlots) {}

  // Fetches the slot of a short word that will be looked up soon.
  void prefetch(std::uint64_t hash) const {
#if defined(__GNUC__)
    __builtin_prefetch(&short_slots_[hash & (short_slots_.size() - 1)]);
#else
    (void)hash;
#endif
  }

  std::uint32_t find_short(ShortKey key, std::uint64_t hash) const {
    return short_slots_[short_slot(short_slots_, key, hash)].value;
  }

  std::uint32_t find_long(const char* word, std::size_t size) const {
    return long_slots_[long_slot(long_slots_, word, size, long_hash(word, size))].value;
  }

  // The value of the word, which becomes `fresh` if the word was not there.
  std::uint32_t find_or_add_short(ShortKey key, std::uint64_t hash, std::uint32_t fresh) {
    ShortSlot& slot = short_slots_[short_slot(short_slots_, key, hash)];
    if (slot.value != kNone) return slot.value;
    slot = {key, fresh};
    if (++short_count_ * 2 > short_slots_.size()) grow_short();
    return fresh;
  }

  std::uint32_t find_or_add_long(const char* word, std::size_t size, std::uint32_t fresh) {
    const std::uint64_t hash = long_hash(word, size);
    LongSlot& slot = long_slots_[long_slot(long_slots_, word, size, hash)];
    if (slot.value != kNone) return slot.value;
    slot = {hash, long_text_.size(), size, fresh};
    long_text_.insert(long_text_.end(), word, word + size);
    if (++long_count_ * 2 > long_slots_.size()) grow_long();
    return fresh;
  }

 private:
  static constexpr std::size_t kMinSlots = 64;  // a power of two, as every size

  struct ShortSlot {
    ShortKey key{0, 0};
    std::uint32_t value = kNone;
  };
  struct LongSlot {
    std::uint64_t hash = 0;
    std::size_t begin = 0, size = 0;  // in long_text_
    std::uint32_t value = kNone;
  };

  // The slot that holds the key, or the empty one where it belongs.
  static std::size_t short_slot(const std::vector<ShortSlot>& slots, ShortKey key,
                                std::uint64_t hash) {
    for (std::size_t at = hash;; ++at) {
      at &= slots.size() - 1;
      const ShortSlot& slot = slots[at];
      if (((slot.key.low ^ key.low) | (slot.key.high ^ key.high)) == 0) return at;
      if (slot.value == kNone) return at;
    }
  }

  std::size_t long_slot(const std::vector<LongSlot>& slots, const char* word, std::size_t size,
                        std::uint64_t hash) const {
    for (std::size_t at = hash;; ++at) {
      at &= slots.size() - 1;
      const LongSlot& slot = slots[at];
      if (slot.value == kNone) return at;
      if (slot.hash == hash && slot.size == size &&
          std::memcmp(long_text_.data() + slot.begin, word, size) == 0) {
        return at;
      }
    }
  }

  void grow_short() {
    std::vector<ShortSlot> larger(short_slots_.size() * 4);
    for (const ShortSlot& slot : short_slots_) {
      if (slot.value != kNone) larger[short_slot(larger, slot.key, short_hash(slot.key))] = slot;
    }
    short_slots_.swap(larger);
  }

  void grow_long() {
    std::vector<LongSlot> larger(long_slots_.size() * 4);
    for (const LongSlot& slot : long_slots_) {
      if (slot.value == kNone) continue;
      larger[long_slot(larger, long_text_.data() + slot.begin, slot.size, slot.hash)] = slot;
    }
    long_slots_.swap(larger);
  }

  std::vector<ShortSlot> short_slots_;
  std::vector<LongSlot> long_slots_;
  std::vector<char> long_text_;
  std::size_t short_count_ = 0, long_count_ = 0;
};

}  // namespace tinylm
