// A hash table of distinct pieces of text and how often each was seen.
//
// Pieces of up to 15 bytes, nearly all of them, are their own keys (see short_key.hpp) and lie in
// slots of 24 bytes; longer ones are compared by a hash of 64 bits, then byte by byte. Both tables
// use open addressing with linear probing and are at most two thirds full: expected constant time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "memory.hpp"
#include "short_key.hpp"

namespace tinylm {

// A piece and its count; whoever gives one out says how long it is valid.
struct PieceCount {
  std::string_view piece;
  std::int64_t count;
};

class PieceTable {
 public:
  // How many distinct pieces there are.
  std::size_t size() const { return short_used_ + long_used_; }

  // Counts a piece of at least one byte.
  void add(std::string_view piece, std::int64_t count);

  // The same in two steps for pieces of up to kMaxShortKey bytes, so that many are on their way
  // from memory at once. Nothing may be added between the two calls but by `add_short`.
  void prefetch(std::uint64_t hash) const { tinylm::prefetch(&short_slots_[hash >> short_shift_]); }
  void add_short(ShortKey key, std::uint64_t hash, std::int64_t count);

  // The memory in use at worst while and after `pieces` more of `piece_bytes` in all are added.
  std::size_t bytes_with(std::size_t pieces, std::size_t piece_bytes) const;

  // Calls function(PieceCount) for every piece, in no particular order; each is valid until the
  // table changes.
  template <class Function>
  void for_each(Function&& function) const {
    for (const ShortSlot& slot : short_slots_) {
      if (!slot.is_empty()) function(PieceCount{piece_of(slot), slot.count});
    }
    for (const LongSlot& slot : long_slots_) {
      if (slot.count != 0) function(PieceCount{piece_of(slot), slot.count});
    }
  }

 private:
  static constexpr int kMinShift = 64 - 8;
  static constexpr std::size_t kMinSlots = std::size_t{1} << (64 - kMinShift);

  struct ShortSlot {
    ShortKey key{0, 0};
    std::int64_t count = 0;
    // The last byte of a key is its length.
    bool is_empty() const { return key.high == 0; }
  };
  struct LongSlot {
    std::uint64_t hash = 0;
    std::size_t begin = 0, size = 0;  // in long_text_
    std::int64_t count = 0;           // 0: empty
  };

  static std::string_view piece_of(const ShortSlot& slot) {
    const char* const bytes = reinterpret_cast<const char*>(&slot.key);
    return {bytes, size_of(slot.key)};
  }
  std::string_view piece_of(const LongSlot& slot) const {
    return {long_text_.data() + slot.begin, slot.size};
  }

  void add_long(std::string_view piece, std::int64_t count);
  void grow_short();
  void grow_long();

  std::vector<ShortSlot> short_slots_ = std::vector<ShortSlot>(kMinSlots);
  std::vector<LongSlot> long_slots_ = std::vector<LongSlot>(kMinSlots);
  std::string long_text_;
  int short_shift_ = kMinShift, long_shift_ = kMinShift;  // the table has 2^(64 - shift) slots
  std::size_t short_used_ = 0, long_used_ = 0;
};

}  // namespace tinylm
