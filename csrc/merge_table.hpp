// Which pairs of tokens merge, as encoding asks: small, because what does not fit the processor's
// caches costs more than all else here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "pair_map.hpp"

namespace tinylm {

// `left` followed by `right` becomes `result`.
struct BpeMerge {
  TokenId left, right, result;
};

// A merge as rank << 32 | result, so that the least one is the next.
using RankedMerge = std::uint64_t;
constexpr RankedMerge kNoMerge = std::numeric_limits<RankedMerge>::max();
constexpr std::uint32_t rank_of(RankedMerge merge) {
  return static_cast<std::uint32_t>(merge >> 32);
}
constexpr TokenId result_of(RankedMerge merge) { return static_cast<TokenId>(merge); }

// A hash table of places in the list of merges, with open addressing, and before it a set of bits
// that tells of most absent pairs that they are.
class MergeTable {
 public:
  // Less than 2^32 merges. A merge's rank is its place in the list, or the id of its result. Of
  // merges of one pair the last counts. Linear.
  MergeTable(const std::vector<BpeMerge>& merges, bool ranks_are_ids)
      : merges_(merges), ranks_are_ids_(ranks_are_ids) {
    std::size_t slots = 64;
    while (slots < 2 * merges.size()) slots *= 2;
    slots_.resize(slots);
    filter_.resize(slots * kFilterBits / 64);
    for (std::size_t place = 0; place < merges.size(); ++place) {
      const std::uint64_t hashed = hash(merges[place].left, merges[place].right);
      std::size_t i = hashed & (slots - 1);
      while (slots_[i].place != kNone &&
             !is_of(slots_[i], merges[place].left, merges[place].right)) {
        i = (i + 1) & (slots - 1);
      }
      slots_[i] = {fingerprint(hashed), static_cast<std::uint32_t>(place)};
      const std::size_t bit = filter_bit(hashed);
      filter_[bit / 64] |= std::uint64_t{1} << bit % 64;
    }
  }

  // The merge of a pair, or kNoMerge. Constant time.
  RankedMerge find(TokenId left, TokenId right) const {
    const std::uint64_t hashed = hash(left, right);
    const std::size_t bit = filter_bit(hashed);
    if ((filter_[bit / 64] >> bit % 64 & 1) == 0) return kNoMerge;
    const std::size_t mask = slots_.size() - 1;
    for (std::size_t i = hashed & mask; slots_[i].place != kNone; i = (i + 1) & mask) {
      if (slots_[i].fingerprint != fingerprint(hashed) || !is_of(slots_[i], left, right)) continue;
      const TokenId result = merges_[slots_[i].place].result;
      return std::uint64_t{ranks_are_ids_ ? result : slots_[i].place} << 32 | result;
    }
    return kNoMerge;
  }

  // What a merge of this rank makes; there is one.
  TokenId result(std::uint32_t rank) const { return ranks_are_ids_ ? rank : merges_[rank].result; }

  // More than any rank.
  std::size_t ranks() const {
    std::size_t ranks = ranks_are_ids_ ? 0 : merges_.size();
    for (const BpeMerge& merge : merges_) {
      if (ranks_are_ids_ && merge.result >= ranks) ranks = std::size_t{merge.result} + 1;
    }
    return ranks;
  }

 private:
  static constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();
  static constexpr std::size_t kFilterBits = 8;  // for each slot: at least 16 for each merge

  struct Slot {
    std::uint32_t fingerprint = 0;
    std::uint32_t place = kNone;
  };

  static std::uint64_t hash(TokenId left, TokenId right) {
    const std::uint64_t mixed = pair_key(left, right) * 0x9E3779B97F4A7C15u;
    return (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93u;
  }
  // The slot comes from the low bits, the other two from high ones.
  static std::uint32_t fingerprint(std::uint64_t hashed) {
    return static_cast<std::uint32_t>(hashed >> 32);
  }
  std::size_t filter_bit(std::uint64_t hashed) const {
    return (hashed >> 24) & (filter_.size() * 64 - 1);
  }
  bool is_of(const Slot& slot, TokenId left, TokenId right) const {
    const BpeMerge& merge = merges_[slot.place];
    return merge.left == left && merge.right == right;
  }

  std::vector<BpeMerge> merges_;
  bool ranks_are_ids_;
  std::vector<Slot> slots_;
  std::vector<std::uint64_t> filter_;
};

}  // namespace tinylm
