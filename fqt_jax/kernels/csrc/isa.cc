#include "isa.h"

#include <atomic>

namespace fqt {

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace neon {
extern const Kernels kernels;
}

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt")) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) {
      sets.push_back(&avx512::kernels);
    }
    sets.push_back(&avx2::kernels);
  }
#elif defined(__aarch64__)
  sets.push_back(&neon::kernels);
#endif
  sets.push_back(&portable::kernels);
  return sets;
}

namespace {
std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{supported_kernels().front()};
  return kernels;
}
}  // namespace

const Kernels& current_kernels() { return *current().load(); }

bool select_kernels(const std::string& isa) {
  for (const Kernels* kernels : supported_kernels()) {
    if (isa == kernels->isa) {
      current() = kernels;
      return true;
    }
  }
  return false;
}

}  // namespace fqt
