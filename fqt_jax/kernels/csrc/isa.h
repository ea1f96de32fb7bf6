// The instruction sets, and which one's kernels run.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "job.h"

// Linux on x86-64, and a compiler that knows the tile instructions.
#if defined(__x86_64__) && defined(__linux__) && !defined(FQT_ONLY_ISA) && \
    (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define FQT_AMX
#endif

// Calls X(isa, argument) for each instruction set that is compiled for this processor, the best
// first. Each names a namespace, whose kernels are in kernels_<isa>.cc.
#if defined(FQT_ONLY_ISA)  // for tests
#define FQT_ISAS(X, argument) X(FQT_ONLY_ISA, argument)
#elif defined(FQT_AMX)
#define FQT_ISAS(X, argument) X(amx, argument) X(avx512, argument) X(avx2, argument) X(portable, argument)
#elif defined(__x86_64__)
#define FQT_ISAS(X, argument) X(avx512, argument) X(avx2, argument) X(portable, argument)
#elif defined(__aarch64__)
#define FQT_ISAS(X, argument) X(neon, argument) X(portable, argument)
#else
#define FQT_ISAS(X, argument) X(portable, argument)
#endif

// States that `Args` are the arguments of a kernel. For each instruction set, its kernels define
// `std::unique_ptr<Job> make(const Args&)`; `make_job` calls that of one set.
#define FQT_JOB(Args)                                               \
  FQT_ISAS(FQT_DECLARE_MAKE, Args)                                  \
  inline std::unique_ptr<Job> make_job(Isa isa, const Args& args) { \
    switch (isa) { FQT_ISAS(FQT_CALL_MAKE, Args) }                  \
    return nullptr;                                                 \
  }
#define FQT_DECLARE_MAKE(isa, Args)       \
  namespace isa {                         \
  std::unique_ptr<Job> make(const Args&); \
  }
#define FQT_CALL_MAKE(isa, Args) \
  case Isa::isa:                 \
    return isa::make(args);

// States that `Args` are the arguments of a kernel that may come in two forms: `uses_tiles` says whether
// an instruction set's is on matrix tiles rather than by look-up.
#define FQT_PRODUCT(Args)                                      \
  FQT_JOB(Args)                                                \
  FQT_ISAS(FQT_DECLARE_USES_TILES, Args)                       \
  inline bool uses_tiles(Isa isa, const Args& args) {          \
    switch (isa) { FQT_ISAS(FQT_CALL_USES_TILES, Args) }       \
    return false;                                              \
  }
#define FQT_DECLARE_USES_TILES(isa, Args) \
  namespace isa {                         \
  bool uses_tiles(const Args&);           \
  }
#define FQT_CALL_USES_TILES(isa, Args) \
  case Isa::isa:                       \
    return isa::uses_tiles(args);

namespace fqt {

#define FQT_NAME(isa, argument) isa,
enum class Isa { FQT_ISAS(FQT_NAME, ) };
#undef FQT_NAME

// The sets that this machine can run, the best first; "portable" is always among them.
std::vector<Isa> supported_isas();

std::string name_of(Isa isa);

// The set in use: the best one until select_isa() has chosen another.
Isa current_isa();

// Chooses by name. Returns false for a name that is unknown or not supported here.
bool select_isa(const std::string& name);

// For tests: whether tiles are used, where there are any, for shapes too for which they are slower.
void prefer_tiles(bool always);
bool always_prefers_tiles();

}  // namespace fqt
