#include "isa.h"

#include <atomic>

namespace fqt {

#define FQT_DECLARE_RUNS_HERE(isa, argument) \
  namespace isa {                            \
  bool runs_here();                          \
  }
FQT_ISAS(FQT_DECLARE_RUNS_HERE, )

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
#define FQT_ADD(isa, argument) \
  if (isa::runs_here()) isas.push_back(Isa::isa);
  FQT_ISAS(FQT_ADD, )
  return isas;
}

std::string name_of(Isa isa) {
#define FQT_STRING_(isa) #isa
#define FQT_STRING(isa) FQT_STRING_(isa)
#define FQT_NAME(isa, argument) \
  case Isa::isa:                \
    return FQT_STRING(isa);
  switch (isa) { FQT_ISAS(FQT_NAME, ) }
  return "";
}

namespace {
std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{supported_isas().front()};
  return isa;
}
}  // namespace

Isa current_isa() { return current().load(); }

bool select_isa(const std::string& name) {
  for (Isa isa : supported_isas()) {
    if (name == name_of(isa)) {
      current() = isa;
      return true;
    }
  }
  return false;
}

namespace {
std::atomic<bool> always_tiles{false};
}  // namespace

void prefer_tiles(bool always) { always_tiles = always; }

bool always_prefers_tiles() { return always_tiles.load(); }

}  // namespace fqt
