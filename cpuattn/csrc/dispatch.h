// Which of the kernels runs. Apart from kernel.h, which must not bring in the standard library.
#pragma once

#include <string>
#include <vector>

namespace omniserve {

// Instruction set of the kernel in use, the fastest of kernel_names() at first.
const char* kernel_name();
// Those that run on this CPU, the fastest first, and behind them what is made for another one.
std::vector<std::string> kernel_names();
// Replaces the fastest, for tests and comparisons. Throws std::invalid_argument.
void use_kernel(const std::string& name);

}  // namespace omniserve
