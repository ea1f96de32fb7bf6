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

std::string name_of(Form form) {
  switch (form) {
    case Form::look_up:
      return "look_up";
    case Form::popcount:
      return "popcount";
    case Form::tiles:
      return "tiles";
  }
  return "";
}

namespace {
std::atomic<std::optional<Form>> preferred{std::nullopt};
}  // namespace

void prefer_form(std::optional<Form> form) { preferred = form; }

std::optional<Form> preferred_form() { return preferred.load(); }

bool prefer_form(const std::string& name) {
  if (name.empty()) {
    prefer_form(std::nullopt);
    return true;
  }
  for (Form form : {Form::look_up, Form::popcount, Form::tiles}) {
    if (name == name_of(form)) {
      prefer_form(form);
      return true;
    }
  }
  return false;
}

}  // namespace fqt
