// Which instruction set's kernels run.
#pragma once

#include <string>
#include <vector>

#include "product.h"

namespace fqt {

// The sets that this machine can run, the best first; "portable" is always among them.
std::vector<const Kernels*> supported_kernels();

// The kernels in use: the best ones until select_kernels() has chosen others.
const Kernels& current_kernels();

// Chooses by name. Returns false for a name that is unknown or not supported here.
bool select_kernels(const std::string& isa);

}  // namespace fqt
