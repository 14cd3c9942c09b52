// Memory for tables that are read at random: with pages of the usual 4 KiB, most reads of a table
// of megabytes miss the processor's cache of page addresses.
#pragma once

#include <cstddef>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace tinylm {

// An allocator that asks for huge pages where the system gives them, which it need not.
template <class T>
class HugePageAllocator {
 public:
  using value_type = T;

  HugePageAllocator() = default;
  template <class Other>
  HugePageAllocator(const HugePageAllocator<Other>&) {}  // NOLINT: converts, as allocators do

  T* allocate(std::size_t count) {
    const std::size_t bytes = count * sizeof(T);
    void* const memory = ::operator new(bytes, std::align_val_t{alignment(bytes)});
#ifdef __linux__
    if (bytes >= kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return static_cast<T*>(memory);
  }

  void deallocate(T* memory, std::size_t count) {
    ::operator delete(memory, std::align_val_t{alignment(count * sizeof(T))});
  }

  bool operator==(const HugePageAllocator&) const { return true; }
  bool operator!=(const HugePageAllocator&) const { return false; }

 private:
  static constexpr std::size_t kHugePage = std::size_t{1} << 21;
  static constexpr std::size_t alignment(std::size_t bytes) {
    return bytes >= kHugePage ? kHugePage : alignof(T) < 64 ? 64 : alignof(T);
  }
};

}  // namespace tinylm
