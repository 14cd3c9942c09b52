// A hash table from words to 32-bit numbers, made for lookups of mostly short words.
//
// Words of up to 15 bytes are their own keys: 16 bytes, zero-padded, the length in the last one, so
// that "a" and "a\0" differ and no key is all zero. They are compared in registers. Longer words
// are compared by a 64-bit hash, then byte by byte. Both tables use open addressing with linear
// probing and are at most half full: expected constant time. Nothing depends on the order of the
// slots.
#pragma once

#include <algorithm>
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

// Every bit of the key reaches the top bits, which are the ones to use.
inline std::uint64_t mix(std::uint64_t low, std::uint64_t high) {
  return (low ^ high * 0xC2B2AE3D27D4EB4Fu) * 0x9E3779B97F4A7C15u;
}

inline std::uint64_t short_hash(ShortKey key) { return mix(key.low, key.high); }

// Of a word of at least 8 bytes.
inline std::uint64_t long_hash(const char* word, std::size_t size) {
  std::uint64_t hash = size, chunk;
  for (std::size_t at = 0; at + 8 < size; at += 8) {
    std::memcpy(&chunk, word + at, 8);
    hash = mix(chunk, hash >> 32 ^ hash);
  }
  std::memcpy(&chunk, word + size - 8, 8);
  return mix(chunk, hash >> 32 ^ hash);
}

class WordMap {
 public:
  static constexpr std::uint32_t kNone = 0xFFFFFFFF;  // the value of words that are not there

  WordMap() : short_slots_(kMinSlots), long_slots_(kMinSlots) {}

  // Fetches the slot of a short word that will be looked up soon.
  void prefetch(std::uint64_t hash) const {
#if defined(__GNUC__)
    __builtin_prefetch(&short_slots_[hash >> short_shift_]);
#else
    (void)hash;
#endif
  }

  std::uint32_t find_short(ShortKey key, std::uint64_t hash) const {
    return short_slots_[short_slot(short_slots_, short_shift_, key, hash)].value;
  }

  std::uint32_t find_long(const char* word, std::size_t size) const {
    const std::uint64_t hash = long_hash(word, size);
    return long_slots_[long_slot(long_slots_, long_shift_, word, size, hash)].value;
  }

  // The value of the word, which becomes `fresh` if the word was not there.
  std::uint32_t find_or_add_short(ShortKey key, std::uint64_t hash, std::uint32_t fresh) {
    ShortSlot& slot = short_slots_[short_slot(short_slots_, short_shift_, key, hash)];
    if (slot.value != kNone) return slot.value;
    slot = {key, fresh};
    if (++short_count_ * 2 > short_slots_.size()) grow_short();
    return fresh;
  }

  std::uint32_t find_or_add_long(const char* word, std::size_t size, std::uint32_t fresh) {
    const std::uint64_t hash = long_hash(word, size);
    LongSlot& slot = long_slots_[long_slot(long_slots_, long_shift_, word, size, hash)];
    if (slot.value != kNone) return slot.value;
    slot = {hash, long_text_.size(), size, fresh};
    long_text_.insert(long_text_.end(), word, word + size);
    if (++long_count_ * 2 > long_slots_.size()) grow_long();
    return fresh;
  }

 private:
  static constexpr int kMinShift = 64 - 10;
  static constexpr std::size_t kMinSlots = std::size_t{1} << (64 - kMinShift);

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
  static std::size_t short_slot(const std::vector<ShortSlot>& slots, int shift, ShortKey key,
                                std::uint64_t hash) {
    for (std::size_t at = hash >> shift;; at = (at + 1) & (slots.size() - 1)) {
      const ShortSlot& slot = slots[at];
      if (((slot.key.low ^ key.low) | (slot.key.high ^ key.high)) == 0) return at;
      if (slot.value == kNone) return at;
    }
  }

  std::size_t long_slot(const std::vector<LongSlot>& slots, int shift, const char* word,
                        std::size_t size, std::uint64_t hash) const {
    for (std::size_t at = hash >> shift;; at = (at + 1) & (slots.size() - 1)) {
      const LongSlot& slot = slots[at];
      if (slot.value == kNone) return at;
      if (slot.hash == hash && slot.size == size &&
          std::memcmp(long_text_.data() + slot.begin, word, size) == 0) {
        return at;
      }
    }
  }

  void grow_short() {
    std::vector<ShortSlot> larger(short_slots_.size() * 2);
    --short_shift_;
    for (const ShortSlot& slot : short_slots_) {
      if (slot.value != kNone)
        larger[short_slot(larger, short_shift_, slot.key, short_hash(slot.key))] = slot;
    }
    short_slots_.swap(larger);
  }

  void grow_long() {
    std::vector<LongSlot> larger(long_slots_.size() * 2);
    --long_shift_;
    for (const LongSlot& slot : long_slots_) {
      if (slot.value == kNone) continue;
      larger[long_slot(larger, long_shift_, long_text_.data() + slot.begin, slot.size, slot.hash)] =
          slot;
    }
    long_slots_.swap(larger);
  }

  std::vector<ShortSlot> short_slots_;
  std::vector<LongSlot> long_slots_;
  std::vector<char> long_text_;
  int short_shift_ = kMinShift, long_shift_ = kMinShift;  // the table has 2^(64 - shift) slots
  std::size_t short_count_ = 0, long_count_ = 0;
};

// Calls visit(word, size, key, hash) for all words in order; key and hash are those of short words
// only. Works ahead by a batch: its keys and hashes are made without a branch, and their slots are
// on the way from memory before the first is needed.
template <class Visit>
void look_up_all(const Words& words, const WordMap& map, Visit&& visit) {
  constexpr std::size_t kBatch = 64;
  ShortKey keys[kBatch];
  std::uint64_t hashes[kBatch];
  for (std::size_t first = 0; first < words.count; first += kBatch) {
    const std::uint32_t* bounds = words.bounds + 2 * first;
    const std::size_t count = std::min(kBatch, words.count - first);
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t size = bounds[2 * i + 1] - bounds[2 * i];
      keys[i] = short_key(words.text + bounds[2 * i], std::min(size, kMaxShortWord));
      hashes[i] = short_hash(keys[i]);
      map.prefetch(hashes[i]);
    }
    for (std::size_t i = 0; i < count; ++i) {
      visit(words.text + bounds[2 * i], bounds[2 * i + 1] - bounds[2 * i], keys[i], hashes[i]);
    }
  }
}

}  // namespace tinylm
