// A hash map from pairs of token ids to small values: open addressing, no erasing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace tinylm {

using TokenId = std::uint32_t;

constexpr std::uint64_t pair_key(TokenId left, TokenId right) {
  return std::uint64_t{left} << 32 | right;
}

template <class Value>
class PairMap {
 public:
  PairMap() : slots_(kMinSlots) {}

  std::size_t size() const { return size_; }

  // The value of `key`, or nullptr. Constant time.
  const Value* find(std::uint64_t key) const {
    const Slot& slot = slots_[index_of(key)];
    return slot.key == key ? &slot.value : nullptr;
  }

  // The value of `key`, made with Value() if there was none; valid until the next call.
  Value& operator[](std::uint64_t key) {
    if (2 * (size_ + 1) > slots_.size()) grow();
    Slot& slot = slots_[index_of(key)];
    if (slot.key != key) {
      slot.key = key;
      ++size_;
    }
    return slot.value;
  }

 private:
  // Both ids are below 2^32 - 1, so no pair has this key.
  static constexpr std::uint64_t kEmpty = ~std::uint64_t{0};
  static constexpr std::size_t kMinSlots = 64;

  struct Slot {
    std::uint64_t key = kEmpty;
    Value value{};
  };

  // Where `key` is, or the empty slot where it belongs.
  std::size_t index_of(std::uint64_t key) const {
    const std::size_t mask = slots_.size() - 1;
    const std::uint64_t mixed = (key ^ (key >> 32) * 0x9E3779B97F4A7C15u) * 0xD6E8FEB86659FD93u;
    std::size_t i = (mixed >> 32) & mask;
    while (slots_[i].key != key && slots_[i].key != kEmpty) i = (i + 1) & mask;
    return i;
  }

  void grow() {
    std::vector<Slot> old(2 * slots_.size());
    old.swap(slots_);
    for (Slot& slot : old) {
      if (slot.key != kEmpty) slots_[index_of(slot.key)] = std::move(slot);
    }
  }

  std::vector<Slot> slots_;
  std::size_t size_ = 0;
};

}  // namespace tinylm
