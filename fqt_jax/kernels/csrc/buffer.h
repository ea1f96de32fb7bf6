// Scratch memory aligned to a cache line, so that whole vectors can be loaded from it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>
#include <utility>

namespace fqt {

// Blocks of scratch memory that a thread has given back, for its next tasks. A task takes some ten,
// and a small network's task lasts little longer than the system's allocator takes for them.
//
// Sizes are powers of two. Not with the address sanitizer, which finds a write past the end of
// a block only where each has its own.
class ScratchBlocks {
 public:
  static ScratchBlocks& of_thread() {
    thread_local ScratchBlocks blocks;
    return blocks;
  }

  // A block of at least that many bytes; the same number gives it back.
  void* take(size_t bytes) {
    const int size_class = class_of(bytes);
    if (size_class >= kClasses) return ::operator new(bytes, kAlignment);
    Block* const block = free_[size_class];
    if (block == nullptr) return ::operator new(kSmallest << size_class, kAlignment);
    free_[size_class] = block->next;
    kept_ -= kSmallest << size_class;
    return block;
  }

  void give(void* data, size_t bytes) {
    const int size_class = class_of(bytes);
    if (size_class >= kClasses || kept_ + (kSmallest << size_class) > kMostKept) {
      return ::operator delete(data, kAlignment);
    }
    free_[size_class] = new (data) Block{free_[size_class]};
    kept_ += kSmallest << size_class;
  }

  ScratchBlocks(const ScratchBlocks&) = delete;
  ScratchBlocks& operator=(const ScratchBlocks&) = delete;

 private:
  struct Block {
    Block* next;
  };

  static constexpr std::align_val_t kAlignment{64};
  static constexpr size_t kSmallest = 64, kMostKept = size_t{1} << 21;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int kClasses = 0;
#else
  static constexpr int kClasses = 15;  // the largest are 1 MiB
#endif

  ScratchBlocks() = default;
  ~ScratchBlocks() {
    for (Block* block : free_) {
      while (block != nullptr) {
        Block* const next = block->next;
        ::operator delete(block, kAlignment);
        block = next;
      }
    }
  }

  static int class_of(size_t bytes) {
    int size_class = 0;
    while (size_class < kClasses && kSmallest << size_class < bytes) ++size_class;
    return size_class;
  }

  Block* free_[kClasses + 1] = {};
  size_t kept_ = 0;
};

template <typename T>
class Buffer {
  static_assert(std::is_trivial_v<T>);

 public:
  Buffer() = default;
  explicit Buffer(int64_t size)
      : bytes_(static_cast<size_t>(size) * sizeof(T)),
        data_(static_cast<T*>(ScratchBlocks::of_thread().take(bytes_))) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) ScratchBlocks::of_thread().give(data_, bytes_);
  }

  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  size_t bytes_ = 0;
  T* data_ = nullptr;
};

}  // namespace fqt
