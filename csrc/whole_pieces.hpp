// Tokens by their bytes, where a piece that is a token is that token though its merges lead
// elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "pair_map.hpp"
#include "short_key.hpp"

namespace tinylm {

// Short tokens are found in one place: up to a third of a cache line, in a table at most half full.
// Nothing is erased.
class WholePieces {
 public:
  static constexpr TokenId kNone = ~TokenId{0};

  // `token` is not empty and stays where it is. Of two with the same bytes the first counts.
  // Constant time.
  void insert(std::string_view token, TokenId id) {
    if (token.size() > kMaxShortKey) {
      long_ones_.emplace(token, id);
      return;
    }
    if (2 * (short_ones_ + 1) > slots_.size()) grow();
    Slot& slot = slots_[index_of(short_key_exactly(token.data(), token.size()))];
    if (slot.id != kNone) return;
    slot = {short_key_exactly(token.data(), token.size()), id};
    ++short_ones_;
  }

  // The token that `piece`, which is not empty, is, or kNone. Constant time.
  TokenId find(std::string_view piece) const {
    if (piece.size() <= kMaxShortKey) {
      if (short_ones_ == 0) return kNone;
      return slots_[index_of(short_key_exactly(piece.data(), piece.size()))].id;
    }
    if (long_ones_.empty()) return kNone;
    const auto found = long_ones_.find(piece);
    return found == long_ones_.end() ? kNone : found->second;
  }

 private:
  struct Slot {
    ShortKey key{0, 0};
    TokenId id = kNone;
  };

  // Where a key is, or the empty slot where it belongs.
  std::size_t index_of(const ShortKey& key) const {
    const std::size_t mask = slots_.size() - 1;
    std::size_t i = (key_hash(key) >> 32) & mask;
    while (slots_[i].id != kNone && !(slots_[i].key == key)) i = (i + 1) & mask;
    return i;
  }

  void grow() {
    std::vector<Slot> old(slots_.empty() ? 16 : 2 * slots_.size());
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.id != kNone) slots_[index_of(slot.key)] = slot;
    }
  }

  std::vector<Slot> slots_;
  std::size_t short_ones_ = 0;
  std::unordered_map<std::string_view, TokenId> long_ones_;
};

}  // namespace tinylm
