// Tokens by their bytes, where a piece that is a token stays one whatever the merges say.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "pair_map.hpp"
#include "short_key.hpp"

namespace tinylm {

// Most tokens are short ones and are found in one place: up to a third of a cache line, in a table
// at most half full. Nothing is erased.
class WholePieces {
 public:
  static constexpr TokenId kNone = ~TokenId{0};

  // Makes room for `count` tokens.
  void reserve(std::size_t count) {
    std::size_t slots = 1;
    while (slots < 2 * count) slots *= 2;
    slots_.resize(slots);
  }

  // `token` is not empty and stays where it is. Of two with the same bytes the first counts.
  // Constant time.
  void insert(std::string_view token, TokenId id) {
    if (token.size() > kMaxShortKey) {
      long_ones_.emplace(token, id);
      return;
    }
    Slot& slot = slots_[index_of(token)];
    if (slot.id == kNone) slot = {short_key_exactly(token.data(), token.size()), id};
  }

  // The token that `piece`, which is not empty, is, or kNone. Constant time.
  TokenId find(std::string_view piece) const {
    if (slots_.empty()) return kNone;
    if (piece.size() <= kMaxShortKey) return slots_[index_of(piece)].id;
    const auto found = long_ones_.find(piece);
    return found == long_ones_.end() ? kNone : found->second;
  }

 private:
  struct Slot {
    ShortKey key{0, 0};
    TokenId id = kNone;
  };

  // Where a short piece is, or the empty slot where it belongs.
  std::size_t index_of(std::string_view piece) const {
    const ShortKey key = short_key_exactly(piece.data(), piece.size());
    const std::size_t mask = slots_.size() - 1;
    std::size_t i = (key_hash(key) >> 32) & mask;
    while (slots_[i].id != kNone && !(slots_[i].key == key)) i = (i + 1) & mask;
    return i;
  }

  std::vector<Slot> slots_;
  std::unordered_map<std::string_view, TokenId> long_ones_;
};

}  // namespace tinylm
