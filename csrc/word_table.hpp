// A hash table from words to small values, made for lookups of mostly short words.
//
// Words of up to 15 bytes are their own keys (see short_key.hpp). Longer words are compared by a
// 64-bit hash, then byte by byte. Both tables use open addressing with linear probing and are at
// most half full: expected constant time. Slots are in the order of the hashes, so one table is
// added to another, or doubled, from end to end. Nothing that is given out depends on that order.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "short_key.hpp"
#include "slot_array.hpp"
#include "word_text.hpp"

namespace tinylm {

// A table starts with 2^kFirstSlotBits slots. Short inputs are to reach all the code.
#ifdef TINYLM_FUZZING
constexpr int kFirstSlotBits = 1;
constexpr std::size_t kArenaChunk = 64;
#else
constexpr int kFirstSlotBits = 10;
constexpr std::size_t kArenaChunk = 1 << 18;
#endif

// Texts that stay where they are put.
class TextArena {
 public:
  const char* add(const char* text, std::size_t size) {
    if (size > left_) {
      const std::size_t chunk = std::max(size, kArenaChunk);
      chunks_.push_back(std::unique_ptr<char[]>(new char[chunk]));
      free_ = chunks_.back().get();
      left_ = chunk;
    }
    char* const place = free_;
    std::memcpy(place, text, size);
    free_ += size;
    left_ -= size;
    return place;
  }

 private:
  std::vector<std::unique_ptr<char[]>> chunks_;
  char* free_ = nullptr;
  std::size_t left_ = 0;
};

// Value is trivial, and all zero for words that are not there.
template <class Value>
class WordTable {
 public:
  void prefetch_short(std::uint64_t hash) const { prefetch(&short_.at(hash)); }
  void prefetch_long(std::uint64_t hash) const { prefetch(&long_.at(hash)); }

  // The first slot settles nearly every word, known or not, without a branch between the two.
  Value find_short(ShortKey key, std::uint64_t hash) const {
    const ShortSlot& slot = short_.at(hash);
    const bool found = ((slot.key.low ^ key.low) | (slot.key.high ^ key.high)) == 0;
    if (!found && !slot.is_free()) return short_.find(hash, is_key(key)).value;
    return found ? slot.value : Value{};
  }

  Value find_long(const char* word, std::size_t size, std::uint64_t hash) const {
    return long_.find(hash, is_word(word, size, hash)).value;
  }

  // The value of the word, for changing; valid until the next call.
  Value& find_or_add_short(ShortKey key, std::uint64_t hash) {
    ShortSlot* slot = &short_.find(hash, is_key(key));
    if (slot->is_free()) {
      slot = &short_.add(slot, hash, is_key(key));
      slot->key = key;
    }
    return slot->value;
  }

  Value& find_or_add_long(const char* word, std::size_t size, std::uint64_t hash) {
    LongSlot* slot = &long_.find(hash, is_word(word, size, hash));
    if (slot->is_free()) {
      const char* const text = texts_.add(word, size);
      slot = &long_.add(slot, hash, is_word(word, size, hash));
      slot->text = text;
      slot->size = static_cast<std::uint32_t>(size);
      slot->top_of_hash = static_cast<std::uint32_t>(hash >> 32);
    }
    return slot->value;
  }

  // Calls visit(word, size, value) for every word.
  template <class Visit>
  void for_each(Visit&& visit) const {
    for (const ShortSlot& slot : short_.slots) {
      if (!slot.is_free()) {
        visit(reinterpret_cast<const char*>(&slot.key), size_of(slot.key), slot.value);
      }
    }
    for (const LongSlot& slot : long_.slots) {
      if (!slot.is_free()) visit(slot.text, slot.size, slot.value);
    }
  }

  // Calls merge(value here, value there) for every word of `other`, which is added where need be.
  template <class Merge>
  void merge(const WordTable& other, Merge&& merge) {
    for (const ShortSlot& slot : other.short_.slots) {
      if (!slot.is_free()) merge(find_or_add_short(slot.key, slot.hash()), slot.value);
    }
    for (const LongSlot& slot : other.long_.slots) {
      if (slot.is_free()) continue;
      merge(find_or_add_long(slot.text, slot.size, slot.hash()), slot.value);
    }
  }

 private:
  struct ShortSlot {
    ShortKey key;
    Value value;
    bool is_free() const { return key.high == 0; }
    std::uint64_t hash() const { return key_hash(key); }
  };
  struct LongSlot {
    const char* text;
    std::uint32_t size;         // no word has 2^32 bytes
    std::uint32_t top_of_hash;  // more slots than these bits can tell apart would take 100 GB
    Value value;
    bool is_free() const { return size == 0; }
    std::uint64_t hash() const { return static_cast<std::uint64_t>(top_of_hash) << 32; }
  };

  template <class Slot>
  struct Slots {
    SlotArray<Slot> slots{std::size_t{1} << kFirstSlotBits};
    int shift = 64 - kFirstSlotBits;  // there are 2^(64 - shift) slots
    std::size_t count = 0;

    const Slot& at(std::uint64_t hash) const { return slots[hash >> shift]; }

    // The slot for which `is_it`, or the free one where it belongs.
    template <class IsIt>
    Slot& find(std::uint64_t hash, IsIt is_it) {
      for (std::size_t i = hash >> shift;; i = (i + 1) & (slots.size() - 1)) {
        if (is_it(slots[i]) || slots[i].is_free()) return slots[i];
      }
    }
    template <class IsIt>
    const Slot& find(std::uint64_t hash, IsIt is_it) const {
      return const_cast<Slots*>(this)->find(hash, is_it);
    }

    // Takes the free slot that `find` gave, or its like in a larger table.
    template <class IsIt>
    Slot& add(Slot* free, std::uint64_t hash, IsIt is_it) {
      if ((count + 1) * 2 > slots.size()) {
        grow();
        free = &find(hash, is_it);
      }
      ++count;
      return *free;
    }

    void grow() {
      SlotArray<Slot> larger(slots.size() * 2);
      --shift;
      for (const Slot& slot : slots) {
        if (slot.is_free()) continue;
        std::size_t i = slot.hash() >> shift;
        while (!larger[i].is_free()) i = (i + 1) & (larger.size() - 1);
        larger[i] = slot;
      }
      slots = std::move(larger);
    }
  };

  static auto is_key(ShortKey key) {
    return [key](const ShortSlot& slot) {
      return ((slot.key.low ^ key.low) | (slot.key.high ^ key.high)) == 0;
    };
  }
  static auto is_word(const char* word, std::size_t size, std::uint64_t hash) {
    return [word, size, top = static_cast<std::uint32_t>(hash >> 32)](const LongSlot& slot) {
      return slot.top_of_hash == top && slot.size == size &&
             std::memcmp(slot.text, word, size) == 0;
    };
  }

  Slots<ShortSlot> short_;
  Slots<LongSlot> long_;
  TextArena texts_;
};

// Calls on_short(i, key, hash) or on_long(i, word, size, hash) for word i, for all of them, but not
// in order. Works ahead by a batch: keys and hashes are made and words sorted into short and long
// without a branch, and slots are on the way from memory before the first is needed.
template <class Value, class OnShort, class OnLong>
void look_up_all(const Words& words, const WordTable<Value>& table, OnShort&& on_short,
                 OnLong&& on_long) {
  constexpr std::size_t kBatch = 64;
  ShortKey keys[kBatch];
  std::uint64_t hashes[kBatch];
  std::uint8_t short_words[kBatch], long_words[kBatch];
  for (std::size_t first = 0; first < words.count; first += kBatch) {
    const std::uint32_t* bounds = words.bounds + 2 * first;
    const std::size_t count = std::min(kBatch, words.count - first);
    std::size_t shorts = 0, longs = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t size = bounds[2 * i + 1] - bounds[2 * i];
      keys[i] = short_key(words.text + bounds[2 * i], std::min(size, kMaxShortKey));
      hashes[i] = key_hash(keys[i]);
      table.prefetch_short(hashes[i]);
      short_words[shorts] = long_words[longs] = static_cast<std::uint8_t>(i);
      shorts += size <= kMaxShortKey;
      longs += size > kMaxShortKey;
    }
    const auto size_of_long = [&](std::size_t i) { return bounds[2 * i + 1] - bounds[2 * i]; };
    for (std::size_t l = 0; l < longs; ++l) {
      const std::size_t i = long_words[l];
      hashes[i] = long_hash(words.text + bounds[2 * i], size_of_long(i));
      table.prefetch_long(hashes[i]);
    }
    for (std::size_t s = 0; s < shorts; ++s) {
      const std::size_t i = short_words[s];
      on_short(first + i, keys[i], hashes[i]);
    }
    for (std::size_t l = 0; l < longs; ++l) {
      const std::size_t i = long_words[l];
      on_long(first + i, words.text + bounds[2 * i], size_of_long(i), hashes[i]);
    }
  }
}

}  // namespace tinylm
