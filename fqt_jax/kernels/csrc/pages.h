// Huge pages behind large results.
//
// XLA maps the memory of every run anew, and the first write to each page of 4 KiB costs about as
// much as the data that go there: a fifth of a whole step. Where the system grants huge pages on
// request (Linux's default), this asks for them; elsewhere it does nothing.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fqt {

inline void ask_for_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  if (bytes < kPage / 8) return;
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  // With the rest of the pages that it begins and ends in: results lie side by side in one block,
  // and what they begin and end in makes up half of a step's pages.
  const uintptr_t first = begin & ~(kPage - 1), last = (end + kPage - 1) & ~(kPage - 1);
  // A refusal, as where a part of those is not mapped, is no error: nothing but time is lost.
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace fqt
