// Memory for weights, in huge pages where the system has them for the asking: a step of decode reads all weights once, and looks
// up every page of them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace ir {

inline constexpr size_t kHugePage = size_t{2} << 20;

// Memory that begins with a page, in huge pages as far as it fills them.
inline void* huge_pages(size_t size, size_t alignment = kHugePage) {
  void* memory = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  madvise(memory, size, MADV_HUGEPAGE);  // a hint: whether it is taken does not matter
#endif
  return memory;
}

// Pages that weights smaller than one share, one after the other; they are given back with the last of them. A weight's address
// tells its block.
class SharedPages {
 public:
  static void* allocate(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size = (size + kLine - 1) / kLine * kLine;
    if (current_ == nullptr || current_->used + size > kBlock)
      current_ = new (huge_pages(kBlock, kBlock)) Header{kLine, 0};
    void* memory = reinterpret_cast<char*>(current_) + current_->used;
    current_->used += size;
    ++current_->weights;
    return memory;
  }
  static void deallocate(void* memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto* block = reinterpret_cast<Header*>(reinterpret_cast<uintptr_t>(memory) & ~uintptr_t{kBlock - 1});
    if (--block->weights != 0) return;
    if (block == current_) current_ = nullptr;
    std::free(block);
  }

 private:
  struct Header {
    size_t used, weights;
  };
  static constexpr size_t kBlock = 8 * kHugePage, kLine = 64;
  static_assert(sizeof(Header) <= kLine);
  static inline std::mutex mutex_;
  static inline Header* current_ = nullptr;
};

// A sanitizer sees the end of what has memory of its own.
#ifdef __SANITIZE_ADDRESS__
inline constexpr bool kShare = false;
#else
inline constexpr bool kShare = true;
#endif

template <typename T>
struct HugePages {
  using value_type = T;

  HugePages() = default;
  template <typename U>
  HugePages(const HugePages<U>&) {}

  T* allocate(size_t count) {
    const size_t size = count * sizeof(T);
    if (size >= kHugePage) return static_cast<T*>(huge_pages(size));
    return static_cast<T*>(kShare ? SharedPages::allocate(size) : huge_pages(size, 64));
  }
  void deallocate(T* memory, size_t count) {
    kShare && count * sizeof(T) < kHugePage ? SharedPages::deallocate(memory) : std::free(memory);
  }

  bool operator==(const HugePages&) const { return true; }
  bool operator!=(const HugePages&) const { return false; }
};

}  // namespace ir
