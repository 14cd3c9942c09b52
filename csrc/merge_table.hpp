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
constexpr std::uint32_t kNoRank = std::numeric_limits<std::uint32_t>::max();
constexpr std::uint32_t rank_of(RankedMerge merge) {
  return static_cast<std::uint32_t>(merge >> 32);
}
constexpr TokenId result_of(RankedMerge merge) { return static_cast<TokenId>(merge); }

// A hash table with open addressing, four slots to a cache line, and before it a set of bits that
// tells of most absent pairs that they are.
class MergeTable {
 public:
  // Less than 2^32 merges. A merge's rank is its place in the list, or the id of its result. Of
  // merges of one pair the last counts. Linear.
  MergeTable(const std::vector<BpeMerge>& merges, bool ranks_are_ids) {
    std::size_t slots = 64;
    while (4 * slots < 5 * merges.size()) slots *= 2;  // at most four fifths full
    slots_.resize(slots);
    filter_.resize(slots * kFilterBits / 64);
    for (std::size_t place = 0; place < merges.size(); ++place) {
      const BpeMerge& merge = merges[place];
      const std::uint64_t hashed = hash(merge.left, merge.right);
      std::size_t i = hashed & (slots - 1);
      while (slots_[i].rank != kNoRank && !slots_[i].is_of(merge.left, merge.right)) {
        i = (i + 1) & (slots - 1);
      }
      const std::uint32_t rank = ranks_are_ids ? merge.result : static_cast<std::uint32_t>(place);
      slots_[i] = {merge.left, merge.right, merge.result, rank};
      if (rank >= results_.size()) results_.resize(std::size_t{rank} + 1);
      results_[rank] = merge.result;
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
    for (std::size_t i = hashed & mask; slots_[i].rank != kNoRank; i = (i + 1) & mask) {
      if (!slots_[i].is_of(left, right)) continue;
      return std::uint64_t{slots_[i].rank} << 32 | slots_[i].result;
    }
    return kNoMerge;
  }

  // What the merge of this rank makes; there is one. Constant time.
  TokenId result(std::uint32_t rank) const { return results_[rank]; }

  // More than any rank.
  std::size_t ranks() const { return results_.size(); }

 private:
  static constexpr std::size_t kFilterBits = 32;  // for each slot: at least 40 for each merge

  struct Slot {
    TokenId left = 0, right = 0, result = 0;
    std::uint32_t rank = kNoRank;

    bool is_of(TokenId other_left, TokenId other_right) const {
      return ((left ^ other_left) | (right ^ other_right)) == 0;
    }
  };

  static std::uint64_t hash(TokenId left, TokenId right) {
    const std::uint64_t mixed = pair_key(left, right) * 0x9E3779B97F4A7C15u;
    return (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93u;
  }
  // From high bits; the slot comes from the low ones.
  std::size_t filter_bit(std::uint64_t hashed) const {
    return (hashed >> 24) & (filter_.size() * 64 - 1);
  }

  std::vector<Slot> slots_;
  std::vector<std::uint64_t> filter_;
  std::vector<TokenId> results_;  // by rank
};

}  // namespace tinylm
