// What the processor and the system can be told of memory that is used at random places.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace tinylm {

// Has what lies at `address` fetched while other work is done.
inline void prefetch(const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#else
  (void)address;
#endif
}

// With pages of the usual 4 KiB, most reads of a table of megabytes miss the processor's cache of
// page addresses.
constexpr std::size_t kHugePageBytes = std::size_t{1} << 21;

// Asks the system to back [memory, memory + size) with huge pages when it is first touched. Only
// ever a hint: refused, nothing changes but speed.
inline void advise_huge_pages(void* memory, std::size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t begin = (address + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const std::uintptr_t end = (address + size) / kHugePageBytes * kHugePageBytes;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)size;
#endif
}

// Whether malloc keeps what is freed, where it is glibc's: by itself it gives memory back to the
// system as soon as little of it is in use, such as at the end of each training step, and each page
// then costs a fault again. Blocks of 32 MiB and more, the most that can be set, go back in any
// case. Switched off, the limits are those to which such blocks would have raised them by
// themselves. False where malloc is another's.
inline bool keep_freed_memory(bool keep) {
#if defined(__GLIBC__)
  constexpr int kLargestKept = 32 << 20, kAll = 2'000'000'000;
  const bool done = mallopt(M_MMAP_THRESHOLD, kLargestKept) == 1 &&
                    mallopt(M_TRIM_THRESHOLD, keep ? kAll : 2 * kLargestKept) == 1;
  if (!keep) malloc_trim(0);
  return done;
#else
  (void)keep;
  return false;
#endif
}

// An allocator for large tables: on huge pages where there are any, and on whole cache lines.
template <class T>
class HugePageAllocator {
 public:
  using value_type = T;

  HugePageAllocator() = default;
  template <class Other>
  HugePageAllocator(const HugePageAllocator<Other>&) {}  // converts, as allocators do

  T* allocate(std::size_t count) {
    const std::size_t bytes = count * sizeof(T);
    void* const memory = ::operator new(bytes, std::align_val_t{alignment(bytes)});
    advise_huge_pages(memory, bytes);
    return static_cast<T*>(memory);
  }

  void deallocate(T* memory, std::size_t count) {
    ::operator delete(memory, std::align_val_t{alignment(count * sizeof(T))});
  }

  bool operator==(const HugePageAllocator&) const { return true; }
  bool operator!=(const HugePageAllocator&) const { return false; }

 private:
  static constexpr std::size_t alignment(std::size_t bytes) {
    return bytes >= kHugePageBytes ? kHugePageBytes : alignof(T) < 64 ? 64 : alignof(T);
  }
};

// The same for what is written before it is read: new elements of a vector are not set to zero.
template <class T>
class UninitializedAllocator : public HugePageAllocator<T> {
 public:
  template <class Other>
  struct rebind {
    using other = UninitializedAllocator<Other>;
  };

  template <class U>
  void construct(U* element) {
    ::new (static_cast<void*>(element)) U;
  }
  template <class U, class... Arguments>
  void construct(U* element, Arguments&&... arguments) {
    ::new (static_cast<void*>(element)) U(std::forward<Arguments>(arguments)...);
  }
};

}  // namespace tinylm
