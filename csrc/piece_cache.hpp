// Pieces that have been merged before, and their ids. Text repeats its pieces: of 39 MB of English
// and code, one piece in forty is new. All caches are bounded, and forget; one thread uses them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

#include "memory.hpp"
#include "pair_map.hpp"
#include "short_key.hpp"

namespace tinylm {

// Ids of pieces that fit a key, ShortKey or MiddleKey, where there are few: the ids of a piece take
// as much room as its key. Two places for each piece, side by side. It grows up to a bound; then
// new pieces take the places of others.
template <class Key, class Id>
class KeyedPieceCache {
 public:
  static constexpr std::size_t kMaxIds = sizeof(Key) / sizeof(Id) - 1;

  struct Slot {
    Key key;
    Id ids[kMaxIds];
    Id count;
  };

  // Has a piece's slots brought near while other work is done.
  void prefetch(std::uint64_t hash) const {
    const Bucket& bucket = buckets_[index_of(hash)];
    tinylm::prefetch(&bucket.slots[0]);
    if constexpr (sizeof(Bucket) > kLineBytes) tinylm::prefetch(&bucket.slots[1]);
  }

  // The slot of a piece with this key, whose hash is `hash`, or nullptr. Constant time.
  const Slot* find(const Key& key, std::uint64_t hash) const {
    const std::size_t index = index_of(hash);
    const Bucket& bucket = buckets_[index];
    const bool is_first = bucket.slots[0].key == key;
    const bool is_second = bucket.slots[1].key == key;
    if (is_first | is_second) return &bucket.slots[is_second];
    return bucket.is_full() ? find_in(buckets_[index ^ 1], key) : nullptr;
  }

  // Keeps `count` <= kMaxIds ids of a piece that is not there.
  void insert(const Key& key, const Id* ids, std::size_t count) {
    if (size_ > buckets_.size() && bits_ < kMaxBits) grow();
    Slot slot = {key, {}, static_cast<Id>(count)};
    std::copy(ids, ids + count, slot.ids);
    put(slot);
  }

 private:
#ifdef TINYLM_FUZZING
  static constexpr int kMinBits = 1, kMaxBits = 3;  // so that it is full soon
#else
  // Of the number of buckets: for short keys 64 KiB to 16 MiB, for middle ones 32 KiB to 8 MiB.
  static constexpr int kMinBits = sizeof(Key) == sizeof(ShortKey) ? 10 : 8, kMaxBits = kMinBits + 8;
#endif
  static constexpr std::size_t kLineBytes = 64;
  static constexpr int kGrowthBits = 2;

  struct alignas(kLineBytes) Bucket {
    Slot slots[2] = {};

    // The second slot is filled last.
    bool is_full() const { return !slots[1].key.is_empty(); }
  };
  using Buckets = std::vector<Bucket, HugePageAllocator<Bucket>>;

  std::size_t index_of(std::uint64_t hash) const { return hash >> (64 - bits_); }

  static const Slot* find_in(const Bucket& bucket, const Key& key) {
    for (const Slot& slot : bucket.slots) {
      if (slot.key == key) return &slot;
    }
    return nullptr;
  }

  // In its bucket, or else the one beside it, which the processor tends to fetch with it. Pieces
  // that came early are common ones, so the last slot is the one that is given to another.
  void put(const Slot& slot) {
    const std::size_t index = index_of(key_hash(slot.key));
    Bucket& bucket = buckets_[buckets_[index].is_full() ? index ^ 1 : index];
    size_ += !bucket.is_full();
    bucket.slots[!bucket.slots[0].key.is_empty()] = slot;
  }

  void grow() {
    bits_ += kGrowthBits;
    Buckets old(std::size_t{1} << bits_);
    old.swap(buckets_);
    size_ = 0;
    for (const Bucket& bucket : old) {
      for (const Slot& slot : bucket.slots) {
        if (!slot.key.is_empty()) put(slot);
      }
    }
  }

  int bits_ = kMinBits;
  Buckets buckets_ = Buckets(std::size_t{1} << kMinBits);
  std::size_t size_ = 0;
};

template <class Id>
using ShortPieceCache = KeyedPieceCache<ShortKey, Id>;
template <class Id>
using MiddlePieceCache = KeyedPieceCache<MiddleKey, Id>;

// Ids of pieces that are too long or have too many ids for those. When it is full it is emptied.
class LongPieceCache {
 public:
  static constexpr std::size_t kMaxBytes = 256;

  // The ids of `piece` as [first, second), or two nullptr; valid until the next `insert`. Time in
  // proportion to the piece.
  std::pair<const TokenId*, const TokenId*> find(std::string_view piece) const {
    const Entry& entry = entries_[index_of(piece, hash(piece))];
    if (entry.bytes == 0) return {nullptr, nullptr};
    const TokenId* const first = ids_.data() + entry.first_id;
    return {first, first + entry.ids};
  }

  // Keeps `count` ids of a piece that is not there and has 1 to kMaxBytes bytes.
  template <class Id>
  void insert(std::string_view piece, const Id* ids, std::size_t count) {
    if (size_ == kMaxEntries) *this = LongPieceCache();
    if (2 * (size_ + 1) > entries_.size()) grow();
    const std::uint64_t hashed = hash(piece);
    entries_[index_of(piece, hashed)] = {
        hashed, static_cast<std::uint32_t>(text_.size()), static_cast<std::uint32_t>(ids_.size()),
        static_cast<std::uint32_t>(piece.size()), static_cast<std::uint32_t>(count)};
    text_.insert(text_.end(), piece.begin(), piece.end());
    ids_.insert(ids_.end(), ids, ids + count);
    ++size_;
  }

 private:
#ifdef TINYLM_FUZZING
  static constexpr std::size_t kMinSlots = 4, kMaxEntries = 8;
#else
  static constexpr std::size_t kMinSlots = 1024;
  static constexpr std::size_t kMaxEntries = std::size_t{1} << 16;  // 80 MB at the very most
#endif

  struct Entry {
    std::uint64_t hash;
    std::uint32_t first_byte, first_id;
    std::uint32_t bytes;  // 0: empty
    std::uint32_t ids;
  };

  static std::uint64_t hash(std::string_view piece) {
    std::uint64_t mixed = piece.size();
    const auto mix = [&mixed](std::uint64_t word) {
      mixed = (mixed ^ word) * 0x9E3779B97F4A7C15u;
      mixed ^= mixed >> 32;
    };
    const char* at = piece.data();
    std::size_t left = piece.size();
    for (; left >= 8; at += 8, left -= 8) {
      std::uint64_t word;
      std::memcpy(&word, at, sizeof(word));
      mix(word);
    }
    std::uint64_t word = 0;
    std::memcpy(&word, at, left);
    mix(word);
    return mixed;
  }

  // Where the piece is, or the empty entry where it belongs.
  std::size_t index_of(std::string_view piece, std::uint64_t hashed) const {
    const std::size_t mask = entries_.size() - 1;
    std::size_t i = hashed & mask;
    while (entries_[i].bytes != 0 && !is_entry_of(entries_[i], piece, hashed)) i = (i + 1) & mask;
    return i;
  }

  bool is_entry_of(const Entry& entry, std::string_view piece, std::uint64_t hashed) const {
    return entry.hash == hashed && entry.bytes == piece.size() &&
           std::memcmp(text_.data() + entry.first_byte, piece.data(), piece.size()) == 0;
  }

  void grow() {
    std::vector<Entry> old(2 * entries_.size());
    old.swap(entries_);
    const std::size_t mask = entries_.size() - 1;
    for (const Entry& entry : old) {
      if (entry.bytes == 0) continue;
      std::size_t i = entry.hash & mask;
      while (entries_[i].bytes != 0) i = (i + 1) & mask;
      entries_[i] = entry;
    }
  }

  std::vector<Entry> entries_ = std::vector<Entry>(kMinSlots);
  std::size_t size_ = 0;
  std::vector<char> text_;
  std::vector<TokenId> ids_;
};

}  // namespace tinylm
