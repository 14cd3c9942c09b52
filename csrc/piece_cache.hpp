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

// The ids of a piece in 16 bytes: themselves where they are few, else how many they are and where
// in a list they begin. The last word has the number of ids in it, behind an id if that is short.
template <class Id>
class PackedIds {
 public:
  static constexpr bool kIsNarrow = sizeof(Id) == sizeof(std::uint16_t);
  static constexpr int kIdBits = kIsNarrow ? 16 : 26;
  static constexpr std::size_t kWords = 16 / sizeof(Id);
  static constexpr std::size_t kMaxIds = kIsNarrow ? kWords - 1 : kWords;

  PackedIds() = default;
  // `count` <= kMaxIds ids.
  PackedIds(const Id* ids, std::size_t count) {
    std::copy(ids, ids + count, words_);
    set_count(count);
  }
  // More of them, from number `place` of a list on.
  PackedIds(std::uint32_t place, std::size_t count) {
    std::memcpy(words_, &place, sizeof(place));
    set_count(count);
  }

  std::size_t count() const { return words_[kWords - 1] >> kCountShift; }
  std::uint32_t place() const {
    std::uint32_t place;
    std::memcpy(&place, words_, sizeof(place));
    return place;
  }

  // Writes kWords words, the first of which are the ids if there are no more than kMaxIds. That is
  // quicker than to write as many as there are.
  void copy_to(Id* out) const {
    Id words[kWords];
    std::memcpy(words, words_, sizeof(words));
    if constexpr (!kIsNarrow) words[kWords - 1] &= (Id{1} << kCountShift) - 1;
    std::memcpy(out, words, sizeof(words));
  }

 private:
  static constexpr int kCountShift = kIsNarrow ? 0 : kIdBits;

  void set_count(std::size_t count) {
    words_[kWords - 1] = static_cast<Id>(words_[kWords - 1] | count << kCountShift);
  }

  Id words_[kWords] = {};
};

// Ids of pieces that fit a key, ShortKey or MiddleKey. Two places for each piece, side by side. It
// grows up to a bound; then new pieces take the places of others.
template <class Key, class Id>
class KeyedPieceCache {
 public:
  struct alignas(2 * sizeof(Key)) Slot {
    Key key;
    PackedIds<Id> ids;
  };

  // Where slots are, until the next insert: what a loop over pieces keeps in registers.
  class View {
   public:
    explicit View(const KeyedPieceCache& cache)
        : slots_(cache.buckets_[0].slots), shift_(64 - cache.bits_) {}

    // Has a piece's slots brought near while other work is done.
    void prefetch(std::uint64_t hash) const {
      tinylm::prefetch(slots_of(hash));
      if constexpr (sizeof(Bucket) > kLineBytes) tinylm::prefetch(slots_of(hash) + 1);
    }

    // Where most pieces that are there are found: the slot that has the key, or any other.
    const Slot& likely_slot(const Key& key, std::uint64_t hash) const {
      const Slot* const slots = slots_of(hash);
      return slots[slots[1].key == key];
    }

   private:
    const Slot* slots_of(std::uint64_t hash) const { return slots_ + 2 * (hash >> shift_); }

    const Slot* slots_;
    int shift_;
  };

  // The ids of a piece with this key, whose hash is `hash`, or nullptr. Constant time.
  const PackedIds<Id>* find(const Key& key, std::uint64_t hash) const {
    const std::size_t index = index_of(hash);
    for (const Bucket* bucket : {&buckets_[index], &buckets_[index ^ 1]}) {
      for (const Slot& slot : bucket->slots) {
        if (slot.key == key) return &slot.ids;
      }
      if (!bucket->is_full()) break;
    }
    return nullptr;
  }

  // Keeps the ids of a piece that is not there.
  void insert(const Key& key, const PackedIds<Id>& ids) {
    if (size_ > buckets_.size() && bits_ < kMaxBits) grow();
    put({key, ids});
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

// The caches of pieces of up to kMaxMiddleKey bytes, and the list of ids that are too many for
// them.
template <class Id>
class PieceCaches {
 public:
  using Shorts = KeyedPieceCache<ShortKey, Id>;
  using Middles = KeyedPieceCache<MiddleKey, Id>;

  const Shorts& shorts() const { return shorts_; }
  const Middles& middles() const { return middles_; }

  // Writes the ids of a piece that a cache has, and returns their end.
  Id* copy(const PackedIds<Id>& ids, Id* out) const {
    const std::size_t count = ids.count();
    if (count <= PackedIds<Id>::kMaxIds) {
      ids.copy_to(out);
      return out + count;
    }
    return std::copy_n(many_ids_.data() + ids.place(), count, out);
  }

  // Keeps the ids of a piece that is not there. Whatever was known of either cache's slots is void.
  void insert(const ShortKey& key, const Id* ids, std::size_t count) {
    const PackedIds<Id> packed = pack(ids, count);
    shorts_.insert(key, packed);
  }
  void insert(const MiddleKey& key, const Id* ids, std::size_t count) {
    const PackedIds<Id> packed = pack(ids, count);
    middles_.insert(key, packed);
  }

 private:
#ifdef TINYLM_FUZZING
  static constexpr std::size_t kMaxManyIds = 64;
#else
  static constexpr std::size_t kMaxManyIds = std::size_t{1} << 20;
#endif

  // Starts anew where the list would become too long.
  PackedIds<Id> pack(const Id* ids, std::size_t count) {
    if (count <= PackedIds<Id>::kMaxIds) return {ids, count};
    if (many_ids_.size() + count > kMaxManyIds) *this = PieceCaches();
    const auto place = static_cast<std::uint32_t>(many_ids_.size());
    many_ids_.insert(many_ids_.end(), ids, ids + count);
    return {place, count};
  }

  Shorts shorts_;
  Middles middles_;
  std::vector<Id> many_ids_;
};

// Ids of pieces that are too long for those. When it is full it is emptied.
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
