// Pieces that have been merged before, and their ids. Text repeats its pieces: of 39 MB of English
// and code, one piece in forty is new. Both caches are bounded, and forget; one thread uses them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

#include "huge_pages.hpp"
#include "pair_map.hpp"

namespace tinylm {

// Where the bytes of a short piece are in two words, by how many there are.
struct ShortPieceMasks {
  std::uint64_t low[16] = {};
  std::uint64_t high[16] = {};
  int count_shift = 0;  // of the last byte
};

constexpr ShortPieceMasks make_short_piece_masks() {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  constexpr bool kIsLittleEndian = false;
#else
  constexpr bool kIsLittleEndian = true;
#endif
  ShortPieceMasks masks;
  masks.count_shift = kIsLittleEndian ? 56 : 0;
  for (std::size_t bytes = 0; bytes < 16; ++bytes) {
    for (std::size_t i = 0; i < bytes; ++i) {
      std::uint64_t& word = i < 8 ? masks.low[bytes] : masks.high[bytes];
      word |= std::uint64_t{0xFF} << 8 * (kIsLittleEndian ? i % 8 : 7 - i % 8);
    }
  }
  return masks;
}

inline constexpr ShortPieceMasks kShortPieceMasks = make_short_piece_masks();

// A piece of 1 to kMaxBytes bytes: the bytes, zeros, and in the last byte how many there are, so
// that no key is zero and equal keys are equal pieces.
struct ShortPiece {
  static constexpr std::size_t kMaxBytes = 15;
  static constexpr std::size_t kReadBytes = 16;

  // Reads kReadBytes from `begin` on.
  static ShortPiece read(const char* begin, std::size_t bytes) {
    std::uint64_t words[2];
    std::memcpy(words, begin, sizeof(words));
    return {words[0] & kShortPieceMasks.low[bytes],
            (words[1] & kShortPieceMasks.high[bytes]) | std::uint64_t{bytes}
                                                            << kShortPieceMasks.count_shift};
  }

  // Reads `bytes` only.
  static ShortPiece copy(const char* begin, std::size_t bytes) {
    char filled[kReadBytes] = {};
    std::memcpy(filled, begin, bytes);
    return read(filled, bytes);
  }

  bool operator==(const ShortPiece& other) const {
    return ((low ^ other.low) | (high ^ other.high)) == 0;
  }

  std::uint64_t hash() const {
    const std::uint64_t mixed = (low ^ high * 0x9E3779B97F4A7C15u) * 0xD6E8FEB86659FD93u;
    return mixed ^ mixed >> 32;
  }

  std::uint64_t low = 0;
  std::uint64_t high = 0;  // zero in no piece
};

// Ids of short pieces, where there are few. Two places for each piece, in one cache line. It grows
// up to a bound; then new pieces take the places of others.
template <class Id>
class ShortPieceCache {
 public:
  static constexpr std::size_t kMaxIds = 16 / sizeof(Id) - 1;

  struct Slot {
    ShortPiece piece;
    Id ids[kMaxIds];
    Id count;
  };

  // Has a piece's slot brought near while other work is done.
  void prefetch(std::uint64_t hash) const {
#if defined(__GNUC__) || defined(__clang__)
    __builtin_prefetch(&buckets_[index_of(hash)]);
#endif
  }

  // The slot of `piece`, whose hash is `hash`, or nullptr. Constant time.
  const Slot* find(const ShortPiece& piece, std::uint64_t hash) const {
    const std::size_t index = index_of(hash);
    const Bucket& bucket = buckets_[index];
    const bool is_first = bucket.slots[0].piece == piece;
    const bool is_second = bucket.slots[1].piece == piece;
    if (is_first | is_second) return &bucket.slots[is_second];
    return bucket.is_full() ? find_in(buckets_[index ^ 1], piece) : nullptr;
  }

  // Keeps `count` <= kMaxIds ids of a piece that is not there.
  void insert(const ShortPiece& piece, const Id* ids, std::size_t count) {
    if (size_ > buckets_.size() && buckets_.size() < kMaxBuckets) grow();
    Slot slot = {piece, {}, static_cast<Id>(count)};
    std::copy(ids, ids + count, slot.ids);
    put(slot);
  }

 private:
#ifdef TINYLM_FUZZING
  static constexpr std::size_t kMinBuckets = 2, kMaxBuckets = 8;  // so that they are full soon
#else
  static constexpr std::size_t kMinBuckets = std::size_t{1} << 10;  // 64 KiB
  static constexpr std::size_t kMaxBuckets = std::size_t{1} << 18;  // 16 MiB
#endif

  struct alignas(64) Bucket {
    Slot slots[2] = {};

    // The second slot is filled last.
    bool is_full() const { return slots[1].piece.high != 0; }
  };
  using Buckets = std::vector<Bucket, HugePageAllocator<Bucket>>;

  std::size_t index_of(std::uint64_t hash) const { return hash & (buckets_.size() - 1); }

  static const Slot* find_in(const Bucket& bucket, const ShortPiece& piece) {
    for (const Slot& slot : bucket.slots) {
      if (slot.piece == piece) return &slot;
    }
    return nullptr;
  }

  // In its bucket, or else the one beside it, which the processor tends to fetch with it. Pieces
  // that came early are common ones, so the last slot is the one that is given to another.
  void put(const Slot& slot) {
    const std::size_t index = index_of(slot.piece.hash());
    Bucket& bucket = buckets_[buckets_[index].is_full() ? index ^ 1 : index];
    size_ += !bucket.is_full();
    bucket.slots[bucket.slots[0].piece.high != 0] = slot;
  }

  void grow() {
    Buckets old(4 * buckets_.size());
    old.swap(buckets_);
    size_ = 0;
    for (const Bucket& bucket : old) {
      for (const Slot& slot : bucket.slots) {
        if (slot.piece.high != 0) put(slot);
      }
    }
  }

  Buckets buckets_ = Buckets(kMinBuckets);
  std::size_t size_ = 0;
};

// Ids of pieces that are too long or have too many ids for a ShortPieceCache. When it is full it is
// emptied.
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
  void insert(std::string_view piece, const TokenId* ids, std::size_t count) {
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
