// The instruction sets, and which one's kernels run.
#pragma once

#include <memory>
#include <optional>
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
#define FQT_ISAS(X, argument) \
  X(amx, argument)            \
  X(vpopcnt, argument) X(avx512, argument) X(avx2, argument) X(portable, argument)
#elif defined(__x86_64__)
#define FQT_ISAS(X, argument) \
  X(vpopcnt, argument) X(avx512, argument) X(avx2, argument) X(portable, argument)
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

// States that `Args` are the arguments of a product, which may come in several forms: `form_of` says
// which one an instruction set takes.
#define FQT_PRODUCT(Args)                             \
  FQT_JOB(Args)                                       \
  FQT_ISAS(FQT_DECLARE_FORM_OF, Args)                 \
  inline Form form_of(Isa isa, const Args& args) {    \
    switch (isa) { FQT_ISAS(FQT_CALL_FORM_OF, Args) } \
    return Form::look_up;                             \
  }
#define FQT_DECLARE_FORM_OF(isa, Args) \
  namespace isa {                      \
  Form form_of(const Args&);           \
  }
#define FQT_CALL_FORM_OF(isa, Args) \
  case Isa::isa:                    \
    return isa::form_of(args);

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

// How a product is computed. By look-up, each set can.
enum class Form { look_up, popcount, tiles };

std::string name_of(Form form);

// For tests and measurements: the form to take wherever an instruction set has it, for shapes too for
// which another is faster.
void prefer_form(std::optional<Form> form);
std::optional<Form> preferred_form();

// Chooses by name. Returns false for a name that is unknown; "" is none.
bool prefer_form(const std::string& name);

}  // namespace fqt
