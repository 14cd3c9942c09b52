// Memory for hash tables.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#include "memory.hpp"

namespace tinylm {

// A fixed number of slots, all zero at first, none across two cache lines if their size divides
// one.
template <class Slot>
class SlotArray {
  static_assert(std::is_trivially_copyable<Slot>::value, "slots start as zero bytes");

 public:
  explicit SlotArray(std::size_t size) : size_(size) {
    if (size > (SIZE_MAX - kLine) / sizeof(Slot)) throw std::bad_alloc();
    // Zero pages come from the system as they are first touched.
    memory_ = std::calloc(1, size * sizeof(Slot) + kLine);
    if (memory_ == nullptr) throw std::bad_alloc();
    const auto address = reinterpret_cast<std::uintptr_t>(memory_);
    slots_ = reinterpret_cast<Slot*>((address + kLine - 1) / kLine * kLine);
    advise_huge_pages(slots_, size * sizeof(Slot));
  }
  SlotArray(SlotArray&& other) noexcept
      : size_(std::exchange(other.size_, 0)),
        memory_(std::exchange(other.memory_, nullptr)),
        slots_(std::exchange(other.slots_, nullptr)) {}
  SlotArray& operator=(SlotArray&& other) noexcept {
    std::swap(size_, other.size_);
    std::swap(memory_, other.memory_);
    std::swap(slots_, other.slots_);
    return *this;
  }
  ~SlotArray() { std::free(memory_); }

  std::size_t size() const { return size_; }
  Slot& operator[](std::size_t i) { return slots_[i]; }
  const Slot& operator[](std::size_t i) const { return slots_[i]; }
  Slot* begin() { return slots_; }
  Slot* end() { return slots_ + size_; }
  const Slot* begin() const { return slots_; }
  const Slot* end() const { return slots_ + size_; }

 private:
  static constexpr std::size_t kLine = 64;

  std::size_t size_;
  void* memory_;
  Slot* slots_;
};

}  // namespace tinylm
